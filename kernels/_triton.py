"""The one door to Triton: raw kernels on JAX arrays, compiled through jax-triton on a GPU, interpreted on CPU."""

import functools
import inspect
import os
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels.platform import device_kind, interpreting
from kernels.varying import alike

# Compute capabilities by a part of the device's name, for compilation without the device itself.
_CAPABILITIES = {"H100": 90, "H200": 90, "GH200": 90, "H20": 90, "A100": 80, "L40": 89, "B200": 100, "B300": 103}
_SHARED_MEMORY = {"A100": 163, "H100": 227, "H200": 227, "H20": 227, "B200": 227, "B300": 227}  # KiB; others 99.


def shared_memory(kind: str) -> int:
    """Bytes of shared memory that one block may use on a GPU of this kind."""
    return next((size for name, size in _SHARED_MEMORY.items() if name in kind), 99) << 10


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def available() -> str | None:
    """None where Triton kernels can be built here, else what is missing, in one line."""
    try:
        import jax_triton  # noqa: F401
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton kernels need jax-triton, triton and jax's CUDA plugin: pip install 'tessera[gpu]' ({error})"
    return None


def call(
    kernel: Any,
    *inputs: Any,
    out_shape: Any,
    grid: int | tuple[int, ...],
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> Any:
    """Run a raw Triton kernel `kernel(in_ptr0, .., out_ptr0, .., *, CONSTANTS: tl.constexpr)` on JAX arrays.

    `inputs` are arrays, or Python numbers that are fixed at compilation; `out_shape` is a `jax.ShapeDtypeStruct` or a
    tuple of them, and the result has its structure. Outputs are memory with anything in it: the kernel fills all of it.
    Constants may be `triton.jit` functions, which the kernel then calls. Under `kernels.platform.interpreted()` the
    kernel runs in Triton's interpreter on CPU (`_triton_interpreter`).

    Raises: `NotImplementedError` where Triton or jax-triton is not installed.
    """
    missing = available()
    if missing is not None:
        raise NotImplementedError(missing)
    grid = (grid,) if isinstance(grid, int) else tuple(int(n) for n in grid)
    if 0 in grid:  # No launch; CUDA refuses one.
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), out_shape)
    arrays = [x for x in inputs if _is_array(x)]
    if interpreting():
        return alike(_interpret(kernel, inputs, out_shape, grid, constants), *arrays)
    import jax_triton

    _write_ptx_for_cuda_12()
    # jax-triton 0.4 renamed the shape, and leaves fusing of multiply and add unsaid, at which Triton warns.
    renamed = "out_type" in inspect.signature(jax_triton.triton_call).parameters
    options = (
        {"out_type": out_shape, "backend_options": {"enable_fp_fusion": True}} if renamed else {"out_shape": out_shape}
    )
    out = jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        grid=grid,
        name=kernel.fn.__name__,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=_capability(),
        **options,
        **constants,
    )
    return alike(out, *arrays)


def ptx(lowered: Any) -> list[str]:
    """The PTX of every Triton kernel in a function lowered for CUDA (`jax.stages.Lowered`), in the module's order."""
    from jaxlib.mlir import ir

    texts = []

    def visit(operation: Any) -> Any:
        attributes = operation.attributes
        if operation.name == "stablehlo.custom_call" and "triton" in str(attributes["call_target_name"]):
            typed = "mhlo.backend_config" in attributes  # That of jax-triton 0.4.
            payload = attributes["mhlo.backend_config"]["opaque"] if typed else attributes["backend_config"]
            message = zlib.decompress(payload.value_bytes)
            begin = message.index(b".version")
            texts.append(message[begin : message.index(b"\n}\n", begin) + 3].decode())
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    return texts


@functools.cache
def _write_ptx_for_cuda_12() -> None:
    """jaxlib assembles PTX with the tools of CUDA 12, while newer versions of Triton write it for those of 13."""
    import triton

    if hasattr(triton.knobs.nvidia, "ptxas_blackwell") and "TRITON_PTXAS_BLACKWELL_PATH" not in os.environ:
        triton.knobs.nvidia.ptxas_blackwell = triton.knobs.nvidia.ptxas.path


def _capability() -> int | None:
    """That of the kind of device compiled for; None lets jax-triton ask the GPU; Hopper's where there is none."""
    kind = device_kind()
    for name, capability in _CAPABILITIES.items():
        if name in kind:
            return capability
    return None if jax.default_backend() == "gpu" else 90


def _interpret(
    kernel: Any, inputs: Sequence[Any], out_shape: Any, grid: tuple[int, ...], constants: dict[str, Any]
) -> Any:
    from kernels import _triton_interpreter

    shapes, structure = jax.tree.flatten(out_shape)  # type: tuple[list[Any], Any]

    def run(*arrays: Any) -> Any:
        left = iter(arrays)
        values = [next(left) if _is_array(x) else x for x in inputs]
        return structure.unflatten(_triton_interpreter.run(kernel, values, shapes, grid, constants))

    return jax.pure_callback(run, out_shape, *filter(_is_array, inputs), vmap_method="sequential")


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") and hasattr(x, "shape")
