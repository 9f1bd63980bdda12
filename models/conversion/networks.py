"""A network of another attention with the arrays of the one it is made from, layer by layer."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from models import build
from models.decoder import DecoderLM
from models.plan import Spec, layer_specs

Place = tuple[str, int]  # The prefix of a layer's attention among the arrays, and its row in their stacks.
Weights = dict[str, np.ndarray]  # Arrays of one layer's attention by name: "query.weight".


def arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """The arrays of a network by dotted name, on the host."""
    return {name: np.asarray(leaf) for name, leaf in _named(nnx.state(model)).items()}


def places(
    model: DecoderLM, specs: Sequence[Spec] = (), wanted: Callable[[dict[str, Any]], bool] | None = None
) -> dict[int, Place]:
    """All layers, or those whose attention's options in `specs` are `wanted`, in order: number -> place."""
    found = [
        (layer, (f"{prefix}.attention", row))
        for prefix, layers in _blocks(model).items()
        for row, layer in enumerate(layers)
        if wanted is None or wanted(specs[layer]["attention"])
    ]
    return dict(sorted(found))


def layer_arrays(source: Mapping[str, np.ndarray], place: Place) -> Weights:
    """The arrays of one layer's attention among those of `arrays`: views of them."""
    prefix, row = f"{place[0]}.", place[1]
    return {name.removeprefix(prefix): array[row] for name, array in source.items() if name.startswith(prefix)}


def attention_of(model: nnx.Module, place: Place) -> Weights:
    """The same out of the network itself: no other layer is brought to the host."""
    prefix, row = f"{place[0]}.", place[1]
    named = _named(nnx.state(model)).items()
    return {name.removeprefix(prefix): np.asarray(leaf[row]) for name, leaf in named if name.startswith(prefix)}


def like(model: DecoderLM, config: Mapping[str, Any] | None, weights: Mapping[int, Weights]) -> DecoderLM:
    """The network of `config` (None: built as `model` is) whose layers' attentions have these `weights`, cast to what
    the network stores; all other arrays, also those of these attentions that are not named, are the model's.

    Arrays that are wholly the model's are shared with it. The others are taken out of `weights` one by one, so that no
    more than one of them is there twice. `ValueError` for an array that nothing gives, or whose shape is another.
    """
    target = model
    if config is not None:
        target = nnx.eval_shape(lambda: build(config, vocab_size=model.vocab_size, rngs=nnx.Rngs(0)))
    definition, state = nnx.split(target)
    blocks, before = _blocks(target), places(model)
    source = _named(nnx.state(model))

    def made(name: str, wanted: Any) -> Any:
        prefix = next((each for each in blocks if name.startswith(f"{each}.")), None)
        if prefix is None:
            return source[name]
        part = name.removeprefix(f"{prefix}.")
        own, layers = part.removeprefix("attention."), blocks[prefix]
        given = [own != part and own in weights.get(layer, {}) for layer in layers]
        places = [(f"{before[layer][0].removesuffix('.attention')}.{part}", before[layer][1]) for layer in layers]
        for layer, (at, _), has in zip(layers, places, given, strict=True):
            if not has and at not in source:
                raise ValueError(f"nothing gives layer {layer} of the new network its {part}")
        whole = places[0][0]
        if not any(given) and places == [(whole, row) for row in range(len(source[whole]))]:
            return source[whole]
        rows = (
            weights[layer].pop(own) if has else np.asarray(source[at][row])
            for layer, (at, row), has in zip(layers, places, given, strict=True)
        )
        return stacked(rows, wanted.shape, wanted.dtype)

    leaves, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    filled = []
    for path, wanted in leaves:
        filled.append(made(_name(path), wanted))
        if filled[-1].shape != wanted.shape:
            raise ValueError(f"{_name(path)} has shape {wanted.shape}, what is given for it {filled[-1].shape}")
    nnx.replace_by_pure_dict(state, jax.tree_util.tree_unflatten(tree, filled))
    return nnx.merge(definition, state)


def stacked(rows: Iterable[np.ndarray], shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Rows in one array, each cast; memory that XLA takes over as it is, where it is the host's."""
    dtype = np.dtype(dtype)
    size, line = math.prod(shape) * dtype.itemsize, 64  # XLA wants arrays to begin at such a multiple of bytes.
    raw = np.empty(size + line, np.uint8)
    start = -raw.ctypes.data % line
    array = raw[start : start + size].view(dtype).reshape(shape)
    for row, values in enumerate(rows):
        if values.shape != shape[1:]:
            raise ValueError(f"row {row} has shape {values.shape} where {shape[1:]} is wanted")
        array[row] = values
    return jax.device_put(array, may_alias=True)


def with_attention(config: dict[str, Any], new: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """`config.model` with the options of every attention, the shared ones and the exceptions, passed through `new`."""
    exceptions = tuple(
        (blocks, {field: new(value) if field == "attention" else value for field, value in dict(fields).items()})
        for blocks, fields in config["per_layer"]
    )
    return config | dict(attention=new(config["attention"]), per_layer=exceptions)


def with_layers(config: dict[str, Any], attentions: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """`config.model` with these options of the attention in these layers: the first of them for all layers, and
    exceptions for those that have others."""
    specs = layer_specs(config)
    wanted = [attentions.get(layer, spec["attention"]) for layer, spec in enumerate(specs)]
    common = wanted[min(attentions)]
    exceptions: list[tuple[str, dict[str, Any]]] = []
    for blocks, fields in config["per_layer"]:
        rest = {field: value for field, value in dict(fields).items() if field.partition(".")[0] != "attention"}
        exceptions += [(blocks, rest)] if rest else []
    others = [options for i, options in enumerate(wanted) if options != common and options not in wanted[:i]]
    for options in others:
        layers = [layer for layer, each in enumerate(wanted) if each == options]
        exceptions += [(blocks, {"attention": options}) for blocks in _selectors(layers)]
    return config | dict(attention=common, per_layer=tuple(exceptions))


def _selectors(layers: list[int]) -> list[str]:
    """What `per_layer` selects these layers by: one slice, or each by itself."""
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    regular = layers == list(range(layers[0], layers[-1] + 1, step))
    return [f"{layers[0]}:{layers[-1] + 1}:{step}"] if regular and len(layers) > 1 else [str(each) for each in layers]


def plain(value: Any) -> Any:
    """Mappings as plain dictionaries all the way down."""
    return {field: plain(item) for field, item in value.items()} if hasattr(value, "items") else value


def _blocks(model: DecoderLM) -> dict[str, list[int]]:
    """The prefix of each block's arrays -> the layers that are stacked in them."""
    return {
        f"stacks.{s}.blocks.{block}": list(
            range(stack.first + block, stack.first + stack.repeats * stack.period, stack.period)
        )
        for s, stack in enumerate(model.stacks)
        for block in range(stack.period)
    }


def _named(state: nnx.State) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))}


def _name(path: tuple) -> str:
    return ".".join(str(key.key) for key in path)
