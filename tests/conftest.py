"""The suite runs on eight CPU devices; what uses one of them runs as fast as it would alone."""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = {"--xla_force_host_platform_device_count": "8"}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # XLA's older way to emit fused loops compiles in half the time, and compiling is most of what tests do; newer
    # versions do not have it. The commands of the documents and the notebooks run with what users get.
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()


def _find_cuda_plugin() -> None:
    """Lets jax-triton be imported without a GPU: the plugin lies in a folder of its own (see tools/environment)."""
    folder = pathlib.Path(sys.prefix) / "cuda-plugin"
    if folder.exists() and importlib.util.find_spec("jax_cuda12_plugin") is None:
        import jaxlib.gpu_triton

        sys.path.append(str(folder))
        importlib.reload(jaxlib.gpu_triton)


_find_cuda_plugin()
