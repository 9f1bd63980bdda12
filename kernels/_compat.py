"""What Pallas calls differently in jax 0.10.2 and jax 0.11; nothing else may ask for the version."""

import functools
import inspect
import os
from typing import Any

import jax


def load(ref: Any, layout: Any) -> jax.Array:
    """What a Mosaic GPU reference (sliced by `.at[...]`) holds, in registers laid out as said."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if _load_takes_index() else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


@functools.cache
def _load_takes_index() -> bool:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty


def mosaic_gpu_interpreter() -> Any:
    """Parameters of the interpreter of Mosaic GPU kernels, which looks for races (`check_races`).

    Raises: `NotImplementedError` before jax 0.11, which has none; `RuntimeError` with too few threads, which would
    wait for each other for ever.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(f"Mosaic GPU kernels are interpreted from jax 0.11 on; this is jax {jax.__version__}")
    if max(len(os.sched_getaffinity(0)), jax.local_device_count("cpu")) < 4:
        raise RuntimeError(
            "interpreting Mosaic GPU kernels takes four threads: set XLA_FLAGS=--xla_force_host_platform_device_count=4"
        )
    return plgpu.InterpretGPUParams(detect_races=True)


def check_races() -> None:
    """Raises `RuntimeError` where the last interpreted kernel had a race between its warpgroups or copies."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # There is no public way.

    if gpu_callbacks.get_races().races_found:
        raise RuntimeError("races in a Mosaic GPU kernel; the interpreter has printed where")


def cuda_version() -> int | None:
    """The version of CUDA jax runs with (12091 for 12.9.1); None where there is none."""
    from jax._src.lib import cuda_versions  # There is no public way.

    try:
        return cuda_versions.cuda_runtime_get_version()
    except (AttributeError, RuntimeError):  # No plugin; no CUDA.
        return None
