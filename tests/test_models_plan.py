"""What each layer of a network is, and which runs of layers share a scan."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.plan import layer_specs, segments
from tests.models_oracle import MLA, NORM, RESIDUAL, SWIGLU, options, small

SEGMENTS = {
    "AAAAAA": [("A", 6)],
    "A": [("A", 1)],
    "": [],
    "ABABAB": [("AB", 3)],
    "ABABABA": [("AB", 3), ("A", 1)],
    "AABAAB": [("AAB", 2)],
    "AAAABBBB": [("A", 4), ("B", 4)],
    "ABCAB": [("A", 1), ("B", 1), ("C", 1), ("A", 1), ("B", 1)],
    "AABCA": [("A", 2), ("B", 1), ("C", 1), ("A", 1)],
    "ABBBB": [("A", 1), ("B", 4)],
    "ABCDEFGHABCDEFGH": [("ABCDEFGH", 2)],  # As long as a pattern may be.
    "ABCDEFGHIABCDEFGHI": [(layer, 1) for layer in "ABCDEFGHIABCDEFGHI"],
}


@pytest.mark.parametrize("layers", SEGMENTS)
def test_segments(layers):
    specs = [{"attention": {"kind": kind}} for kind in layers]
    found = [("".join(s["attention"]["kind"] for s in pattern), repeats) for pattern, repeats in segments(specs)]
    assert found == SEGMENTS[layers]


@settings(max_examples=150, deadline=None)
@given(st.text("ABC", max_size=24))
def test_segments_are_the_layers_in_order(layers):
    found = segments([{"kind": kind} for kind in layers])
    assert "".join(s["kind"] for pattern, repeats in found for s in repeats * pattern) == layers
    for (pattern, repeats), (following, _) in zip(found, found[1:], strict=False):
        assert repeats > 1 or len(pattern) == 1
        assert len(pattern) > 1 or pattern[0] != following[0] or len(following) > 1  # Equal neighbours stay together.


def test_per_layer_exceptions():
    config = small(depth=4, mlp=SWIGLU | dict(width=(8, 16)), per_layer=(
        (":2", {"attention.window": 7, "norm.kind": "layer"}),
        ("-1", {"attention": MLA, "mlp": dict(kind="gelu", width=(1, 2, 3, 4, 5), bias=True)}),
        ("1", {"attention.window": 9, "attention.rope.theta": 5.0}),
    ))  # fmt: skip
    gqa = options("gqa")
    assert layer_specs(config) == [
        dict(
            attention=gqa | dict(window=7),
            mlp=SWIGLU | dict(width=8),
            norm=NORM | dict(kind="layer"),
            residual=RESIDUAL,
        ),
        dict(
            attention=gqa | dict(window=9, rope=gqa["rope"] | dict(theta=5.0)),
            mlp=SWIGLU | dict(width=16),
            norm=NORM | dict(kind="layer"),
            residual=RESIDUAL,
        ),
        dict(attention=gqa, mlp=SWIGLU | dict(width=16), norm=NORM, residual=RESIDUAL),
        dict(attention=MLA, mlp=dict(kind="gelu", width=4, bias=True), norm=NORM, residual=RESIDUAL),
    ]


@pytest.mark.parametrize(("selector", "field", "message"), [
    ("4", "mlp.width", "'4' selects no layers of 4"),
    ("first", "mlp.width", "'first' selects no layers"),
    ("1:2:3:4", "mlp.width", "selects no layers"),
    ("::0", "mlp.width", "selects no layers"),
    ("", "mlp.width", "selects no layers"),
    ("0", "mlp.widht", "no 'widht': known are kind, width, bias"),
    ("0", "mpl.width", "no 'mpl': it has attention, mlp, norm"),
    ("0", "mlp.width.deep", "no 'width'"),
])  # fmt: skip
def test_wrong_exceptions_are_named(selector, field, message):
    with pytest.raises(ValueError, match=message):
        layer_specs(small(depth=4, per_layer=((selector, {field: 1}),)))
