"""A network run layer by layer over some text, so that no more than one layer of another attention has to exist."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from kernels.tokens import sequence
from layers import attention
from layers.setting import Setting
from models.decoder import DecoderLM

_TOKENS_AT_ONCE = 512


class Stream:
    """The hidden states of rows of text on their way through a network, layer 0 first."""

    def __init__(self, model: DecoderLM, ids: Int[np.ndarray, "N T"]) -> None:
        self.model, self.ids, self.layer = model, ids, 0
        self._blocks = [nnx.split(block) for stack in model.stacks for block in stack.blocks]
        self._places = [
            (at + place, row)
            for at, stack in zip(_starts(model), model.stacks, strict=True)
            for row in range(stack.repeats)
            for place in range(stack.period)
        ]
        rows = max(1, _TOKENS_AT_ONCE // ids.shape[1])
        self.rows = [ids[i : i + rows] for i in range(0, len(ids), rows)]
        self._hidden = [model.embedding(jnp.asarray(some)) for some in self.rows]

    def inputs(self) -> Iterator[Float[np.ndarray, "N D"]]:
        """What the attention of the layer that is next is given, a few rows of text at a time, tokens in one axis."""
        block, row = self._places[self.layer]
        definition, state = self._blocks[block]
        for x in self._hidden:
            normed = np.asarray(_normed(definition, state, row, x), np.float64)
            yield normed.reshape(-1, normed.shape[-1])

    def advance(self, other: tuple[nnx.GraphDef, nnx.State] | None = None) -> None:
        """Through the layer that is next; `other` is the attention in place of its own, split."""
        block, row = self._places[self.layer]
        definition, state = self._blocks[block]
        kind, weights = (None, None) if other is None else other
        for i, x in enumerate(self._hidden):
            self._hidden[i] = _advanced(definition, kind, state, weights, row, x)
        self.layer += 1

    def hidden(self) -> Float[np.ndarray, "N T D"]:
        """The residual stream where it is."""
        return np.concatenate([np.asarray(x) for x in self._hidden])

    def log_probabilities(self) -> Float[np.ndarray, "N T-1 V"]:
        """As `report.log_probabilities`, once all layers are passed."""
        return np.concatenate([np.asarray(_logs(*self._head, x)) for x in self._hidden])

    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per token, once all layers are passed."""
        total = 0.0
        for x, ids in zip(self._hidden, self.rows, strict=True):
            total -= float(np.sum(np.asarray(_chosen(*self._head, x, jnp.asarray(ids))), dtype=np.float64))
        return float(np.exp(total / self.ids[:, 1:].size))

    @functools.cached_property
    def _head(self) -> tuple[nnx.GraphDef, nnx.State]:
        bare = nnx.merge(*nnx.split(self.model))
        bare.stacks = nnx.List([])
        return nnx.split(bare)


def module(
    setting: Setting, options: Mapping[str, Any], weights: Mapping[str, np.ndarray], rope: Callable[[], Any]
) -> tuple[nnx.GraphDef, nnx.State]:
    """A layer of attention with its arrays given, each cast to what it stores; split, for `Stream.advance`. `options`
    are those of its constructor, and `layer`, its name; its positions are what `rope` makes."""
    own = {name: value for name, value in options.items() if name not in ("layer", "rope")}
    kind = attention.get(options["layer"])
    made = nnx.eval_shape(lambda: kind(setting, layer_index=0, rngs=nnx.Rngs(0), rope=rope(), **own))
    definition, state = nnx.split(made)
    leaves, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    arrays = []
    for path, wanted in leaves:
        name = ".".join(str(key.key) for key in path)
        if weights[name].shape != wanted.shape:
            raise ValueError(f"{name} has shape {wanted.shape}, what is given for it {weights[name].shape}")
        arrays.append(jnp.asarray(weights[name].astype(wanted.dtype)))
    nnx.replace_by_pure_dict(state, jax.tree_util.tree_unflatten(tree, arrays))
    return definition, state


def _starts(model: DecoderLM) -> list[int]:
    return list(np.cumsum([0, *(stack.period for stack in model.stacks)])[:-1])


def _one(state: nnx.State, row: int | jax.Array) -> nnx.State:
    return jax.tree.map(lambda leaf: leaf[row], state)


@functools.partial(jax.jit, static_argnums=0)
def _normed(definition: nnx.GraphDef, state: nnx.State, row: int, x: jax.Array) -> jax.Array:
    return nnx.merge(definition, _one(state, row)).attention_norm(x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advanced(
    definition: nnx.GraphDef,
    other: nnx.GraphDef | None,
    state: nnx.State,
    weights: nnx.State | None,
    row: int,
    x: jax.Array,
) -> jax.Array:
    block = nnx.merge(definition, _one(state, row))
    if other is not None:
        block.attention = nnx.merge(other, weights)
    return block(x, sequence(x.shape[1]), None, None, 0)[0]


@functools.partial(jax.jit, static_argnums=0)
def _logs(definition: nnx.GraphDef, state: nnx.State, x: jax.Array) -> jax.Array:
    model = nnx.merge(definition, state)
    return jax.nn.log_softmax(model.unembed(model.norm(x))[:, :-1, : model.vocab_size])


@functools.partial(jax.jit, static_argnums=0)
def _chosen(definition: nnx.GraphDef, state: nnx.State, x: jax.Array, ids: jax.Array) -> jax.Array:
    model = nnx.merge(definition, state)
    logs = jax.nn.log_softmax(model.unembed(model.norm(x))[:, :-1, : model.vocab_size])
    return jnp.take_along_axis(logs, ids[:, 1:, None], axis=-1)[..., 0]
