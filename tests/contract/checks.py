"""The contract of design: each check takes a layer (or a model factory) and raises AssertionError where it is broken.

The suite runs them on every registered variant; the mutation tests run them on copies with a planted fault.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels.tokens import Tokens, sequence
from layers.cache import content_bytes
from tests.contract.cases import Compiled, inputs, plain, two_documents

LENGTH = 13


def _close(actual, expected, tolerance: float, what: str) -> None:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all(), f"{what} is not finite"
    scale = max(1e-12, np.abs(expected).max())
    worst = np.abs(actual - expected).max() / scale
    assert worst <= tolerance, f"{what}: off by {worst:.2e} of the largest value, allowed {tolerance:.0e}"


def causality(layer) -> None:
    """d out[t] / d x[u] is 0 for every u > t, and not 0 for u = t nor for some u < t."""
    x, tokens = inputs(LENGTH, batch=1), plain(LENGTH)
    direction = jax.random.normal(jax.random.key(1), x.shape[-1:])
    jacobian = jax.jit(jax.jacrev(lambda x: layer(x, tokens).out[0] @ direction))(x)[:, 0]  # [T, U, D]
    strength = np.abs(np.asarray(jacobian)).max(-1)
    future = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    assert strength[future].max() == 0, f"a token sees the future: gradient {strength[future].max():.2e}"
    assert (np.diag(strength) > 0).all(), "a token does not see itself"
    assert strength[-1, :-1].max() > 0, "no token sees its past"


def packing(layer) -> None:
    """Two documents in one row give what each gives alone, no gradient crosses, and padding changes nothing."""
    layer, first, second, padding = Compiled(layer), 6, 5, 3
    x = inputs(first + second + padding, batch=1)
    tokens = two_documents(first, second, padding)
    together = layer(x, tokens).out
    alone = [
        layer(x[:, :first], plain(first)).out,
        layer(x[:, first : first + second], plain(second)).out,
    ]
    _close(together[:, : first + second], jnp.concatenate(alone, axis=1), 2e-5, "packed documents against each alone")

    def second_document(x):
        return jnp.sum(jnp.square(layer(x, tokens).out[:, first : first + second]))

    gradient = np.abs(np.asarray(jax.jit(jax.grad(second_document))(x)))[0].max(-1)
    outside = np.r_[gradient[:first], gradient[first + second :]]
    assert outside.max() == 0, f"packed documents leak: gradient {outside.max():.2e}"


def decoding(layer) -> None:
    """Prefill and then one token at a time, or a few, gives the outputs of one full pass; rows differ in length."""
    layer, x = Compiled(layer), inputs(LENGTH)
    full = layer(x, plain(LENGTH)).out
    for prefill, chunk in ((7, 1), (4, 3)):
        cache = layer.init_cache(2, LENGTH, "float32")
        out, cache, _ = layer(x[:, :prefill], plain(prefill), cache)
        pieces = [out]
        for start in range(prefill, LENGTH, chunk):
            piece = x[:, start : start + chunk]
            out, cache, _ = layer(piece, sequence(piece.shape[1], start), cache)
            pieces.append(out)
        _close(jnp.concatenate(pieces, axis=1), full, 2e-5, f"prefill {prefill}, then {chunk} at a time")
    _ragged_decoding(layer, x, full)


def _ragged_decoding(layer, x, full) -> None:
    """Two rows with prompts of different length, right-padded; then both go on from where they are."""
    lengths = np.array([4, 9])
    index = np.arange(9)[None]
    tokens = Tokens(index=jnp.asarray(index), valid=jnp.asarray(index < lengths[:, None]))
    prompt = jnp.where((index < lengths[:, None])[..., None], x[:, :9], 100.0)
    cache = layer.init_cache(2, LENGTH, "float32")
    out, cache, _ = layer(prompt, tokens, cache)
    for row, length in enumerate(lengths):
        _close(out[row, :length], full[row, :length], 2e-5, f"padded prompt of {length}")
    for step in range(LENGTH - 9):
        place = lengths + step
        late = x[np.arange(2), place][:, None]
        out, cache, _ = layer(late, Tokens(index=jnp.asarray(place)[:, None], valid=jnp.ones((2, 1), bool)), cache)
        _close(out[:, 0], full[np.arange(2), place], 2e-5, f"step {step} of rows with different lengths")


def gradients(make_layer) -> None:
    """In float64, every gradient of the fast path agrees with central differences along random directions."""
    with jax.enable_x64(True):
        layer = make_layer(dtype="float64")
        definition, parameters, rest = nnx.split(layer, nnx.Param, ...)
        x = inputs(9, dtype="float64", seed=2)
        weights = jax.random.normal(jax.random.key(5), x.shape, "float64")
        tokens = Tokens(index=plain(9).index, segment=jnp.asarray([[1] * 4 + [2] * 5] * 2))

        def loss(x, parameters):
            return jnp.sum(weights * nnx.merge(definition, parameters, rest)(x, tokens).out)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, parameters)
        leaves, tree = jax.tree.flatten((x, parameters))
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path((x, parameters))]
        step = 1e-5
        value = jax.jit(lambda *leaves: loss(*jax.tree.unflatten(tree, leaves)))
        for i, (path, leaf, slope) in enumerate(zip(paths, leaves, jax.tree.leaves(gradient), strict=True)):
            direction = jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
            moved = [[*leaves[:i], leaf + sign * step * direction, *leaves[i + 1 :]] for sign in (1, -1)]
            difference = float(value(*moved[0]) - value(*moved[1])) / (2 * step)
            exact = float(jnp.vdot(slope, direction))
            assert abs(exact - difference) <= 2e-6 * max(1.0, abs(difference)), (
                f"gradient of {path} along a direction is {exact:.8f}, central difference {difference:.8f}"
            )


def implementations(make_layer, names) -> None:
    """Every kernel implementation gives the reference's outputs and gradients."""
    x, tokens = inputs(LENGTH), two_documents(7, 6).map(lambda column: jnp.repeat(column, 2, axis=0))

    def run(implementation):
        layer = make_layer(implementation=implementation)
        definition, parameters, rest = nnx.split(layer, nnx.Param, ...)

        def loss(x, parameters):
            out = nnx.merge(definition, parameters, rest)(x, tokens).out
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, parameters)

    expected = run("reference")
    for name in names:
        for actual, wanted in zip(jax.tree.leaves(run(name)), jax.tree.leaves(expected), strict=True):
            _close(actual, wanted, 5e-5, f"implementation {name}")


def declared_parameters(layer) -> None:
    """parameter_count() is the number of trained numbers."""
    actual = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    assert layer.parameter_count() == actual, f"declared {layer.parameter_count()} parameters, has {actual}"


def declared_cache(layer) -> None:
    """cache_bytes() is the size of what a cache holds."""
    for length in (3, LENGTH, 40):
        for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
            actual = content_bytes(layer.init_cache(1, length, dtype))
            declared = layer.cache_bytes(length, itemsize)
            assert declared == actual, f"declared {declared} cache bytes for {length} tokens in {dtype}, has {actual}"


def number_formats(layer) -> None:
    """bfloat16 in, bfloat16 out, near the float32 result; shapes as promised."""
    layer, x, tokens = Compiled(layer), inputs(LENGTH), plain(LENGTH)
    exact = layer(x, tokens)
    assert exact.out.shape == x.shape and exact.cache is None
    narrow = layer(x.astype("bfloat16"), tokens).out
    assert narrow.dtype == jnp.bfloat16
    error = np.asarray(narrow, np.float64) - np.asarray(exact.out, np.float64)
    relative = np.sqrt(np.mean(error**2) / np.mean(np.asarray(exact.out, np.float64) ** 2))
    assert relative < 2e-2, f"bfloat16 is off by {relative:.3f} (relative RMS)"
