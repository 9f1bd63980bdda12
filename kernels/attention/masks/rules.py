"""Masks that are rules on what is known about tokens: order, document, modality, frame, head."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kernels.attention.masks.base import Everything, Mask, array, expression
from kernels.attention.masks.intervals import Truth
from kernels.tokens import Tokens


@expression
class Causal(Mask):
    reads = ("q.index", "k.index")

    def rule(self, q: Any, k: Any) -> Any:
        return q.index >= k.index


@expression
class SlidingWindow(Mask):
    size: int
    name = "sliding_window"
    reads = ("q.index", "k.index")

    def rule(self, q: Any, k: Any) -> Any:
        return q.index - k.index < self.size


@expression
class SinkTokens(Mask):
    count: int
    name = "sink_tokens"
    reads = ("k.index", "k.start")

    def rule(self, q: Any, k: Any) -> Any:
        return k.index - k.start < self.count


@expression
class Segments(Mask):
    reads = ("q.segment", "k.segment")

    def rule(self, q: Any, k: Any) -> Any:
        return q.segment == k.segment


@expression
class Valid(Mask):
    reads = ("k.valid",)

    def rule(self, q: Any, k: Any) -> Any:
        return k.valid


@expression
class Prefix(Mask):
    reads = ("k.prompt",)

    def rule(self, q: Any, k: Any) -> Any:
        return k.prompt


@expression
class Predicate(Mask):
    function: Callable[[Any, Any], Any]
    by_block: bool
    reads: tuple[str, ...] = ()

    def rule(self, q: Any, k: Any) -> Any:
        return self.function(q, k)

    def block_rule(self, q: Any, k: Any) -> Truth:
        return Truth.of(self.function(q, k)) if self.by_block else Truth.unknown()

    def __repr__(self) -> str:
        return f"predicate({getattr(self.function, '__name__', self.function)})"


@expression
class Frames(Mask):
    reads = ("q.frame", "k.frame")

    def rule(self, q: Any, k: Any) -> Any:
        return (q.frame == k.frame) & (q.frame >= 0)


@expression
class AcrossModalities(Mask):
    queries: int | None
    keys: int | None
    name = "across_modalities"
    reads = ("q.modality", "k.modality", "k.prompt")

    def rule(self, q: Any, k: Any) -> Any:
        answer = (q.modality != k.modality) & k.prompt
        answer = answer if self.queries is None else answer & (q.modality == self.queries)
        return answer if self.keys is None else answer & (k.modality == self.keys)


@expression
class Composite(Mask):
    modality: int
    reads = ("q.index", "k.index", "q.modality")

    def rule(self, q: Any, k: Any) -> Any:
        return (q.modality != self.modality) | (q.index == k.index)


@expression
class HeadWindows(Mask):
    sizes: Array = array()
    sinks: Array = array()
    name = "head_windows"
    reads = ("q.index", "k.index", "k.start")

    def extra(self, side: str, length: int) -> dict[str, Array]:
        if side == "k":
            return {}
        per_head = {"head_window": self.sizes, "head_sinks": self.sinks}
        return {
            name: (np if isinstance(x, np.ndarray) else jnp).broadcast_to(x[None, :, None], (1, x.shape[0], length))
            for name, x in per_head.items()
        }

    def rule(self, q: Any, k: Any) -> Any:
        return (q.index - k.index < q.head_window) | (k.index - k.start < q.head_sinks)


def everything() -> Mask:
    """Every query attends to every key."""
    return Everything()


def causal() -> Mask:
    """Keys that do not come after the query: q.index >= k.index."""
    return Causal()


def sliding_window(size: int) -> Mask:
    """Keys less than `size` before the query (the query's own place counts); alone it does not hide the future."""
    if size < 1:
        raise ValueError(f"sliding_window needs a size of at least 1, not {size}")
    return SlidingWindow(int(size))


def sink_tokens(count: int) -> Mask:
    """The first `count` keys of each document (StreamingLLM, Xiao et al. 2023)."""
    if count < 0:
        raise ValueError(f"sink_tokens needs a count of at least 0, not {count}")
    return SinkTokens(int(count))


def segments() -> Mask:
    """Keys of the query's own packed document."""
    return Segments()


def valid() -> Mask:
    """Keys that are no padding."""
    return Valid()


def prefix(length: int | None = None) -> Mask:
    """Keys of the prompt (column `prompt`), or the first `length` keys: `causal() | prefix()` is a prefix LM."""
    return Prefix() if length is None else sink_tokens(length)


def frames() -> Mask:
    """Keys of the query's own video frame (column `frame`, negative for what is no frame; no two videos of a row share
    numbers): `causal() | frames()` is frame-block-causal attention (TC-LLaVA, arXiv 2409.03206)."""
    return Frames()


def across_modalities(queries: int | None = None, keys: int | None = None) -> Mask:
    """Keys of the prompt whose modality differs from the query's; only queries and keys of the given ones.

    `causal() | across_modalities(IMAGE, TEXT)` is modality-mutual attention (AKI, arXiv 2503.02597): images see the
    question that follows them. Columns `modality` and `prompt`; answers must not be marked as prompt.
    """
    return AcrossModalities(queries, keys)


def composite(modality: int) -> Mask:
    """No attention among tokens of one modality: each of its queries sees itself alone (EE-MLLM, arXiv 2408.11795)."""
    return Composite(int(modality))


def head_windows(sizes: Int[Array, "H"] | Sequence[int], sinks: Int[Array, "H"] | Sequence[int] | int = 0) -> Mask:
    """For each query head its own window, and its own number of first keys of each document (MoA, arXiv 2406.14909).

    Arrays may be traced. Alone it does not hide the future.
    """
    windows, firsts = (x if isinstance(x, jax.Array) else np.asarray(x, np.int32) for x in (sizes, sinks))
    if windows.ndim != 1:
        raise ValueError(f"head_windows needs one size per query head, not an array of shape {windows.shape}")
    if isinstance(windows, np.ndarray) and (windows < 1).any():
        raise ValueError(f"head_windows needs sizes of at least 1, not {windows.tolist()}")
    if firsts.shape not in ((), windows.shape):
        raise ValueError(f"head_windows: {firsts.shape[0]} numbers of sinks for {windows.shape[0]} heads")
    return HeadWindows(windows, (np if isinstance(firsts, np.ndarray) else jnp).broadcast_to(firsts, windows.shape))


def predicate(
    function: Callable[[Any, Any], Any], reads: Iterable[str] = ("q.index", "k.index"), *, by_block: bool = False
) -> Mask:
    """Any rule on token columns: `function(q, k)` sees the columns named in `reads` and returns booleans.

    Blocks are skipped only with `by_block=True`, which promises that `function` uses nothing but comparisons, `+ - *`,
    `//` by a positive number, and `& | ~`, so that it also runs on intervals.
    """
    reads = tuple(reads)
    for name in reads:
        side, _, column = name.partition(".")
        if side not in ("q", "k") or column not in {field.name for field in dataclasses.fields(Tokens)}:
            raise ValueError(f"predicate reads {name!r}: expected q.<column> or k.<column> with a column of Tokens")
    return Predicate(function, by_block, reads)
