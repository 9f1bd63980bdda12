"""Folders of small networks with known logits: written by `record.py`, rebuilt here without torch."""

import importlib
import json
import pathlib
import pkgutil
import sys
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
import weights  # noqa: E402


class Golden(NamedTuple):
    """What transformers gave: tensors by name with their shapes, and the logits of `tokens`.

    `saved` is config.json as it writes it, `bfloat16` how far its own logits are off in that type, as relative RMS.
    """

    name: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    tokens: np.ndarray
    logits: np.ndarray
    saved: dict[str, Any]
    bfloat16: float


def cases() -> dict[str, dict[str, Any]]:
    """Every case by name, of all modules `cases*.py`."""
    modules = [module.name for module in pkgutil.iter_modules([str(HERE)]) if module.name.startswith("cases")]
    return {name: case for module in sorted(modules) for name, case in importlib.import_module(module).CASES.items()}


def load(name: str) -> Golden:
    """The golden of a case."""
    with np.load(HERE / "goldens" / f"{name}.npz") as found:
        meta = json.loads(str(found["meta"]))
        shapes = {tensor: tuple(shape) for tensor, shape in meta["shapes"].items()}
        numbers = found["tokens"], found["logits"]
        return Golden(name, meta["config"], shapes, *numbers, meta["saved"], meta.get("bfloat16", 0.0))


def tensors(golden: Golden, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Its weights."""
    return {name: weights.weight(name, shape).astype(dtype) for name, shape in golden.shapes.items()}


def folder(
    golden: Golden, path: pathlib.Path, dtype: Any = np.float32, config: dict[str, Any] | None = None
) -> pathlib.Path:
    """Writes its checkpoint."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or golden.config))
    save_file(tensors(golden, dtype), path / "model.safetensors", metadata={"format": "pt"})
    return path
