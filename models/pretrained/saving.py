"""A network as a Hugging Face folder, written aside and put in place whole."""

import json
import math
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from layers.rope import Rope
from models.plan import layer_specs
from models.pretrained import families, reader, tokens
from models.pretrained.errors import PretrainedError, UnsuitedError
from models.pretrained.loading import model_config
from models.pretrained.mapping import Mapped
from models.pretrained.settings import Settings
from models.pretrained.structure import Place, Structure

_WRITABLE = ("float32", "bfloat16", "float16")
# What does not change the function that a network computes.
_FREE = ("vocab_multiple", "param_dtype", "compute_dtype", "scan_layers", "remat", "attention_implementation",
         "per_layer", "attention", "mlp", "norm", "residual")  # fmt: skip


def save_pretrained(
    model: Any,
    config: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    generation: Mapping[str, Any] | None = None,
    max_shard_size: int = 5 * 10**9,
    family: str = "",
) -> None:
    """Writes `model`, a network of `config` (its `config.model`), as a Hugging Face folder.

    Args:
        path: the folder; there must be nothing of that name yet.
        tokenizer: of this framework, of the `tokenizers` library, or a folder that has one; None writes none.
        generation: what generation_config.json says beside the tokenizer's special ids.
        max_shard_size: bytes of tensors in one file, unless a single tensor is larger.
        family: the `model_type` to write; by default the first whose networks are like this one.

    Tensors are written as they are, bit for bit, in the type of the parameters.

    Raises:
        PretrainedError: the folder exists, or no architecture that can be written computes what this network does.
    """
    target = pathlib.Path(path)
    if target.exists() or target.is_symlink():
        raise PretrainedError(f"{target} exists already: give another folder, nothing is overwritten")
    module, hf = describe(dict(config) | {"vocab_size": model.vocab_size}, family)
    structure = Structure(hf["config"], module.mapping(hf["config"]))
    values = dict(_named(nnx.to_flat_state(nnx.state(model))))
    dtype = np.dtype(values[structure.places(structure.mapped[0])[0].name].dtype).name
    if dtype not in _WRITABLE:
        raise PretrainedError(f"parameters of type {dtype} cannot be written: only {', '.join(_WRITABLE)}")
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        scratch.mkdir(parents=True)
        _write_tensors(scratch, structure, values, max_shard_size)
        special = tokens.write(tokenizer, scratch)
        content = {"architectures": [module.ARCHITECTURE], **hf["fields"], "dtype": dtype, **special}
        _write_json(scratch / "config.json", content)
        if special or generation:
            _write_json(scratch / "generation_config.json", {**special, **(generation or {})})
        os.rename(scratch, target)
    except OSError as error:
        raise PretrainedError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def describe(config: Mapping[str, Any], family: str = "") -> tuple[Any, dict[str, Any]]:
    """The family that writes a network of this `config.model`, with the `fields` of its config.json and the `config`
    that those mean.

    A family describes a network if what it writes, read back, is the same network. Raises PretrainedError with the
    reason of the family asked for, or of all of them.
    """
    known = families.by_model_type()
    chosen = [families.find(family, "family")] if family else [families.get(name) for name in _order(known)]
    reasons = []
    for module in chosen:
        kind = family or module.MODEL_TYPES[0]
        try:
            fields = {"model_type": kind, **module.hf_config(config)}
            read = model_config(module, Settings(json.loads(json.dumps(fields)), f"{kind} config.json"))
            _same(config, read)
        except (UnsuitedError, PretrainedError) as error:
            reasons.append(f"{kind}: {error}")
        else:
            return module, {"fields": fields, "config": dict(read)}
    raise PretrainedError(f"no architecture that can be written is this network ({'; '.join(reasons)})")


def _order(known: Mapping[str, Any]) -> list[str]:
    """The plainest first."""
    plain = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
    return [name for name in plain if name in families.names()] + [n for n in families.names() if n not in plain]


def _same(config: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """UnsuitedError, naming the first difference, unless both are the same network."""
    pairs = [("", _top(config), _top(read))]
    ours, theirs = layer_specs(config), layer_specs(read)
    pairs += [(f" of layer {i}", _spec(a), _spec(b)) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    for where, mine, back in pairs:
        for name in sorted(mine.keys() | back.keys()):
            if not _equal(mine.get(name), back.get(name)):
                raise UnsuitedError(f"it cannot say {name} = {mine.get(name)!r}{where}, only {back.get(name)!r}")


def _top(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _FREE}


def _spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's fields, dotted, in one form for what is the same; fields that have no effect are left out."""
    attention = dict(spec["attention"])
    rope = Rope(**attention.pop("rope")) if "rope" in attention else None
    if attention["layer"] == "mha":
        attention["value_dim"] = attention["value_dim"] or attention["head_dim"]
        attention["scale"] = attention["scale"] or attention["head_dim"] ** -0.5
        if not attention["qk_norm"]:
            del attention["norm_epsilon"]
    if rope is not None:
        attention |= {f"rope.{name}": value for name, value in _rope(rope).items()}
    mlp, experts = dict(spec["mlp"]), dict(spec["mlp"].get("experts", {"count": 0}))
    mlp.pop("experts", None)
    found = {"attention": attention, "mlp": mlp, "norm": spec["norm"], "residual": spec["residual"]}
    if experts["count"]:
        found["mlp.experts"] = experts
    return {f"{part}.{name}": value for part, fields in found.items() for name, value in fields.items()}


def _rope(rope: Rope) -> dict[str, Any]:
    if not rope.theta:
        return {"theta": 0.0}
    found = {name: getattr(rope, name) for name in ("theta", "layout", "share", "scaling")}
    if rope.scaling != "none":
        found["factor"] = rope.factor
    if rope.scaling in ("yarn", "llama3"):
        found["original_length"] = rope.original_length
    if rope.scaling == "llama3":
        found |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        found |= {name: getattr(rope, name) for name in ("beta_fast", "beta_slow", "amplitude")}
    return found


def _equal(mine: Any, back: Any) -> bool:
    if isinstance(mine, float) and isinstance(back, float):
        return math.isclose(mine, back, rel_tol=1e-12)
    return mine == back


def _write_tensors(folder: pathlib.Path, structure: Structure, values: Mapping[str, Any], largest: int) -> None:
    shards = _shards(structure, values, largest)
    files = [reader.WHOLE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    index: dict[str, str] = {}
    total = 0
    for file, shard in zip(files, shards, strict=True):
        made: dict[str, np.ndarray] = {}
        for one in shard:
            ours = [_host(values[place.name], structure, place) for place in structure.places(one)]
            made |= zip(one.theirs, map(np.ascontiguousarray, one.write(*ours)), strict=True)
        save_file(made, folder / file, metadata={"format": "pt"})
        os.chmod(folder / file, 0o644)
        index |= dict.fromkeys(made, file)
        total += sum(array.nbytes for array in made.values())
    if len(shards) > 1:
        _write_json(folder / reader.INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _shards(structure: Structure, values: Mapping[str, Any], largest: int) -> list[list[Mapped]]:
    """What goes into each file, in the mapping's order."""
    shards: list[list[Mapped]] = [[]]
    held = 0
    for one in structure.mapped:
        itemsize = values[structure.places(one)[0].name].dtype.itemsize
        size = sum(math.prod(structure.shapes[name]) for name in one.theirs) * itemsize
        if shards[-1] and held + size > largest:
            shards.append([])
            held = 0
        shards[-1].append(one)
        held += size
    return shards


def _host(array: jax.Array, structure: Structure, place: Place) -> np.ndarray:
    """One array of the network, without rows of tables that stand for no token, on the host."""
    if not array.is_fully_addressable:
        raise PretrainedError("the network is spread over several processes: load it in one of them to export it")
    # On one CPU device the whole is seen as it lies; elsewhere only this row of it is fetched.
    alone = len(array.devices()) == 1 and next(iter(array.devices())).platform == "cpu"
    found = np.asarray(array)[place.at] if alone else np.asarray(array[place.at] if place.at else array)
    return found[tuple(map(slice, structure.shape(place)))]


def _named(flat: Iterable[tuple[tuple, Any]]) -> Iterable[tuple[str, Any]]:
    return ((".".join(map(str, path)), variable.get_value()) for path, variable in flat)


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
