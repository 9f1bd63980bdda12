"""Sweep combinators by their algebra, and the shipped sweeps by what they promise."""

import itertools
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import command_line, fields, validate
from configs.errors import ConfigError
from configs.sweeps import chain, label, labels, overlay, param, product, zip_

SWEEPS = sorted(
    str(path) for path in pathlib.Path("configs/sweeps").glob("*.py") if path.stem not in ("__init__", "combinators")
)
VALUES = st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True)


@given(VALUES, VALUES, VALUES)
def test_product_is_every_combination_with_the_last_moving_fastest(a, b, c):
    sweep = product(param("x.a", *a), param("b", *b), param("c", *c))
    assert [tuple(point.values()) for point in sweep] == list(itertools.product(a, b, c))
    assert product(product(param("x.a", *a), param("b", *b)), param("c", *c)) == sweep  # Associative.
    assert product(param("b", *b)) == param("b", *b) and product() == [{}]  # The empty product is its unit.


@given(VALUES)
def test_zip_goes_side_by_side(values):
    sweep = zip_(param("a", *values), param("b", *[2 * value for value in values]))
    assert sweep == [{"a": value, "b": 2 * value} for value in values]


def test_zip_needs_equal_lengths():
    with pytest.raises(ConfigError, match="lengths 2, 3"):
        zip_(param("a", 1, 2), param("b", 1, 2, 3))


def test_chain_concatenates_and_refuses_twins():
    assert chain(param("a", 1), param("b", 2)) == [{"a": 1}, {"b": 2}]
    with pytest.raises(ConfigError, match="same point twice"):
        chain(param("a", 1, 2), param("a", 2))


def test_overlay_wins_and_changes_no_argument():
    sweep = param("a", 1, 2)
    assert overlay(sweep, {"a": 5, "b": 6}) == [{"a": 5, "b": 6}] * 2
    assert sweep == [{"a": 1}, {"a": 2}]


def test_a_field_set_twice_is_an_error():
    with pytest.raises(ConfigError, match="two sweeps set a"):
        product(param("a", 1), param("a", 2))


@pytest.mark.parametrize("field", ["", "a..b", ".a", "a b", "1a", 3])
def test_fields_must_be_dotted_names(field):
    with pytest.raises(ConfigError, match="no dotted field"):
        param(field, 1)
    with pytest.raises(ConfigError, match="no dotted field"):
        overlay([{}], {field: 1})


def test_param_needs_values():
    with pytest.raises(ConfigError, match="at least one value"):
        param("a")


def test_labels_name_what_differs():
    sweep = product(param("seed", 0, 1), param("model.width", 64, 128), param("train.steps", 5))
    assert labels(sweep) == ["seed=0,width=64", "seed=0,width=128", "seed=1,width=64", "seed=1,width=128"]
    assert (
        labels(product(param("model.width", 1, 2), param("model.mlp.width", 3, 4)))[0]
        == "model.width=1,model.mlp.width=3"
    )
    assert labels([{"name": "a", "seed": 0}, {"name": "a", "seed": 1}, {"name": "b", "seed": 0}]) == [
        "a,seed=0",
        "a,seed=1",
        "b",
    ]
    assert label({"data.sources": ("my folder/x.txt",)}) == "sources=my-folder-x.txt"
    assert label({}) == "default"


def test_labels_are_distinct_or_an_error():
    with pytest.raises(ConfigError, match="both called"):
        labels([{"a": "x y"}, {"a": "x-y"}])


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b.c", "d"]), st.integers(0, 2), max_size=3), max_size=6))
def test_labels_of_any_sweep_are_fit_for_folders(sweep):
    try:
        names = labels(sweep)
    except ConfigError:
        assert any(one == other for one, other in itertools.combinations(sweep, 2)) or {} in sweep
        return
    assert len(set(names)) == len(names)
    assert all(name and "/" not in name and name not in (".", "..") for name in names)


def test_a_sweep_imports_nothing_heavy():
    code = "import configs.sweeps, sys; print([m for m in ('jax', 'numpy', 'flax', 'optax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SWEEPS)
def test_shipped_sweeps_are_valid_and_their_runs_distinct(path):
    sweep = command_line.load_file(path, "SWEEP")
    base = command_line.load(command_line.load_file(path, "CONFIG"))
    assert len(labels(sweep)) == len(sweep) > 1
    for point in sweep:
        validate.check(fields.apply(base, point))
