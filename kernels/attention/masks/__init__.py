"""Masks as values: who may attend to whom. `base` has what they are, `rules` and `lists` the masks themselves."""

from kernels.attention.masks.base import EMPTY, FULL, PARTIAL, And, Everything, Mask, array, expression
from kernels.attention.masks.intervals import Interval, Truth
from kernels.attention.masks.lists import blocks, keys, spans_of_keys, spans_of_queries
from kernels.attention.masks.rules import (
    Causal,
    SlidingWindow,
    across_modalities,
    causal,
    composite,
    everything,
    frames,
    head_windows,
    predicate,
    prefix,
    segments,
    sink_tokens,
    sliding_window,
    valid,
)

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "And",
    "Causal",
    "Everything",
    "Interval",
    "Mask",
    "SlidingWindow",
    "Truth",
    "across_modalities",
    "array",
    "blocks",
    "causal",
    "composite",
    "everything",
    "expression",
    "frames",
    "head_windows",
    "keys",
    "predicate",
    "prefix",
    "segments",
    "sink_tokens",
    "sliding_window",
    "spans_of_keys",
    "spans_of_queries",
    "valid",
]
