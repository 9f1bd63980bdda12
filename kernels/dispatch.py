"""Which implementation of an op runs: chosen by platform and case, or named by the caller and obeyed."""

import difflib
import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kernels.platform import default_platform, interpreting

_logger = logging.getLogger("tessera.kernels")
_told: set[tuple] = set()


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `supports(case)` answers None where the implementation can do the case, else the reason why it cannot; it reads
    declared facts (shapes, types, which options are set) and traces nothing. `platforms` are those on which it may be
    chosen without being named ("cpu", "gpu", "tpu"); a `kernel` runs nowhere else, but for its interpreter.
    `unsuited(case)` may give a reason not to choose it for a case unless it is named. `untried` kernels have been
    interpreted and compiled, but never run on a chip: choosing one is logged as a warning.
    """

    name: str
    function: Callable[..., Any]
    supports: Callable[[Any], str | None]
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    kernel: bool = False
    unsuited: Callable[[Any], str | None] = lambda case: None
    untried: bool = False

    def refusal(self, case: Any, platform: str, named: bool) -> str | None:
        """Why it cannot (or, where it is not named, should not) do the case on this platform."""
        if platform in self.platforms or (named and (interpreting() or not self.kernel)):
            return self.supports(case) or (None if named else self.unsuited(case))
        if not named:
            return f"not for {platform}"
        runs = f"it runs on {' or '.join(self.platforms)}, not on {platform}"
        return f"{runs}; within kernels.platform.interpreted() it runs anywhere, slowly"


def later(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of a module that is imported when the function is first called."""

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **options)

    call.__name__ = call.__qualname__ = name
    return call


def choose(
    op_name: str,
    requested: str | None,
    candidates: Mapping[str, Implementation],
    case: Any,
    platform: str | None = None,
) -> Implementation:
    """The implementation of `op_name` for this case.

    `requested=None` takes the first candidate (in their order) whose platforms hold this one and that supports the
    case, and logs once what was chosen and why those before it were refused. A named implementation is returned or
    refused, never replaced. `platform` defaults to the platform of the default device.

    Raises: `ValueError` for an unknown name, naming the nearest; `NotImplementedError` with the reason where the named
    one cannot do the case, or with all reasons where none can.
    """
    if requested is not None:
        if requested not in candidates:
            near = difflib.get_close_matches(requested, candidates, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(candidates)}"
            raise ValueError(f"unknown implementation {requested!r} of {op_name}: {hint}")
        reason = candidates[requested].refusal(case, platform or default_platform(), named=True)
        if reason is not None:
            raise NotImplementedError(f"{op_name}: implementation {requested!r} cannot do this case: {reason}")
        return candidates[requested]
    platform = platform or default_platform()
    refused = []
    for name, candidate in candidates.items():
        reason = candidate.refusal(case, platform, named=False)
        if reason is None:
            _tell_once(op_name, candidate, platform, tuple(refused))
            return candidate
        refused.append(f"{name}: {reason}")
    raise NotImplementedError(f"{op_name}: no implementation can do this case on {platform} ({'; '.join(refused)})")


def _tell_once(op_name: str, chosen: Implementation, platform: str, refused: tuple[str, ...]) -> None:
    key = (op_name, chosen.name, platform, refused)
    if key in _told:
        return
    _told.add(key)
    reasons = f" (refused {'; '.join(refused)})" if refused else ""
    _logger.info("%s on %s: %s%s", op_name, platform, chosen.name, reasons)
    if chosen.untried:
        _logger.warning(
            "%s: the kernel %s has been interpreted and compiled, but never run on a chip; compare it with "
            "implementation='xla' before you trust it",
            op_name,
            chosen.name,
        )
