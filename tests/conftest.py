"""The suite runs on eight CPU devices; what uses one of them runs as fast as it would alone."""

import importlib.util
import os
import pathlib
import sys

import flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = flags.xla(8, os.environ.get("XLA_FLAGS", ""))


def _find_cuda_plugin() -> None:
    """Lets jax-triton be imported without a GPU: the plugin lies in a folder of its own (see tools/environment)."""
    folder = pathlib.Path(sys.prefix) / "cuda-plugin"
    if folder.exists() and importlib.util.find_spec("jax_cuda12_plugin") is None:
        import jaxlib.gpu_triton

        sys.path.append(str(folder))
        importlib.reload(jaxlib.gpu_triton)


_find_cuda_plugin()
