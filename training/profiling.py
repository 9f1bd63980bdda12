"""Where the time goes: a trace of some steps on request, and the share of the device's peak that a run reaches."""

import pathlib
from types import TracebackType
from typing import Any

import jax

# Dense bfloat16 peak of one device in FLOP/s, from the vendors' data sheets, by what `Device.device_kind` says.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}


def peak(device: jax.Device) -> float | None:
    """FLOP/s that the device can reach in bfloat16; None where nobody has written it down."""
    return PEAKS.get(device.device_kind)


def utilisation(flops_per_token: float, tokens_per_second: float, devices: list[jax.Device]) -> float | None:
    """Model FLOPs utilisation (PaLM, Chowdhery et al. 2022, appendix B); None if a device's peak is unknown."""
    peaks = [peak(device) for device in devices]
    if None in peaks:
        return None
    return flops_per_token * tokens_per_second / sum(peaks)


class Trace:
    """A profiler trace of the steps `first` to `last` (`config.log.profile_steps`), for TensorBoard or Perfetto."""

    def __init__(self, folder: pathlib.Path, steps: tuple[int, ...]) -> None:
        self._folder, self._steps, self._running = folder, steps, False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._running:
            self._stop()

    def before(self, step: int) -> None:
        """To be called before step number `step` (the first is 1)."""
        if self._steps and step == max(1, self._steps[0]):
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """To be called after it, with what it returned: the trace must not end before the work does."""
        if self._running and step >= self._steps[1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
