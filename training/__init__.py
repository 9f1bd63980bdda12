"""What the loop of `train.py` is made of; each module answers one question.

`state` (what is trained), `step` (how one step changes it), `objectives` and `gradient_rules` (what the step
minimises, and what becomes of its gradients), `optimizers`, `setup` (a config put together), `checkpoints` and
`manifest` (what survives a crash), `run_folder` (what a run leaves behind), `metrics`, `progress` and `profiling` (what
a person sees), `processes` (several hosts, signals), `loading` (a finished run for others).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.loading import LoadedRun, load_run
    from training.state import State

__all__ = ["LoadedRun", "State", "load_run"]

_HOME = {"LoadedRun": "training.loading", "load_run": "training.loading", "State": "training.state"}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that what needs only one module (`--print`, a sweep) does not wait for orbax.
    if name not in _HOME:
        raise AttributeError(f"module 'training' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
