"""Log-probabilities of given tokens: windows, buckets of shapes, and the one jitted function they all go through."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from evaluation.completion import batch_parts

SHORTEST = 64  # Smallest bucket; buckets double from here up to the window length.


@dataclasses.dataclass(frozen=True)
class Window:
    """`targets[i]` is predicted after `inputs[: i + 1]`; only the last `scored` targets count."""

    inputs: Sequence[int]
    targets: Sequence[int]
    scored: int


def rolling_windows(tokens: Sequence[int], prefix: int, length: int, context: int = 1) -> list[Window]:
    """Windows of at most `length` inputs in which every token of a document is scored exactly once.

    The first window begins with `prefix` (BOS). Later windows score at most `length - context + 1` new tokens, each
    after at least `context` tokens; the last window is shifted left so that it is as long as the others
    (lm-evaluation-harness, `get_rolling_token_windows`). `context=1` scores disjoint windows, the cheapest form;
    `context = length - stride + 1` is the sliding window of stride `stride`.
    """
    if length < 1 or not 1 <= context <= length:
        raise ValueError(f"windows need 1 <= context <= length, got context {context} and length {length}")
    tokens = list(tokens)
    if not tokens:
        return []
    first = min(length, len(tokens))
    windows = [Window([prefix, *tokens[: first - 1]], tokens[:first], first)]
    done, fresh = first, length - context + 1
    while done < len(tokens):
        scored = min(fresh, len(tokens) - done)
        end = done + scored
        windows.append(Window(tokens[end - length - 1 : end - 1], tokens[end - length : end], scored))
        done = end
    return windows


def buckets(lengths: Sequence[int], longest: int, batch_size: int) -> list[int]:
    """The padded length of each window: powers of two times 64, up to `longest`, so that few shapes are compiled.

    A bucket too thin for four batches joins the next larger one in use: a compilation costs more than its padding.
    """
    sizes = [longest]
    while sizes[-1] > SHORTEST:
        sizes.append(max(SHORTEST, (sizes[-1] + 1) // 2))
    sizes = sorted(set(sizes))
    if lengths and max(lengths) > longest:
        raise ValueError(f"a window of {max(lengths)} tokens is longer than {longest}")
    chosen = [next(size for size in sizes if size >= length) for length in lengths]
    used = sorted(set(chosen))
    for size, larger in zip(used, used[1:], strict=False):
        if chosen.count(size) < 4 * batch_size:
            chosen = [larger if have == size else have for have in chosen]
    return chosen


class Scorer:
    """Scores windows in batches of one fixed number of rows.

    The model must not change while the scorer lives. `layout` spreads the rows over its mesh.
    """

    def __init__(self, model: nnx.Module, *, batch_size: int, layout: Any | None = None) -> None:
        self.graph, self.state = nnx.split(model)
        self.layout = layout
        self.batch_size = batch_size
        if layout is not None:
            parts = batch_parts(layout)
            self.batch_size = -(-batch_size // parts) * parts

    def __call__(
        self, windows: Sequence[Window], *, length: int, report: Callable[[int, int], None] | None = None
    ) -> list[tuple[Float[np.ndarray, " n"], np.ndarray]]:
        """For each window, the log-probabilities [scored] of its scored targets and whether each is the likeliest id.

        Natural logarithms, float32. `report(done, total)` is told how many tokens are done.
        """
        sizes = buckets([len(window.inputs) for window in windows], length, self.batch_size)
        results: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(windows)
        done, total = 0, sum(window.scored for window in windows)
        pending: tuple | None = None
        for size in sorted(set(sizes)):
            members = [index for index, have in enumerate(sizes) if have == size]
            for start in range(0, len(members), self.batch_size):
                rows = members[start : start + self.batch_size]
                scores = self._run([windows[index] for index in rows], size)
                if pending is not None:  # Read one batch late: the device works while the host gathers.
                    done += _collect(windows, results, *pending)
                pending = (rows, scores)
                if report is not None:
                    report(done, total)
        if pending is not None:
            done += _collect(windows, results, *pending)
        if report is not None:
            report(done, total)
        return results  # type: ignore[return-value]

    def _run(self, windows: Sequence[Window], size: int) -> tuple[Array, Array]:
        inputs = np.zeros((self.batch_size, size), np.int32)
        targets = np.zeros((self.batch_size, size), np.int32)
        for row, window in enumerate(windows):
            inputs[row, : len(window.inputs)] = window.inputs
            targets[row, : len(window.targets)] = window.targets
        if self.layout is None:
            return score(self.graph, None, self.state, inputs, targets)
        with self.layout.activate():
            sharding = self.layout.batch_sharding(self.batch_size)
            spread = functools.partial(_spread, sharding=sharding)
            return score(self.graph, self.layout.mesh, self.state, spread(inputs), spread(targets))


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(
    graph: nnx.GraphDef, mesh: Any, state: nnx.State, inputs: Int[Array, "B T"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Array]:
    """log p(targets) after each input and whether the target is the argmax, from float32 logits.

    The target's logit is gathered and the normaliser reduced, so nothing of shape [B, T, V] is made beside the logits.
    With a mesh the results are replicated, so that every process can read them.
    """
    logits = nnx.merge(graph, state)(inputs).logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    result = chosen - jax.nn.logsumexp(logits, axis=-1), chosen >= jnp.max(logits, axis=-1)
    if mesh is None:
        return result
    return jax.lax.with_sharding_constraint(result, NamedSharding(mesh, PartitionSpec()))


def _spread(array: np.ndarray, sharding: NamedSharding) -> Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _collect(windows: Sequence[Window], results: list, rows: Sequence[int], scores: tuple[Array, Array]) -> int:
    values, best = (np.asarray(part) for part in scores)
    for row, index in enumerate(rows):
        end = len(windows[index].targets)
        part = slice(end - windows[index].scored, end)
        results[index] = (values[row, part], best[row, part])
    return sum(windows[index].scored for index in rows)
