"""The suite runs on eight CPU devices; what uses one of them runs as fast as it would alone."""

import importlib.util
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()


def _find_cuda_plugin() -> None:
    """Lets jax-triton be imported without a GPU: the plugin lies in a folder of its own (see tools/environment)."""
    folder = pathlib.Path(sys.prefix) / "cuda-plugin"
    if folder.exists() and importlib.util.find_spec("jax_cuda12_plugin") is None:
        import jaxlib.gpu_triton

        sys.path.append(str(folder))
        importlib.reload(jaxlib.gpu_triton)


_find_cuda_plugin()
