"""The processes of a run, one per host: how they find each other, agree, and are told to stop."""

import dataclasses
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np

from configs.errors import ConfigError


def join(coordinator: str, process_id: int, num_processes: int) -> None:
    """Joins the run of `num_processes` processes that meet at `coordinator` (host:port); one process needs nothing.

    Call before anything touches a device. Raises ConfigError for a number without its partner.
    """
    if not coordinator and num_processes <= 1 and process_id < 0:
        return
    if not coordinator or num_processes < 1 or not 0 <= process_id < num_processes:
        raise ConfigError(
            "several processes need all of --coordinator=host:port, --num_processes=N and --process_id=0..N-1, got "
            f"--coordinator={coordinator!r} --num_processes={num_processes} --process_id={process_id}"
        )
    if jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"process {process_id} could not join the run at {coordinator}: {error}") from error


def first() -> bool:
    """Whether this process is the one that writes logs and speaks to the terminal."""
    return jax.process_index() == 0


def agree(number: int) -> int:
    """The number that process 0 holds, in every process."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def meet(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


@dataclasses.dataclass
class Interruption:
    """SIGTERM and Ctrl-C as a wish to stop at the next step; a second Ctrl-C stops at once.

    With several processes JAX's own service hears SIGTERM, in whichever of them, and all stop at the same step.
    """

    signal: int = 0
    _before: dict[int, Any] = dataclasses.field(default_factory=dict)

    def __enter__(self) -> "Interruption":
        # Python lets only the main thread handle signals; in a notebook's worker thread the run cannot be interrupted.
        if threading.current_thread() is threading.main_thread():
            wanted = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
            self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether the run should end before step `step`; the same answer in every process."""
        if jax.process_count() == 1:
            return bool(self.signal)
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
