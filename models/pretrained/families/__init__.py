"""The architectures that can be read and written: one module each, found by the `model_type` of a config.json.

A module `families/<name>.py` has

    MODEL_TYPES: tuple[str, ...]
        what it reads; the first one is what it writes by default.
    ARCHITECTURE: str
        the class transformers loads it with ("LlamaForCausalLM"), written as `architectures`.
    def config(hf: Settings) -> dict[str, Any]
        fields of `config.model`, dotted ("width", "attention" for a preset or a whole mapping, "attention.heads",
        "mlp.kind", ...; a tuple gives one value per layer), from a config.json. It refuses (`hf.refuse(field, reason)`)
        what the network cannot represent. Fields it does not name keep the defaults of `configs/base.py`.
    def hf_config(model: Mapping) -> dict[str, Any]
        the reverse: the fields of a config.json. It need not look for what does not fit: `models.pretrained.saving`
        reads the result back through `config` and refuses a network that does not come back the same. Where it cannot
        write anything sensible (another attention) it raises UnsuitedError with the reason.
    def mapping(model: Mapping) -> list[Mapped]
        the tensors of a network of this `config.model`, in the order they are to be written.

and may have

    def ignored(hf: Settings) -> tuple[str, ...]
        regular expressions; tensors that match one whole are left unread where the mapping does not name them
        (buffers that old files carry, a multi-token-prediction layer).
    def tensors(source: Source, hf: Settings) -> Source
        the tensors as the mapping sees them, where they are stored in another form (fp8 with scales): a `reader.Source`
        around the one given.
"""

import importlib
import pkgutil
from typing import Any

from models.pretrained.errors import PretrainedError

# Architectures that are known by name and cannot be read, with the reason.
NOT_YET = {"doge": "its dynamic mask attention is not built yet"}


def names() -> tuple[str, ...]:
    """The families, sorted; helpers shared by them begin with an underscore."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def get(name: str) -> Any:
    """The module of a family."""
    return importlib.import_module(f"models.pretrained.families.{name}")


def by_model_type() -> dict[str, Any]:
    """Every `model_type` that can be read, with its family's module."""
    return {kind: module for module in map(get, names()) for kind in module.MODEL_TYPES}


def find(model_type: str, where: str = "config.json", *, own_code: bool = False) -> Any:
    """The family that reads `model_type`; PretrainedError naming the known ones if there is none. `own_code`: the
    folder would have its own run instead."""
    known = by_model_type()
    if model_type in NOT_YET:
        raise PretrainedError(f"{where}: model_type {model_type!r} cannot be read yet: {NOT_YET[model_type]}")
    if model_type not in known:
        code = " (the code that its auto_map names is never run)" if own_code else ""
        raise PretrainedError(f"{where}: unknown model_type {model_type!r}{code}: known are {', '.join(sorted(known))}")
    return known[model_type]
