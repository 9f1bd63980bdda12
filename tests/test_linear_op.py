"""The dense layer: every implementation against float64 NumPy, and what the CPU form promises about its program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.linear import IMPLEMENTATIONS, cost, linear

# Relative RMS against float64, per activation dtype: output and dx (rounded to it); gradients of float32 weights.
TOLERANCE = {"float32": (1e-6, 1e-6), "bfloat16": (3e-3, 3e-6)}
SHAPES = {
    "narrow_in": ((2, 9, 12), 20),
    "narrow_out": ((2, 9, 20), 12),
    "square": ((24, 16), 16),
    "four_axes": ((2, 3, 4, 8), 5),
    "one_row": ((1, 16), 24),
    "vector": ((16,), 24),
    "no_rows": ((0, 7, 16), 24),
    "one_output": ((5, 16), 1),
}


def draw(shape, outputs, dtype):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=s), dtype) for s in (shape, (*shape[:-1], outputs)))
    w, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((shape[-1], outputs), (outputs,)))
    return x, w, bias, dy


def relative(found, wanted):
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    if not wanted.size or not np.any(wanted):
        return float(np.any(found != 0))
    return np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))


def pull(implementation, x, w, bias, dy):
    """Output and gradients for the cotangent dy."""
    out, pullback = jax.vjp(lambda *inputs: linear(*inputs, implementation=implementation), x, w, bias)
    return out, pullback(dy)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_matches_numpy(name, implementation, dtype, with_bias):
    x, w, bias, dy = draw(*SHAPES[name], dtype)
    bias = bias if with_bias else None
    out, (dx, dw, dbias) = jax.jit(pull, static_argnums=0)(implementation, x, w, bias, dy)
    # Products are of x's type on both sides, so the oracle sees the rounded weights; sums are exact.
    xs, ws, ys = (np.asarray(a, np.float64) for a in (x, w.astype(dtype), dy))
    rows, row_cotangents = xs.reshape(-1, xs.shape[-1]), ys.reshape(-1, ys.shape[-1])
    activation, weight = TOLERANCE[dtype]
    assert out.dtype == dx.dtype == dtype and dw.dtype == jnp.float32
    assert relative(out, xs @ ws + (0 if bias is None else np.asarray(bias, np.float64))) < activation
    assert relative(dx, ys @ ws.T) < activation
    # JAX differentiates the reference's cast of the weights too, which rounds their gradient to the activations' type.
    weight_tolerance = activation if implementation == "reference" else weight
    assert relative(dw, rows.T @ row_cotangents) < weight_tolerance
    if bias is None:
        assert dbias is None
    else:
        assert dbias.dtype == jnp.float32 and relative(dbias, row_cotangents.sum(0)) < weight


def test_weight_gradient_is_not_rounded_to_bfloat16():
    """2,048 rows of ones: a bf16 sum stops at 256, and a float32 sum rounded to bf16 could not hold 2,049."""
    rows = 2049
    x, w = jnp.ones((rows, 4), jnp.bfloat16), jnp.zeros((4, 3), jnp.float32)
    for implementation in ("cpu", "xla"):
        _, (_, dw, _) = pull(implementation, x, w, None, jnp.ones((rows, 3), jnp.bfloat16))
        np.testing.assert_array_equal(dw, np.full((4, 3), rows, np.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_stays_float64(implementation):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, w, dy = (rng.normal(size=s) for s in ((6, 5), (5, 7), (6, 7)))
        out, (dx, dw, _) = pull(implementation, jnp.asarray(x), jnp.asarray(w), None, jnp.asarray(dy))
        for found, wanted in ((out, x @ w), (dx, dy @ w.T), (dw, x.T @ dy)):
            np.testing.assert_allclose(found, wanted, rtol=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_second_derivatives(implementation):
    """The Hessian of sum(sin(x w)) along a direction, by reverse mode twice, against its closed form."""
    x, w, _, _ = draw((6, 5), 7, "float32")
    direction = jnp.asarray(np.random.default_rng(1).normal(size=w.shape), jnp.float32)

    def loss(w):
        return jnp.sum(jnp.sin(linear(x, w, implementation=implementation)))

    found = jax.grad(lambda w: jnp.sum(jax.grad(loss)(w) * direction))(w)
    xs, ws, ds = (np.asarray(a, np.float64) for a in (x, w, direction))
    assert relative(found, xs.T @ (-np.sin(xs @ ws) * (xs @ ds))) < 3e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_scan_remat_and_vmap(implementation, dtype):
    """A stack of layers per scan and remat, one weight set per vmap lane, equals NumPy."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 8)), dtype)
    layers = jnp.asarray(rng.normal(size=(2, 3, 8, 8)) / 4, jnp.float32)

    def layer(x, w):
        return jnp.tanh(linear(x, w, implementation=implementation)), None

    def loss(layers, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, layers)[0].astype(jnp.float32))

    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(loss)))(layers, x)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for lane in range(2):
        hidden = [np.asarray(x[lane], np.float64).reshape(-1, 8)]
        for w in np.asarray(layers[lane], np.float64):
            hidden.append(np.tanh(hidden[-1] @ w))
        assert relative(value[lane], hidden[-1].sum()) < tolerance
        back = np.ones_like(hidden[-1])
        for i in (2, 1, 0):
            back = back * (1 - hidden[i + 1] ** 2)
            assert relative(gradient[lane, i], hidden[i].T @ back) < tolerance
            back = back @ np.asarray(layers[lane, i], np.float64).T


@pytest.mark.parametrize("transposed", [False, True])
def test_cpu_products_keep_bfloat16(transposed):
    """No operand of a product is widened: XLA's CPU backend does most forms of bf16 dots in float32, at half speed."""
    x, w, _, dy = draw((4, 64, 32), 48, "bfloat16")

    def tied(implementation, x, w, dy):
        return pull(implementation, x, w.T if transposed else w, None, dy)

    def widened(implementation):
        stored = w.T if transposed else w
        program = jax.jit(tied, static_argnums=0).lower(implementation, x, stored, dy).compile().as_text()
        dots = [line for line in program.splitlines() if " dot(" in line]
        assert len(dots) == 3
        lines = [line.strip().removeprefix("ROOT ") for line in program.splitlines() if " = " in line]
        definitions = dict(line.split(" = ", 1) for line in lines)
        operands = [name.strip() for line in dots for name in line.split(" dot(")[1].split(")")[0].split(",")]
        return [name for name in operands if not definitions[name].startswith("bf16")]

    assert widened("cpu") == []
    assert widened("reference") != []  # The check sees the difference.


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 48), (48, 32)])
def test_cpu_products_survive_transposes(inputs, outputs):
    """XLA folds transposes into the bf16 product beside them; without barriers the CPU runtime refuses the outcome."""
    x, w, _, dy = draw((64, inputs), outputs, "bfloat16")

    def gradients(x_transposed, w_transposed):
        def loss(a, b):
            return jnp.sum(linear(a.T, b.T).T * dy.T)

        return jax.grad(loss, argnums=(0, 1))(x_transposed, w_transposed)

    dx, dw = jax.jit(gradients)(x.T, w.T)
    xs, ws, ys = (np.asarray(a, np.float64) for a in (x, w.astype(x.dtype), dy))
    assert relative(dx, (ys @ ws.T).T) < 3e-3
    assert relative(dw, (xs.T @ ys).T) < 3e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_sharding_propagates(implementation, dtype):
    """Rows over 4, outputs over 2 devices: results stay laid out so, and only the sums that must be made are."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    x, w, bias, dy = draw((8, 6, 16), 24, dtype)
    wanted = pull(implementation, x, w, bias, dy)
    rows, columns = PartitionSpec("data"), PartitionSpec(None, "model")
    both = PartitionSpec("data", None, "model")
    placed = [
        jax.device_put(a, NamedSharding(mesh, s))
        for a, s in ((x, rows), (w, columns), (bias, PartitionSpec("model")), (dy, both))
    ]
    program = jax.jit(pull, static_argnums=0).lower(implementation, *placed).compile()
    out, (dx, dw, dbias) = program(*placed)
    for found, correct, spec in ((out, wanted[0], both), (dx, wanted[1][0], rows), (dw, wanted[1][1], columns)):
        assert relative(found, np.asarray(correct, np.float64)) < TOLERANCE[dtype][0]
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), found.ndim)
    assert relative(dbias, wanted[1][2]) < 1e-6
    text = program.as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))


def test_repeats_are_bitwise_equal():
    x, w, bias, dy = draw((96, 64), 48, "bfloat16")
    first, second = (jax.tree.leaves(jax.jit(pull, static_argnums=0)("cpu", x, w, bias, dy)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_cost():
    assert cost.flops(10, 3, 5) == 2 * 10 * 3 * 5
    assert cost.flops(10, 3, 5, backward=True) == 2 * cost.flops(10, 3, 5)
    x, w, _, dy = draw((10, 3), 5, "bfloat16")
    assert cost.bytes(10, 3, 5, itemsize=2) == x.nbytes + w.nbytes + dy.nbytes
    assert cost.bytes(10, 3, 5, itemsize=2, backward=True) == 2 * x.nbytes + 2 * w.nbytes + dy.nbytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones((2, 3)), jnp.ones((4, 5))), r"x \(2, 3\) does not fit w \(4, 5\)"),
        ((jnp.ones((2, 3)), jnp.ones(3)), "does not fit w"),
        ((jnp.ones((2, 3)), jnp.ones((3, 5)), jnp.ones(3)), "one number per output"),
        ((jnp.ones((2, 3), jnp.int32), jnp.ones((3, 5))), "floating point"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear(*arguments)
