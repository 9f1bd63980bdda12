"""XLA's flags for the tests' own process, and for those that they start."""

import importlib.metadata

# XLA's older way to emit fused loops compiles in half the time, and compiling is most of what tests do; newer versions
# do not have it. The notebooks run with what users get.
QUICK = ["--xla_cpu_use_fusion_emitters=false"] if importlib.metadata.version("jaxlib").startswith("0.10.") else []


def xla(devices: int = 1, given: str = "") -> str:
    """So many CPU devices, and quick compilation, where the flags that are `given` do not say otherwise."""
    wanted = [f"--xla_force_host_platform_device_count={devices}", *QUICK]
    return " ".join([given, *(flag for flag in wanted if flag.partition("=")[0] not in given)]).strip()
