"""A Hugging Face folder as a network: checked whole before anything is allocated, then filled tensor by tensor."""

import concurrent.futures
import contextlib
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from configs import base, fields, validate
from configs.errors import ConfigError
from models.pretrained import families, reader
from models.pretrained.errors import PretrainedError
from models.pretrained.filling import Filling
from models.pretrained.mapping import Mapped
from models.pretrained.settings import Settings
from models.pretrained.structure import Structure

DTYPES = ("float32", "bfloat16")


class Checkpoint(NamedTuple):
    """A folder whose every part has been checked; nothing of its tensors is read yet."""

    path: pathlib.Path
    hf: dict[str, Any]
    family: Any
    config: ml_collections.ConfigDict
    structure: Structure
    source: reader.Source
    notes: tuple[str, ...]


class Pretrained:
    """A network with what its folder says beside the weights.

    Attributes:
        model: the `DecoderLM`.
        config: its `config.model`.
        tokenizer: `tokenizers.Tokenizer`, or None where the folder has no tokenizer.json.
        generation: the content of generation_config.json.
        hf: the content of config.json.
        layout: the `sharding.Layout` it was placed by, or None.
        notes: what a reader of the folder should know.
    """

    def __init__(self, found: Checkpoint, model: Any, layout: Any) -> None:
        self.model, self.layout, self.config, self.hf, self.notes = model, layout, found.config, found.hf, found.notes
        self.path = found.path
        optional = found.path / "generation_config.json"
        self.generation = reader.read_json(optional) if optional.exists() else {}

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Read when it is first used."""
        return tokenizer_of(self.path)

    def __call__(self, tokens: Int[np.ndarray, "B T"]) -> Float[Array, "B T V"]:
        """Logits for the next token at every position, float32."""
        ids = np.asarray(tokens)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"tokens must be whole numbers [B, T], got {ids.dtype} {list(ids.shape)}")
        if ids.size and (ids.min() < 0 or ids.max() >= self.model.vocab_size):
            raise ValueError(f"tokens has an id outside the vocabulary of {self.model.vocab_size}")
        definition, state = nnx.split(self.model)
        with contextlib.nullcontext() if self.layout is None else self.layout.activate():
            return _logits(definition, state, ids.astype(np.int32))

    def generate(
        self, prompts: str | Sequence[str] | Sequence[Sequence[int]], *, max_new_tokens: int, **options: Any
    ) -> Any:
        """What follows each prompt: texts for texts (one for one), ids for ids; see `models.generate` for the options.

        Where they are not given, stop ids and, if it says to sample, temperature, top_k and top_p are those of
        generation_config.json. Raises PretrainedError for texts without a tokenizer.json.
        """
        if isinstance(prompts, str):
            return self.generate([prompts], max_new_tokens=max_new_tokens, **options)[0]
        if not (prompts and isinstance(prompts[0], str)):
            return self._generated(prompts, max_new_tokens, options)
        if self.tokenizer is None:
            raise PretrainedError(f"{self.path} has no tokenizer.json: give ids instead of texts")
        ids = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        return [self.tokenizer.decode(row) for row in self._generated(ids, max_new_tokens, options)]

    def _generated(self, ids: Any, max_new_tokens: int, options: dict[str, Any]) -> list[list[int]]:
        import models

        with contextlib.nullcontext() if self.layout is None else self.layout.activate():
            return models.generate(self.model, ids, max_new_tokens=max_new_tokens, **self._said() | options)

    def _said(self) -> dict[str, Any]:
        said = self.generation
        stop = said.get("eos_token_id", self.hf.get("eos_token_id"))
        found: dict[str, Any] = {"stop_ids": [stop] if isinstance(stop, int) else stop or []}
        if said.get("do_sample"):
            found["temperature"] = 1.0
            found |= {name: said[name] for name in ("temperature", "top_k", "top_p", "min_p") if said.get(name)}
        return found


@functools.partial(jax.jit, static_argnums=0)
def _logits(definition: Any, state: Any, ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    model = nnx.merge(definition, state)
    return model(ids).logits[..., : model.vocab_size]  # Without the rows that only fill the table up.


def load_pretrained(path: str | os.PathLike[str], dtype: Any = None, mesh: Any = None) -> Pretrained:
    """The network in a Hugging Face folder: config.json and safetensors, whole or in shards.

    Args:
        path: the folder.
        dtype: of parameters and of computation, float32 or bfloat16; by default the tensors' own (float16 and float64
            become float32).
        mesh: a `sharding.Layout` (`sharding.build(config.sharding)`); by default all is on one device.

    Everything is checked before anything is allocated. Then each tensor goes straight into its place on the devices,
    one at a time: the host holds the parts of its own devices and what it has touched of one file.

    Raises:
        PretrainedError: one line that names the file and the tensor or field that is missing, damaged, too much, of
            another shape, or not supported. Code and pickled files in the folder are never run or opened.
        ShardingError: a size that does not divide over the mesh, or anything else than a layout.
    """
    found = check(path, dtype)
    return Pretrained(found, nnx.merge(found.structure.definition, _filled(found, mesh)), mesh)


def check(path: str | os.PathLike[str], dtype: Any = None) -> Checkpoint:
    """The folder, proven to hold a network's tensors, all and no others; see `load_pretrained`."""
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise PretrainedError(f"{folder} is no folder: load_pretrained reads the folder of a downloaded model")
    hf = Settings(reader.read_json(folder / "config.json"), str(folder / "config.json"))
    family = families.find(hf.text("model_type"), hf.where, own_code="auto_map" in hf)
    notes: tuple[str, ...] = ()
    if "auto_map" in hf:
        notes = (f"{hf.where}: auto_map names code of the folder's own; it is not run, the network is built in",)
    if "quantization_config" in hf and not hasattr(family, "tensors"):
        hf.refuse("quantization_config", "is not supported for this model_type: give the weights as they were trained")
    config = model_config(family, hf)
    source: reader.Source = reader.Folder(folder)
    if hasattr(family, "tensors"):
        source = family.tensors(source, hf)
    name = _dtype(source, dtype)
    with config.unlocked():
        config.param_dtype = config.compute_dtype = name
    structure = Structure(config, family.mapping(config))
    structure.check(source.entries, getattr(family, "ignored", lambda hf: ())(hf), folder)
    unread = sorted(source.entries.keys() - structure.shapes.keys())
    if unread:
        notes += (
            f"{folder}: {len(unread)} tensors that the network has no part for are left unread: {unread[0]}, ...",
        )
    return Checkpoint(folder, hf.values, family, config, structure, source, notes)


def model_config(family: Any, hf: Settings) -> ml_collections.ConfigDict:
    """`config.model` as a family reads it from a config.json, checked like any other."""
    chosen = family.config(hf)
    try:
        config = fields.apply(base.get_config(), {f"model.{name}": value for name, value in chosen.items()})
        with config.unlocked():
            config.data.length = min(config.data.length, config.model.max_length)
        validate.check(config)
    except ConfigError as error:
        raise PretrainedError(f"{hf.where} describes a network that cannot be built: {error}") from error
    return fields.from_plain(fields.plain(config.model))


def tokenizer_of(folder: pathlib.Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder, or None; PretrainedError if its file is damaged."""
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises the bare class.
        raise PretrainedError(f"{path} is not a sound tokenizer.json: {error}") from error


def _dtype(source: reader.Source, asked: Any) -> str:
    if asked is not None:
        name = jnp.dtype(asked).name
        if name not in DTYPES:
            raise PretrainedError(f"dtype must be {' or '.join(DTYPES)}, got {name}")
        return name
    sizes: dict[str, int] = {}
    for entry in source.entries.values():
        sizes[entry.dtype.name] = sizes.get(entry.dtype.name, 0) + int(np.prod(entry.shape, dtype=np.int64))
    most = max(sizes, key=sizes.__getitem__, default="float32")
    return most if most in DTYPES else "float32"


def _filled(found: Checkpoint, layout: Any) -> nnx.State:
    """The state of the network, with arrays: file by file, each let go when the last tensor of it has been read."""
    structure, source = found.structure, found.source
    shardings = _shardings(structure, layout)
    names = dict.fromkeys(place.name for one in structure.mapped for place in structure.places(one))
    like = {name: structure.variables[name].get_value() for name in names}
    fillings = {name: Filling(like[name].shape, like[name].dtype, shardings[name]) for name in names}

    def fill(one: Mapped) -> None:
        values = one.read(*(source.read(name) for name in one.theirs))
        for place, value in zip(structure.places(one), values, strict=True):
            fillings[place.name].put(place.at, value)

    steps: dict[tuple[str, ...], list[Mapped]] = {}
    for one in structure.mapped:
        steps.setdefault(tuple(sorted({source.entries[name].file for name in one.theirs})), []).append(one)
    last = {file: files for files in sorted(steps) for file in files}
    # NumPy copies without holding the interpreter, so that all cores read and transpose.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for files in sorted(steps):
            list(pool.map(fill, steps[files]))
            for file in files:
                if last[file] == files:
                    source.release(file)
    return _state(found, {name: filling.finish() for name, filling in fillings.items()}, shardings)


def _shardings(structure: Structure, layout: Any) -> Mapping[str, jax.sharding.Sharding]:
    if layout is None:
        alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return dict.fromkeys(structure.variables, alone)
    placed = nnx.to_flat_state(layout.param_shardings(structure.abstract))
    return {".".join(map(str, path)): variable.get_value() for path, variable in placed}


def _state(found: Checkpoint, arrays: Mapping[str, jax.Array], shardings: Mapping[str, Any]) -> nnx.State:
    """The arrays in their variables, and beside them the constants that the network computes for itself."""
    import models

    structure = found.structure
    rest = [name for name in structure.variables if name not in arrays]
    if rest:

        def constants() -> dict[str, jax.Array]:  # The parameters it also draws are never computed: nothing uses them.
            model = models.build(found.config, vocab_size=structure.vocab_size, rngs=nnx.Rngs(0))
            made = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model))}
            return {name: made[name].get_value() for name in rest}

        arrays = {**arrays, **jax.jit(constants, out_shardings={name: shardings[name] for name in rest})()}
    flat = [
        (path, variable.replace(arrays[".".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(structure.abstract)
    ]
    return nnx.from_flat_state(flat)
