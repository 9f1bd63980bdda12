"""Bias, functions on scores, numbers in the denominator: through the blockwise form as in the reference, gradients too.

The reference itself is held to finite differences in `test_attention_op` and to NumPy in `test_attention_api`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels.attention import attention, masks, plan
from kernels.tokens import Tokens, packed

BATCH, LENGTH, KEYS, HEADS, KV_HEADS, WIDTH = 2, 21, 27, 4, 2, 5
MASKS = {
    "causal": masks.causal(),
    "everything": masks.everything(),
    "window": masks.causal() & masks.head_windows([2, 5, 9, 30], 1),
    "blocks": masks.blocks(np.random.default_rng(3).random((BATCH, HEADS, 6, 7)) < 0.4, 4),
}


def mixed(scores, at, slope, table, gain):
    """Uses heads, batch rows, distances and columns of tokens; every array has a gradient, the table's by gathering."""
    distance = at.query + KEYS - LENGTH - at.key
    near = table[at.batch, at.head, jnp.clip(distance, 0, 7)]
    late = jnp.where(at.k.position[:, None, None, :] > 3, gain[at.key], 0.0)
    return scores * (1 + 0.1 * jnp.tanh(slope[at.head] * scores)) + near + late * at.q.frame[:, None, :, None]


def both_tokens():
    index = np.arange(KEYS, dtype=np.int32)[None]
    position, frame = np.arange(KEYS, dtype=np.float32)[None] / 2, (index % 3).astype(np.float32)
    keys = Tokens(index=index, position=position, frame=frame)
    return keys.map(lambda column: column[:, KEYS - LENGTH :]), keys


def inputs(seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (BATCH, LENGTH, HEADS, WIDTH), "k": (BATCH, KEYS, KV_HEADS, WIDTH), "v": (BATCH, KEYS, KV_HEADS, 3),
        "slope": (HEADS,), "table": (BATCH, HEADS, 8), "gain": (KEYS,),
    }  # fmt: skip
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def gradients(implementation, mask, primal, soft_cap=0.0, function=mixed):
    """Output, lse, and the gradients of everything, of a loss that both enter."""
    q_tokens, k_tokens = both_tokens()
    weight = jnp.asarray(np.random.default_rng(9).normal(size=(BATCH, LENGTH, HEADS, 3)))

    def loss(primal):
        arrays = tuple(primal[name] for name in ("slope", "table", "gain")) if function else ()
        out, lse = attention(
            *(primal[name] for name in "qkv"), mask=mask, q_tokens=q_tokens, k_tokens=k_tokens, soft_cap=soft_cap,
            bias=primal.get("bias"), sinks=primal.get("sinks"), score_mod=function, score_arrays=arrays,
            implementation=implementation,
        )  # fmt: skip
        return jnp.sum(out * weight) + jnp.sum(jnp.where(lse == -jnp.inf, 0, jnp.sin(lse))), (out, lse)

    return jax.jit(jax.grad(loss, has_aux=True))(primal)


@pytest.fixture(params=["default blocks", "small blocks"])
def blocks(request, monkeypatch):
    if request.param == "small blocks":
        monkeypatch.setattr(plan, "choose_blocks", lambda q, k, v: (plan.Blocks(8, 4, 1, 2), plan.Blocks(4, 8, 2)))


def same(found, expected):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("mask", MASKS)
def test_functions_on_scores(blocks, mask):
    with jax.enable_x64(True):
        primal = inputs()
        same(*(gradients(name, MASKS[mask], primal, soft_cap=3.0) for name in ("xla", "reference")))


@pytest.mark.parametrize(
    "shape",
    [(BATCH, HEADS, LENGTH, KEYS), (1, HEADS, 1, KEYS), (BATCH, 1, LENGTH, 1), (LENGTH, KEYS), (KEYS,), (1, 1, 1, 1)],
    ids=str,
)
def test_bias_of_every_shape(blocks, shape):
    with jax.enable_x64(True):
        primal = inputs() | {"bias": jnp.asarray(np.random.default_rng(5).normal(size=shape))}
        found, expected = (gradients(name, MASKS["window"], primal, function=None) for name in ("xla", "reference"))
        same(found, expected)
        assert found[0]["bias"].shape == shape and float(jnp.abs(found[0]["bias"]).max()) > 1e-3


def test_bias_function_and_soft_cap_together(blocks):
    with jax.enable_x64(True):
        primal = inputs() | {"bias": jnp.asarray(np.random.default_rng(5).normal(size=(1, HEADS, 1, KEYS)))}
        same(*(gradients(name, MASKS["causal"], primal, soft_cap=2.0) for name in ("xla", "reference")))


@pytest.mark.parametrize("shape", [(HEADS,), (1, LENGTH, HEADS), (BATCH, 1, HEADS), (BATCH, LENGTH, HEADS)], ids=str)
def test_numbers_in_the_denominator(blocks, shape):
    """One per head, or one per row; -inf adds nothing."""
    with jax.enable_x64(True):
        sinks = np.random.default_rng(6).normal(size=shape)
        sinks[..., 0] = -np.inf
        primal = inputs() | {"sinks": jnp.asarray(sinks)}
        found, expected = (gradients(name, MASKS["blocks"], primal, function=None) for name in ("xla", "reference"))
        same(found, expected)
        out, lse = found[1]
        without = gradients("reference", MASKS["blocks"], inputs(), function=None)[1]
        more = np.log(np.exp(np.asarray(without[1])) + np.exp(np.broadcast_to(sinks, without[1].shape)))
        np.testing.assert_allclose(lse, more, rtol=1e-12)


def test_a_bias_of_minus_infinity_hides_keys():
    primal = {name: x.astype(jnp.float32) for name, x in inputs().items()}
    hidden = np.random.default_rng(7).random((1, 1, 1, KEYS)) < 0.4
    bias = jnp.where(hidden, -jnp.inf, 0.0)
    call = functools.partial(gradients, "xla", primal=primal | {"bias": bias}, function=None)
    (grads, (out, _)) = call(mask=MASKS["causal"])
    shown = gradients("xla", MASKS["causal"] & masks.keys(~hidden[0, 0]), primal, function=None)
    np.testing.assert_allclose(out, shown[1][0], atol=2e-6)
    for name in "qkv":
        np.testing.assert_allclose(grads[name], shown[0][name], atol=5e-6)


def test_what_a_function_closes_over_is_not_differentiated_in_silence():
    primal = inputs()

    def loss(slope):
        return attention(primal["q"], primal["q"], primal["q"], score_mod=lambda s, at: s * slope)[0].sum()

    with pytest.raises(ValueError, match="closes over the traced array 'slope': give it in score_arrays"):
        jax.grad(loss)(jnp.float32(2.0))


def test_packed_documents_and_shards():
    """Bias and functions under shard_map over rows and heads, on packed tokens, equal one device."""
    segment = jnp.asarray([[1] * 9 + [2] * 10 + [0] * 2] * 4)
    tokens, rng = packed(segment), np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(4, 21, 4, 8)), jnp.float32)
    bias, slope = jnp.asarray(rng.normal(size=(1, 4, 1, 21)), jnp.float32), jnp.asarray([0.1, 0.2, 0.3, 0.4])

    def attend(q, bias, slope, tokens):
        def function(scores, at, slope):
            far = at.q.position[:, None, :, None] - at.k.position[:, None, None, :]
            return scores - slope[at.head] * far

        mask = masks.causal() & masks.segments() & masks.valid()
        return attention(
            q, q, q, mask=mask, q_tokens=tokens, k_tokens=tokens, bias=bias, score_mod=function, score_arrays=(slope,)
        )[0]

    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    rows, heads = PartitionSpec("data", None, "model"), PartitionSpec(None, "model")
    specs = (rows, heads, PartitionSpec("model"), PartitionSpec("data"))
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=rows)
    grads = [
        jax.jit(jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x, tokens))), argnums=(0, 1, 2)))(q, bias, slope)
        for f in (attend, sharded)
    ]
    for one, many in zip(*grads, strict=True):
        np.testing.assert_allclose(many, one, atol=2e-5)
