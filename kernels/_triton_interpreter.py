"""Triton's interpreter on NumPy buffers: for tests, and to read a kernel step by step, where there is no GPU.

The interpreter that comes with Triton expects torch tensors, takes bfloat16 for 16-bit integers, refuses functions of
libdevice, and must be chosen before Triton is imported. Here kernels that are decorated as usual run as they are.
"""

import contextlib
import functools
import inspect
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_LIBDEVICE: dict[str, Callable[..., Any]] = {
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "cosh": np.cosh,
    "expm1": np.expm1,
    "log1p": np.log1p,
    "pow": np.power,
    "rint": np.rint,
    "round": lambda x: np.trunc(x + np.copysign(np.float32(0.5), x)),  # Halves away from zero.
    "sinh": np.sinh,
    "tan": np.tan,
    "tanh": np.tanh,
}
_lock = threading.Lock()  # The interpreter's state is global.
_np_dtype = interpreter._get_np_dtype


def run(
    kernel: Any, inputs: Sequence[Any], out_shapes: Sequence[Any], grid: tuple[int, ...], constants: dict[str, Any]
) -> list[np.ndarray]:
    """The outputs of a `triton.jit` kernel; memory that it leaves unwritten is NaN, or the least integer.

    Raises: `IndexError` where it reads or writes outside of its buffers.
    """
    values = [np.ascontiguousarray(x) if hasattr(x, "shape") else x for x in inputs]
    values += [_unwritten(shape) for shape in out_shapes]
    bound = inspect.signature(kernel.fn).bind(*values, **constants)
    bound.apply_defaults()
    builder = _Builder([x for x in values if isinstance(x, np.ndarray)])
    with _lock, _installed(builder):
        arguments = {name: x if name in constants else _argument(x) for name, x in bound.arguments.items()}
        function = _rewritten(kernel.fn)
        builder.set_grid_dim(*grid, *[1] * (3 - len(grid)))
        for index in np.ndindex(*builder.grid_dim):
            builder.set_grid_idx(*index)
            function(**arguments)
    return values[len(inputs) :]


class _Builder(interpreter.InterpreterBuilder):
    """Computes bfloat16 and libdevice's functions by NumPy, and knows where buffers begin and end."""

    def __init__(self, buffers: Sequence[np.ndarray]) -> None:
        super().__init__()
        self.options = interpreter.InterpreterOptions(sanitize_overflow=False)  # Integers wrap around, as on a GPU.
        spans = sorted((x.ctypes.data, x.ctypes.data + x.nbytes) for x in buffers)
        self.begins = np.array([begin for begin, _ in spans], np.uint64)
        self.ends = np.array([end for _, end in spans], np.uint64)

    def check(self, pointers: Any, mask: Any) -> None:
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        buffer = np.searchsorted(self.begins, used, side="right") - 1
        outside = (buffer < 0) | (used + size > self.ends[buffer])
        if outside.any():
            raise IndexError(f"{outside.sum()} of {used.size} elements lie outside of the kernel's buffers")

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *options: Any) -> Any:
        self.check(ptrs, mask)
        element = ptrs.get_element_ty()
        dtype = _get_np_dtype(element)
        # What a masked load gives where nothing is said is undefined.
        otherwise = np.full(ptrs.data.shape, _undefined(dtype), dtype) if other is None else other.data
        loaded = interpreter._interpreter.load(ptrs.data, mask.data, _plain(otherwise), _plain(otherwise).dtype)
        return interpreter.TensorHandle(loaded.view(dtype), element)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *options: Any) -> Any:
        self.check(ptrs, mask)
        interpreter._interpreter.store(ptrs.data, _plain(value.data), mask.data)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return interpreter.TensorHandle(src.data.astype(_get_np_dtype(dst_type.scalar)), dst_type.scalar)
        return super().cast_impl(src, dst_type)

    def create_extern_elementwise(
        self, library: str, path: str, symbol: str, arguments: list[Any], result: Any, pure: bool
    ) -> Any:
        name = symbol.removeprefix("__nv_")
        function = _LIBDEVICE.get(name) or _LIBDEVICE.get(name.removesuffix("f"))
        if function is None:
            raise NotImplementedError(f"libdevice's {symbol} in the interpreter")
        return interpreter.TensorHandle(function(*(x.data for x in arguments)), result.scalar)


@contextlib.contextmanager
def _installed(builder: _Builder) -> Iterator[None]:
    """Put this builder, and functions that can be called, in the place of Triton's own."""
    semantic = TritonSemantic(builder)
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (interpreter, "interpreter_builder", builder),
            (interpreter, "interpreter_semantic", semantic),
            (interpreter, "_get_np_dtype", _get_np_dtype),
            (_semantic, "to_tensor", semantic.to_tensor),
            (triton.JITFunction, "__call__", lambda self, *args, **kwargs: _rewritten(self.fn)(*args, **kwargs)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        scope = interpreter._patch_lang(everything)
        stack.callback(scope.restore)
        interpreter._patch_builtin(libdevice, builder, scope)
        scope.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())  # Triton 3.6 means NumPy 1.
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


class _semantic:
    """What rewritten functions know as `interpreter_semantic`: that of the present run."""

    to_tensor: Callable[..., Any] = None


@functools.cache
def _rewritten(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its assignments made Triton's; on a copy of its globals, because the rewriter adds to them."""
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, "interpreter_semantic": _semantic},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, function.__module__
    return interpreter.FunctionRewriter(copy).rewrite_ast()


def _get_np_dtype(dtype: Any) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if getattr(dtype, "scalar", dtype) == tl.bfloat16 else _np_dtype(dtype)


def _plain(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x


def _undefined(dtype: np.dtype) -> Any:
    """What stands for memory with anything in it: NaN, the least integer, False."""
    if dtype.kind in "iu":
        return np.iinfo(dtype).min
    return False if dtype.kind == "b" else np.nan


def _unwritten(shape: Any) -> np.ndarray:
    return np.full(shape.shape, _undefined(np.dtype(shape.dtype)), shape.dtype)


def _argument(value: Any) -> Any:
    """A buffer as a pointer, a number as the scalar a kernel sees."""
    if not isinstance(value, np.ndarray):
        return interpreter._implicit_cvt(value)
    pointer = tl.pointer_type(getattr(tl, "int1" if value.dtype == bool else value.dtype.name))
    return tl.tensor(interpreter.TensorHandle(np.array([value.ctypes.data], np.uint64), pointer), pointer)
