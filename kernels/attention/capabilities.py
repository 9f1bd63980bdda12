"""What each implementation of the attention op can do, as data: read before anything is traced."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels.attention.masks import And, Causal, Everything, Mask, SlidingWindow
from kernels.platform import not_hopper
from kernels.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Case:
    """The facts of one call that decide which implementations can do it."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    dtype: Any
    mask: Mask
    tokens: tuple[Tokens, Tokens]
    soft_cap: float
    sinks: bool
    bias: bool
    score_mod: bool
    dropout: float
    program: Callable[[], Any] = dataclasses.field(compare=False)  # Traces what is elementwise, or refuses.

    @functools.cached_property
    def not_elementwise(self) -> str | None:
        """Why no kernel can do what is asked of scores."""
        try:
            self.program()
        except NotImplementedError as reason:
            return str(reason)
        return None

    @property
    def plain(self) -> str | None:
        """ "full", "causal" or "window" where the mask is that of consecutive tokens, queries and keys the same."""
        terms = self.mask.terms if isinstance(self.mask, And) else (self.mask,)
        if all(isinstance(term, Everything) for term in terms):
            return "full"
        index = [side.index for side in self.tokens]
        aligned = all(isinstance(x, np.ndarray) and (x == np.arange(x.shape[-1])).all() for x in index)
        known = all(isinstance(term, (Causal, SlidingWindow)) for term in terms) and Causal() in terms
        if not (aligned and known and self.q[1] == self.k[1]):
            return None
        return "window" if any(isinstance(term, SlidingWindow) for term in terms) else "causal"


@dataclasses.dataclass(frozen=True)
class Capability:
    """Limits of one kernel. `widest` are key and value width of a head in two-byte types; float32 has half of it."""

    dtypes: tuple[str, ...]
    widest: tuple[int, int]
    changes: bool = True  # Bias, soft cap, functions of scores.
    dropout: bool = True
    least_queries: int = 1
    more: Callable[[Case], str | None] = lambda case: None

    def refuses(self, case: Case) -> str | None:
        """None, or why the kernel cannot do the case."""
        dtype = jnp.dtype(case.dtype)
        if dtype.name not in self.dtypes:
            return f"{dtype.name} inputs; it does {', '.join(self.dtypes)}"
        for name, width, most in (("keys", case.q[3], self.widest[0]), ("values", case.v[3], self.widest[1])):
            most = most * 2 // dtype.itemsize
            if width > most:
                return f"{name} of width {width}; at most {most} in {dtype.name}"
        if case.q[1] < self.least_queries:
            return f"{case.q[1]} query tokens; at least {self.least_queries}"
        changed = case.bias or case.score_mod or case.soft_cap
        if changed and not self.changes:
            return "scores changed by a bias, a soft cap or a function"
        if case.dropout and not self.dropout:
            return "dropout"
        return self.more(case) or case.not_elementwise


def _triton(case: Case) -> str | None:
    missing = [name for name in ("jax_triton", "triton") if importlib.util.find_spec(name) is None]
    return f"it needs {' and '.join(missing)} (pip install 'tessera[gpu]')" if missing else None


def _cudnn(case: Case) -> str | None:
    if case.plain is None:
        return f"mask {case.mask}; it does full attention, and causal attention and windows over equal lengths"
    if case.sinks:
        return "sinks: their gradient needs that of lse, which cuDNN does not give"
    if max(case.q[3], case.v[3]) > 128 or case.q[3] % 8 or case.q[3] != case.v[3]:
        return f"heads of width {case.q[3]} and {case.v[3]}; it does equal widths up to 128 that 8 divides"
    return None


CAPABILITIES = {
    "pallas_tpu": Capability(("bfloat16", "float32"), (640, 512)),
    "mosaic_gpu": Capability(("bfloat16", "float16"), (256, 256), more=lambda case: not_hopper()),
    "triton": Capability(("bfloat16", "float16", "float32"), (256, 256), more=_triton),
    "cudnn": Capability(("bfloat16", "float16"), (128, 128), changes=False, dropout=False, more=_cudnn),
}
