"""The compiled programs: log-probabilities of continuations, each by itself or several behind one cached context."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from evaluation.completion import batch_parts
from evaluation.harness import plan
from kernels.tokens import Tokens, sequence
from models.decoder import DecoderLM

LOGITS = 1 << 24  # float32 logits that a device holds at a time.

Scores = tuple[Float[np.ndarray, " n"], np.ndarray]  # Log-probability of each token, and whether it is the likeliest.
Read = Callable[[], Iterator[tuple[int, list[Scores]]]]


class Device:
    """A model where it lies, and how the rows of a batch get there; `layout` None is one device.

    With several processes each of them must run the same programs in the same order; results come back whole.
    """

    def __init__(self, model: DecoderLM, layout: Any | None = None) -> None:
        self.graph, self.state = nnx.split(model)
        self.layout, self.mesh = layout, None if layout is None else layout.mesh
        self.parts = 1 if layout is None else batch_parts(layout)
        self.vocab_size, self.max_length = model.vocab_size, model.setting.max_length
        self.programs: set[tuple] = set()  # What was compiled, for those who count.

    def run(self, program: Callable, static: tuple, *given: Any) -> Any:
        """`program(graph, mesh, *static, state, *given)`; NumPy arrays [B, ...] are spread over the mesh."""
        rows = [isinstance(item, np.ndarray) for item in given]
        shapes = (item.shape for item, row in zip(given, rows, strict=True) if row)
        self.programs.add((program, static, *shapes))
        with contextlib.nullcontext() if self.layout is None else self.layout.activate():
            spread = (self._spread(item) if row else item for item, row in zip(given, rows, strict=True))
            return program(self.graph, self.mesh, *static, self.state, *spread)

    def _spread(self, array: np.ndarray) -> Any:
        """An array [B, ...] that every process has whole, each device holding its rows."""
        if self.layout is None:
            return array
        sharding = self.layout.batch_sharding(len(array))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def chunk(self, rows: int) -> int:
        """Positions of `rows` rows whose logits are made at a time."""
        return max(1, LOGITS // (-(-rows // self.parts) * self.vocab_size))


class ContinuationScorer:
    """Scores continuations of contexts in batches of few shapes (see `plan`).

    A continuation alone is one row, of which only the scored positions are projected on the vocabulary. Several of one
    context are prefilled once: first tokens come from the context's last position, the rest from copies of its cache.
    """

    def __init__(self, device: Device, *, batch_size: int) -> None:
        """`batch_size` rows, or 0 for as many as make `plan.TOKENS`."""
        self.device, self.batch_size = device, batch_size

    def __call__(self, groups: Sequence[plan.Group]) -> Iterator[tuple[int, list[Scores]]]:
        """(which group, for each of its continuations the log-probabilities of its tokens and which are argmax), as
        they are found. Natural logarithms, float32."""
        for run, alone in ((self._alone, True), (self._shared, False)):
            members = [index for index, group in enumerate(groups) if (len(group.continuations) == 1) == alone]
            for read in _one_late(run([groups[index] for index in members])):
                for place, scores in read():
                    yield members[place], scores

    def _alone(self, groups: Sequence[plan.Group]) -> Iterator[Read]:
        """Runs groups of one; each batch comes as a function that reads what it found."""
        longest = self.device.max_length
        shapes = []
        for group in groups:
            scored = group.longest
            length = plan.ladder(len(group.context) + scored - 1, longest)
            shapes.append((length, min(length, plan.ladder(scored, longest))))
        for batch in plan.batches(shapes, (1, 1), batch_size=self.batch_size, parts=self.device.parts):
            length, scored = batch.shape
            inputs = np.zeros((batch.rows, length), np.int32)
            places, targets = np.zeros((2, batch.rows, scored), np.int32)
            for row, index in enumerate(batch.members):
                context, ids = groups[index].context, groups[index].continuations[0]
                whole = (*context, *ids[:-1])
                inputs[row, : len(whole)] = whole
                places[row, : len(ids)] = np.arange(len(context) - 1, len(whole))
                targets[row, : len(ids)] = ids
            found = self.device.run(_rows, (self.device.chunk(batch.rows),), inputs, places, targets)
            yield functools.partial(_read_rows, batch, groups, found)

    def _shared(self, groups: Sequence[plan.Group]) -> Iterator[Read]:
        """Runs groups of several, as `_alone` does."""
        if not groups:
            return
        longest, size = self.device.max_length, max(len(group.continuations) for group in groups)
        shapes = []
        for group in groups:
            rest = group.longest - 1
            shapes.append((plan.ladder(len(group.context), longest), plan.ladder(rest, longest) if rest else 0))
        rows = max(1, self.batch_size // size) if self.batch_size else 0
        for batch in plan.batches(shapes, (1, size), batch_size=rows, parts=self.device.parts, copies=size):
            length, after = batch.shape
            context, lengths = np.zeros((batch.rows, length), np.int32), np.ones(batch.rows, np.int32)
            first = np.zeros((batch.rows, size), np.int32)
            inputs, targets = np.zeros((2, batch.rows, size, after), np.int32)
            counts = np.zeros((batch.rows, size), np.int32)
            for row, index in enumerate(batch.members):
                group = groups[index]
                context[row, : len(group.context)], lengths[row] = group.context, len(group.context)
                for column, ids in enumerate(group.continuations):
                    first[row, column], counts[row, column] = ids[0], len(ids) - 1
                    inputs[row, column, : len(ids) - 1] = ids[:-1]
                    targets[row, column, : len(ids) - 1] = ids[1:]
            chunk = (self.device.chunk(batch.rows * size),)
            found = self.device.run(_branches, chunk, context, lengths, first, inputs, targets, counts)
            yield functools.partial(_read_branches, batch, groups, found)


def _one_late(batches: Iterator[Read]) -> Iterator[Read]:
    """Every batch after the next one was started: the device works while the host reads."""
    before = None
    for batch in batches:
        if before is not None:
            yield before
        before = batch
    if before is not None:
        yield before


def _read_rows(batch: plan.Batch, groups: Sequence[plan.Group], found: tuple) -> Iterator[tuple[int, list[Scores]]]:
    values, best = map(np.asarray, found)
    for row, index in enumerate(batch.members):
        ids = groups[index].continuations[0]
        yield index, [(values[row, : len(ids)], best[row, : len(ids)] == ids)]


def _read_branches(batch: plan.Batch, groups: Sequence[plan.Group], found: tuple) -> Iterator[tuple[int, list[Scores]]]:
    first, likeliest, values, best = map(np.asarray, found)
    for row, index in enumerate(batch.members):
        scores = []
        for column, ids in enumerate(groups[index].continuations):
            rest = np.s_[row, column, : len(ids) - 1]
            chosen = np.concatenate([likeliest[row : row + 1], best[rest]])
            scores.append((np.concatenate([first[row, column : column + 1], values[rest]]), chosen == ids))
        yield index, scores


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rows(
    graph: nnx.GraphDef, mesh: Any, chunk: int, state: nnx.State, inputs: Int[Array, "B T"],
    places: Int[Array, "B C"], targets: Int[Array, "B C"],
) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:  # fmt: skip
    """log p(targets) at the given places of each row, and the likeliest ids there."""
    model = nnx.merge(graph, state)
    hidden, _, _ = model.backbone(model.embedding(inputs), sequence(inputs.shape[1]))
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    values, best = _log_probs(model, hidden, targets[..., None], chunk)
    return whole(mesh, (values[..., 0], best))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _branches(
    graph: nnx.GraphDef, mesh: Any, chunk: int, state: nnx.State, context: Int[Array, "G T"], lengths: Int[Array, " G"],
    first: Int[Array, "G K"], inputs: Int[Array, "G K S"], targets: Int[Array, "G K S"], counts: Int[Array, "G K"],
) -> tuple[Float[Array, "G K"], Int[Array, " G"], Float[Array, "G K S"], Int[Array, "G K S"]]:  # fmt: skip
    """log p of K first tokens after each context, of the tokens after them, and the likeliest ids at both."""
    model = nnx.merge(graph, state)
    many, after = inputs.shape[1:]
    index = sequence(context.shape[1]).index
    told = Tokens(index=index, valid=jnp.asarray(index) < lengths[:, None])
    caches = model.init_caches(len(context), context.shape[1] + after) if after else None
    hidden, caches, _ = model.backbone(model.embedding(context), told, caches)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    found, likeliest = _log_probs(model, last, first[:, None], 1)
    if not after:
        empty = jnp.zeros(inputs.shape)
        return whole(mesh, (found[:, 0], likeliest[:, 0], empty, empty.astype(jnp.int32)))
    # Rows of one context stay together, so that copying a cache moves nothing between devices.
    caches = jax.tree.map(lambda leaf: jnp.repeat(leaf, many, axis=0), caches)
    step = jnp.arange(after, dtype=jnp.int32)
    told = Tokens(index=caches.length[:, None] + step, valid=step < counts.reshape(-1, 1))
    hidden, _, _ = model.backbone(model.embedding(inputs.reshape(-1, after)), told, caches)
    values, best = _log_probs(model, hidden, targets.reshape(-1, after, 1), chunk)
    return whole(mesh, (found[:, 0], likeliest[:, 0], values[..., 0].reshape(inputs.shape), best.reshape(inputs.shape)))


def _log_probs(
    model: DecoderLM, hidden: Float[Array, "B T D"], targets: Int[Array, "B T M"], chunk: int
) -> tuple[Float[Array, "B T M"], Int[Array, "B T"]]:
    """log p of M targets at every position, and the likeliest ids (the first of ties), from float32 logits.

    The logits of `chunk` positions are made at a time, so nothing of shape [B, T, V] is ever there.
    """

    def some(part: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = model.unembed(part[0])
        chosen = jnp.take_along_axis(logits, part[1], axis=-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True), jnp.argmax(logits, axis=-1)

    length = hidden.shape[1]
    if length <= chunk:
        return some((hidden, targets))
    pieces = -(-length // chunk)

    def cut(array: Array) -> Array:
        padded = jnp.pad(array, ((0, 0), (0, pieces * chunk - length), (0, 0)))
        return jnp.moveaxis(padded.reshape(len(array), pieces, chunk, -1), 1, 0)

    def join(array: Array) -> Array:
        array = jnp.moveaxis(array, 0, 1)
        return array.reshape(len(array), pieces * chunk, *array.shape[3:])[:, :length]

    values, best = jax.lax.map(some, (cut(hidden), cut(targets)))
    return join(values), join(best)


def whole(mesh: Any, tree: Any) -> Any:
    """Replicated over the mesh, so that every process can read it."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))
