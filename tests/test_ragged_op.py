"""The ragged layer: every implementation against float64 NumPy, group by group."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers_oracle import QUICK, relative

from kernels.platform import compiling_for
from kernels.ragged import IMPLEMENTATIONS, cost, ragged, tiles

ROWS, INPUTS, OUTPUTS = 75, 6, 10
# Tiles have 16 rows here: groups of less, of exactly one, of several and a part, none; at the start and at the end.
SIZES = {
    "uneven": (0, 16, 1, 0, 47, 11),
    "one has all": (0, 0, 75, 0, 0, 0),
    "rows behind": (5, 0, 33, 0, 1, 0),
    "none at all": (0,) * 6,
}
# Relative to the largest: output and dx (rounded to x's type), gradients of float32 weights.
TOLERANCE = {"float32": (1e-6, 1e-6), "bfloat16": (4e-3, 1e-6)}


@jax.tree_util.Partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def pull(implementation, x, w, sizes, dy):
    """Output, dx and dw for the cotangent dy."""
    out, pullback = jax.vjp(lambda x, w: ragged(x, w, sizes, implementation=implementation), x, w)
    return out, *pullback(dy)


def wanted(x, w, sizes, dy):
    out, dx, dw = np.zeros((ROWS, OUTPUTS)), np.zeros(x.shape), np.zeros(w.shape)
    first = 0
    for group, size in enumerate(sizes):
        own = slice(first, first := first + size)
        out[own], dx[own], dw[group] = x[own] @ w[group], dy[own] @ w[group].T, x[own].T @ dy[own]
    return out, dx, dw


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_numpy_whatever_the_sizes(implementation, dtype):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((ROWS, width)), dtype) for width in (INPUTS, OUTPUTS))
    w = jnp.asarray(rng.standard_normal((6, INPUTS, OUTPUTS)), jnp.float32)
    exact = [np.asarray(a, np.float64) for a in (x, w.astype(dtype), dy)]
    rounded, whole = TOLERANCE[dtype]
    if implementation == "reference":  # JAX rounds the gradient of the cast weights too.
        whole = rounded
    for sizes in SIZES.values():
        found = pull(implementation, x, w, jnp.array(sizes, jnp.int32), dy)
        assert [a.dtype for a in found] == [dtype, dtype, jnp.float32]
        right = wanted(*exact[:2], sizes, exact[2])
        for got, want, tolerance in zip(found, right, (rounded, rounded, whole), strict=True):
            atol = tolerance * np.abs(want).max()
            np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=atol)


@pytest.mark.parametrize("implementation", ["tiles", "xla"])
def test_rows_behind_the_last_group_are_not_touched(implementation):
    """Whatever they hold, also where it is not a number."""
    rng = np.random.default_rng(1)
    x, dy = (rng.standard_normal((ROWS, width)).astype(np.float32) for width in (INPUTS, OUTPUTS))
    w, sizes = rng.standard_normal((6, INPUTS, OUTPUTS)).astype(np.float32), jnp.array(SIZES["rows behind"], jnp.int32)
    clean = pull(implementation, x, w, sizes, dy)
    x[39:], dy[39:] = np.nan, np.inf
    if implementation == "xla":  # CPU's form of it multiplies by zeros, so only numbers will do.
        x[39:], dy[39:] = 1e9, -1e9
    for got, want in zip(pull(implementation, x, w, sizes, dy), clean, strict=True):
        np.testing.assert_array_equal(got, want)
    assert not np.any(clean[0][39:]) and not np.any(clean[1][39:])


def test_gradient_of_the_gradient():
    """Of tiles against the reference, which JAX differentiates by itself."""
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((40, 3)), rng.standard_normal((4, 3, 5))
    sizes = jnp.array([0, 21, 3, 14], jnp.int32)

    def twice(implementation, x, w):
        def total(x, w):
            return jnp.sum(jnp.sin(ragged(x, w, sizes, implementation=implementation)))

        def norm(x, w):
            return sum(jnp.sum(g * g * g) for g in jax.grad(total, (0, 1))(x, w))

        return jax.grad(norm, (0, 1))(x, w)

    with jax.enable_x64(True):
        run = jax.jit(twice, static_argnums=0, compiler_options=QUICK)
        for got, want in zip(run("tiles", x, w), run("reference", x, w), strict=True):
            assert got.dtype == np.float64 and relative(got, np.asarray(want)) < 1e-12


def test_tiles_follow_the_average_group():
    found = [tiles.tile_rows(rows, 8) for rows in (1, 5, 16, 8 * 16, 8 * 63, 8 * 64, 10**6)]
    assert found == [1, 5, 16, 16, 32, 64, 256]


def test_work_is_that_of_the_rows():
    """On CPU the products are of one tile and one matrix; XLA for TPU and GPU gets its own ragged products."""
    x, w, sizes = jnp.zeros((4096, 8)), jnp.zeros((64, 8, 16)), jnp.full((64,), 64, jnp.int32)

    def step(x, w):
        return jnp.sum(ragged(x, w, sizes) ** 2)

    compiled = jax.jit(jax.grad(step, (0, 1))).lower(x, w).compile(compiler_options=QUICK).as_text()
    assert sorted(re.findall(r"= f32\[([\d,]+)\]\S* dot\(", compiled)) == ["64,16", "64,8", "8,16"]
    for platform, target in (("tpu", "tpu"), ("gpu", "cuda")):
        with compiling_for(platform):
            lowered = jax.jit(jax.grad(step, (0, 1))).trace(x, w).lower(lowering_platforms=(target,))
        assert lowered.as_text().count('"chlo.ragged_dot"') == 3


def test_shapes_that_do_not_fit_and_names_that_are_not_there():
    x, w, sizes = jnp.zeros((5, 4)), jnp.zeros((3, 4, 2)), jnp.zeros((3,), jnp.int32)
    for bad in ((x[0], w, sizes), (x, w[0], sizes), (x[:, 1:], w, sizes), (x, w, sizes[1:])):
        with pytest.raises(ValueError, match="ragged: x .* do not fit w"):
            ragged(*bad)
    with pytest.raises(ValueError, match="floating point"):
        ragged(x.astype(int), w, sizes)
    with pytest.raises(ValueError, match="did you mean tiles"):
        ragged(x, w, sizes, implementation="tile")
    assert ragged(x[:0], w, sizes).shape == (0, 2)
    assert cost.flops(5, 4, 2) == 80 and cost.bytes(5, 3, 4, 2) == 4 * (20 + 10 + 24)
