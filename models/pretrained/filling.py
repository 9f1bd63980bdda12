"""Arrays that are filled piece by piece where they are to be used, so that nothing is ever held twice."""

import contextlib
import functools
import math
import mmap
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_STRIP = 16  # Stored rows that are transposed at a time: 32 bytes of bfloat16 side by side, for the caches' sake.


class Filling:
    """An array, zero at first, laid out by `sharding`; every device holds its own part and nothing else is allocated.

    On the host's own devices the parts are memory that becomes the array; on others they are arrays that one piece
    after the other is written into, in place.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding) -> None:
        self.shape, self.dtype, self.sharding = shape, np.dtype(dtype), sharding
        self._parts: dict[Any, _Part] = {}
        places: dict[Any, Any] = dict(sharding.addressable_devices_indices_map(shape))
        for device, index in places.items():
            bounds = tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
            kind = _HostPart if device.platform == "cpu" else _DevicePart
            self._parts[device] = kind(bounds, self.dtype, device)

    def put(self, index: tuple[int, ...], value: np.ndarray) -> None:
        """Sets [index] to `value`, or its leading part where `value` is smaller; only what the devices hold is read."""
        for part in self._parts.values():
            held = part.bounds[: len(index)]
            if not all(start <= i < stop for i, (start, stop) in zip(index, held, strict=True)):
                continue
            spans = part.bounds[len(index) :]
            spans = tuple((start, min(stop, size)) for (start, stop), size in zip(spans, value.shape, strict=True))
            if all(start < stop for start, stop in spans):
                local = tuple(i - start for i, (start, _) in zip(index, held, strict=True))
                part.put(local, value[tuple(slice(*span) for span in spans)])

    def finish(self) -> jax.Array:
        """The array."""
        arrays = [part.finish() for part in self._parts.values()]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


class _Part:
    """What one device holds: per axis (first, last + 1)."""

    def __init__(self, bounds: tuple[tuple[int, int], ...], dtype: np.dtype, device: jax.Device) -> None:
        self.bounds, self.dtype, self.device = bounds, dtype, device
        self.shape = tuple(stop - start for start, stop in bounds)

    def put(self, index: tuple[int, ...], value: np.ndarray) -> None:
        raise NotImplementedError

    def finish(self) -> jax.Array:
        raise NotImplementedError


class _HostPart(_Part):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        size = math.prod(self.shape) * self.dtype.itemsize
        # Whole pages, which XLA takes over as they are; they exist from the first write to them on.
        pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(
            OSError
        ):  # Large pages where there are such: taking small ones costs more than a copy.
            pages.madvise(mmap.MADV_HUGEPAGE)
        self._memory: np.ndarray = np.ndarray(self.shape, self.dtype, pages)

    def put(self, index: tuple[int, ...], value: np.ndarray) -> None:
        copy(self._memory[index][tuple(map(slice, value.shape))], value)

    def finish(self) -> jax.Array:
        return jax.device_put(self._memory, self.device, may_alias=True)


class _DevicePart(_Part):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._array = jnp.zeros(self.shape, self.dtype, device=self.device)
        self._lock = threading.Lock()

    def put(self, index: tuple[int, ...], value: np.ndarray) -> None:
        piece = jax.device_put(value[(None,) * len(index)], self.device)
        start = (*index, *(0,) * value.ndim)
        with self._lock:  # What is written into is given away.
            self._array = _written(self._array, piece, np.array(start, np.int32))

    def finish(self) -> jax.Array:
        return self._array


@functools.partial(jax.jit, donate_argnums=0)
def _written(whole: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, piece.astype(whole.dtype), tuple(start))


def copy(target: np.ndarray, value: np.ndarray) -> None:
    """target[...] = value, in the target's type; in strips where value is the transpose of what lies in memory."""
    if value.dtype == target.dtype and value.dtype.itemsize == 2:
        value, target = value.view(np.uint16), target.view(np.uint16)  # Moved faster than a type from elsewhere.
    if value.ndim < 2 or value.strides[-2] >= value.strides[-1]:
        np.copyto(target, value, casting="unsafe")
        return
    for row in range(0, value.shape[-1], _STRIP):
        np.copyto(target[..., row : row + _STRIP], value[..., row : row + _STRIP], casting="unsafe")
