"""Mixture of heads against float64 loops; heads left out; straight-through gradients; the balance of the choices."""

import jax
import jax.numpy as jnp
import layers_oracle
import moh_oracle as oracle
import numpy as np
import pytest
from flax import nnx
from layers_oracle import Blank, Rotation, parameters, plain_frequencies, relative

import layers.attention
import models
from configs import base, fields
from kernels.attention import attention, masks
from kernels.attention.rows import of_active_rows
from kernels.tokens import packed, sequence
from layers.attention import softmax
from layers.hooks import Hooks, Tap
from layers.rope import Rope
from models.conversion import ConversionError, convert_to_moh

WIDTH, LENGTH = 12, 24
OWN = ("shared_heads", "routed_active", "router", "score", "two_stage", "straight_through", "balance")
CASES = {
    "released": dict(shared_heads=2, routed_active=2),
    "paper": dict(shared_heads=2, routed_active=1, score="paper"),
    "one stage": dict(shared_heads=2, routed_active=2, two_stage=False),
    "none shared": dict(shared_heads=0, routed_active=3),
    "one shared": dict(shared_heads=1, routed_active=2, kv_heads=3),
    "all shared": dict(shared_heads=6, routed_active=0),
    "by norms": dict(shared_heads=3, routed_active=2, router="query_norm", straight_through="active"),
    "by norms, window, sinks": dict(
        shared_heads=2, routed_active=1, router="query_norm", straight_through="none", window=7, sink_tokens=1,
        learned_sinks=True, kv_heads=1,
    ),
}  # fmt: skip


def build(**options):
    options = dict(heads=6, kv_heads=2, head_dim=6, rope=Rope(theta=20.0)) | options
    layer = layers.attention.get("moh")(Blank(WIDTH, depth=3), layer_index=0, rngs=nnx.Rngs(0), **options)
    return layer, parameters(layer), options


def texts():
    """Inputs, and two rows of documents with padding at their ends."""
    x = np.random.default_rng(1).standard_normal((2, LENGTH, WIDTH))
    document = np.array([[1] * 9 + [2] * 13 + [0] * 2, [1] * 20 + [2] * 3 + [0]])
    return x, document, packed(jnp.asarray(document))


def run(layer, x, tokens, hooks=None):
    definition, state = nnx.split(layer)
    return jax.jit(lambda state, x: nnx.merge(definition, state)(x, tokens, hooks=hooks))(state, x)


@pytest.mark.parametrize("skipping", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_what_the_formulas_say(monkeypatch, name, skipping):
    """Output, weights and loss, whether heads that a token leaves out are computed or skipped."""
    monkeypatch.setattr(softmax, "_MANY", 1 if skipping else 10**6)
    layer, p, options = build(**CASES[name])
    x, document, tokens = texts()
    own = {field: options[field] for field in OWN if field in options}
    base = {field: value for field, value in options.items() if field not in (*own, "rope")}
    rope = Rotation(tuple(plain_frequencies(6, 20.0)))
    found = {}

    def weigh(heads):
        q = first["query_raw"]
        found["gates"], _, found["loss"] = oracle.gates(p, x, q, heads=6, **own, counted=document > 0)
        return heads * found["gates"][..., None]

    place = np.asarray(tokens.positions())
    first = layers_oracle.mha(p, x, document, place, **base, rope=rope).seen
    wanted = layers_oracle.mha(p, x, document, place, **base, rope=rope, edits={"heads": weigh}).seen
    out, _, aux = run(layer, jnp.asarray(x, jnp.float32), tokens, Hooks(taps={"gates": Tap()}))
    real = document > 0
    assert relative(out[real], wanted["out"][real]) < 1e-5
    assert relative(aux["tap/gates"], found["gates"]) < 1e-5
    if found["loss"]:
        assert abs(float(aux["loss/head_balance"]) - found["loss"]) < 1e-5 * found["loss"]
    else:
        assert "loss/head_balance" not in aux


def test_weights_are_one_on_average_and_few():
    """Of the released form: what an active head weighs, and how many there are."""
    layer, *_ = build(shared_heads=2, routed_active=2, kv_heads=6)
    x, _, tokens = texts()
    gates = np.asarray(run(layer, jnp.asarray(x, jnp.float32), tokens, Hooks(taps={"gates": Tap()})).aux["tap/gates"])
    assert ((gates > 0).sum(-1) == 4).all()
    np.testing.assert_allclose(gates.sum(-1), 4, rtol=1e-5)


def rows(kv_heads, sinks, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 300, heads, 8)), jnp.float32) for heads in (4, kv_heads, kv_heads))
    tokens = packed(jnp.asarray(np.sort(rng.integers(0, 3, (2, 300)), axis=1)))
    options = dict(mask=masks.causal() & masks.segments() & masks.valid(), q_tokens=tokens, k_tokens=tokens)
    sinks = jnp.asarray(rng.standard_normal(4), jnp.float32) if sinks else None
    return q, k, v, jnp.asarray(rng.random((2, 300, 4)) < 0.4), sinks, options


@pytest.mark.parametrize(("kv_heads", "sinks"), [(4, False), (2, True), (1, False)])
def test_active_rows_are_those_of_the_whole(kv_heads, sinks):
    """Output and gradients of the rows that are wanted, zeros elsewhere."""
    q, k, v, active, sinks, options = rows(kv_heads, sinks)
    weight = jnp.asarray(np.random.default_rng(3).standard_normal(q.shape), jnp.float32)
    where = (0, 1, 2) if sinks is None else (0, 1, 2, 3)

    def whole(q, k, v, sinks):
        return jnp.where(active[..., None], attention(q, k, v, sinks=sinks, **options)[0], 0)

    def few(q, k, v, sinks):
        return of_active_rows(q, k, v, active, sinks=sinks, **options)

    found, wanted = (
        jax.jit(jax.value_and_grad(lambda *x: (f(*x) * weight).sum(), argnums=where))(q, k, v, sinks)  # noqa: B023
        for f in (few, whole)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for mine, other in zip(found[1], wanted[1], strict=True):
        assert relative(mine, np.asarray(other, np.float64)) < 1e-5


def test_rows_left_out_are_not_computed():
    """Whatever they hold; all of them left out gives zeros."""
    q, k, v, active, _, options = rows(2, False)
    good = of_active_rows(q, k, v, active, **options)
    broken = of_active_rows(jnp.where(active[..., None], q, jnp.nan), k, v, active, **options)
    np.testing.assert_array_equal(good, broken)
    assert not np.asarray(of_active_rows(q, k, v, jnp.zeros_like(active), **options)).any()


@pytest.mark.parametrize("through", ["all", "active", "none"])
def test_gradients_pass_straight_through(through):
    """The gradient of a weight of 0 or 1 is that of the softmax of the norms: for all routed heads, or the chosen."""
    layer, *_ = build(shared_heads=2, routed_active=2, kv_heads=6, router="query_norm", straight_through=through)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((1, 3, WIDTH)), jnp.float32)
    q, d = rng.standard_normal((1, 3, 6, 6)), rng.standard_normal((1, 3, 6))
    found = jax.grad(lambda q: jnp.sum(layer.gates(x, q, sequence(3)).weight * d))(jnp.asarray(q, jnp.float32))
    chosen = oracle.gates({}, np.asarray(x), q, heads=6, shared_heads=2, routed_active=2, router="query_norm")[1]
    kept = {"all": np.ones_like(chosen), "active": chosen, "none": np.zeros_like(chosen)}[through]

    def soft(q):
        norms = np.sqrt((q[:, :, 2:] ** 2).sum(-1))
        spread = np.sqrt(((norms - norms.mean(-1, keepdims=True)) ** 2).sum(-1, keepdims=True) / 3)
        e = np.exp(norms / spread)
        return float((kept * d[..., 2:] * e / e.sum(-1, keepdims=True)).sum())

    wanted, step = np.zeros_like(q), 1e-5
    for place in np.ndindex(*q.shape):
        change = np.zeros_like(q)
        change[place] = step
        wanted[place] = (soft(q + change) - soft(q - change)) / (2 * step)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert np.abs(found).max() > 1e-2 or through == "none"


def test_queries_of_one_size_or_none_have_gradients():
    layer, *_ = build(shared_heads=2, routed_active=2, kv_heads=6, router="query_norm")
    for q in (jnp.zeros((1, 3, 6, 6)), jnp.ones((1, 3, 6, 6))):
        x = jnp.ones((1, 3, WIDTH))
        weight, gradient = jax.value_and_grad(lambda q: layer.gates(x, q, sequence(3)).weight[..., 2].sum())(q)  # noqa: B023
        assert weight == 3 and np.isfinite(gradient).all()  # Of equals the first.


def test_the_loss_is_least_where_choices_are_even():
    """With K = 2 of 4: K where each head is chosen alike, more where all tokens want the same."""
    layer, *_ = build(shared_heads=2, routed_active=2, balance=1.0)
    router = layer.routed_router.weight
    x, tokens = jnp.eye(WIDTH)[None, :4], sequence(4)
    even = np.zeros((WIDTH, 4))
    for token in range(4):
        even[token, [token, (token + 1) % 4]] = 5.0
    losses = []
    for weight in (even, np.tile(np.array([5.0, 5, 0, 0]), (WIDTH, 1))):
        router[...] = jnp.asarray(weight, jnp.float32)
        losses.append(float(layer(x, tokens).aux["loss/head_balance"]))
    assert abs(losses[0] - 2) < 1e-5 and losses[1] > 3.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(routed_active=5), "routed_active 5 must be 1 to the 4 heads"),
        (dict(routed_active=0), "routed_active 0 must be 1 to the 4 heads"),
        (dict(shared_heads=6, routed_active=1), "0 if all are"),
        (dict(router="norm"), "router 'norm' is not one of learned, query_norm"),
    ],
)
def test_options_that_do_not_fit(options, says):
    with pytest.raises(ValueError, match=says):
        build(**options)


def softmax_network(**options):
    """A language model of two layers of `mha`, and its config."""
    changes = {"model.width": 24, "model.depth": 2, "model.mlp.width": 32, "model.max_length": 32}
    changes |= {f"model.attention.{name}": value for name, value in dict(heads=4, kv_heads=2, head_dim=6).items()}
    config = fields.apply(base.get_config(), changes | {f"model.attention.{n}": v for n, v in options.items()}).model
    return models.build(config, vocab_size=50, rngs=nnx.Rngs(0)), fields.plain(config)


def logits(model, ids):
    definition, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, ids: nnx.merge(definition, state)(ids).logits)(state, ids))


def test_a_network_goes_over_to_some_of_its_heads():
    """All heads active is the network itself; a share of them is not, and stands in the config; nothing is new."""
    model, config = softmax_network()
    ids = np.random.default_rng(0).integers(0, 50, (2, 20)).astype(np.int32)
    whole = convert_to_moh(model, config, active=1.0, shared=0.5)
    np.testing.assert_allclose(logits(whole.model, ids), logits(model, ids), atol=1e-6)
    part = convert_to_moh(model, config, active=0.75, shared=0.5, balance=0.02, report_ids=ids)
    options = part.config["attention"]
    assert (options["layer"], options["shared_heads"], options["routed_active"]) == ("moh", 2, 1)
    assert options["balance"] == 0.01 and [stage.name for stage in part.report.stages] == ["original", "moh"]
    assert part.report.stages[1].logit_distance > 1e-3
    for mine, other in zip(*(jax.tree.leaves(nnx.state(each)) for each in (part.model, model)), strict=True):
        np.testing.assert_array_equal(mine, other)
    drawn = convert_to_moh(model, config, router="learned", active=0.75)
    assert drawn.model.stacks[0].blocks[0].attention.routed_router.weight.shape == (2, 24, 2)
    assert np.isfinite(logits(drawn.model, ids)).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(active=0.5), "active=0.5 of them and shared=0.5 leave 0 to be routed to"),
        (dict(router="norm"), "unknown router 'norm'"),
    ],
)
def test_conversions_that_cannot_be(options, says):
    model, config = softmax_network()
    with pytest.raises(ConversionError, match=says):
        convert_to_moh(model, config, **options)
