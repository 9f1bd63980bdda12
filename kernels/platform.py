"""Which device kernels are traced for: the default one, another by name, or an interpreter on CPU.

All three are read while a function is traced; a function that is already compiled stays what it is.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_target: ContextVar[tuple[str, str] | None] = ContextVar("target", default=None)
_interpreted: ContextVar[bool] = ContextVar("interpreted", default=False)


@contextlib.contextmanager
def compiling_for(platform: str, kind: str = "") -> Iterator[None]:
    """Trace for another platform ("cpu", "gpu", "tpu") than this machine's, as compilation ahead of time does.

    `kind` is the device's kind ("TPU v5e", "NVIDIA H200"), by which block sizes are chosen.
    """
    token = _target.set((platform, kind))
    try:
        yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Run named kernels of other platforms in their interpreters on CPU: slow, exact, for tests and for learning."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def interpreting() -> bool:
    """Whether kernels are to be interpreted."""
    return _interpreted.get()


def default_platform() -> str:
    """The platform work goes to: that of `jax_default_device` where it is set, else of the default backend."""
    if _target.get() is not None:
        return _target.get()[0]
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def device_kind() -> str:
    """The kind of the device work goes to, such as "NVIDIA H200"; "" where it is not known."""
    if _target.get() is not None:
        return _target.get()[1]
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device.device_kind


def not_hopper() -> str | None:
    """Why kernels made for Hopper GPUs will not do where work goes to, if so."""
    kind = device_kind()
    if default_platform() == "gpu" and not any(name in kind for name in ("H100", "H200", "H800", "H20", "GH200")):
        return f"it is made for Hopper GPUs, not for {kind or 'an unknown device'}"
    return None
