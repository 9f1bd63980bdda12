"""The attention op: every implementation against an independent float64 oracle, forward and every gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import CAUSAL, SETTINGS, Setting, allowed_by_hand, arrays, oracle, tokens
from jax.sharding import Mesh, PartitionSpec

from kernels.attention import attention, masks, plan
from kernels.attention.scores import Change
from kernels.tokens import Tokens
from kernels.tolerance import relative_error, tolerance

SMALL = plan.Blocks(8, 8, 2, 2)


@pytest.fixture(params=["reference", "xla", "xla_small_blocks"])
def op(request, monkeypatch):
    """The op through one implementation; the small blocks make short rows take every path of the blockwise form."""
    if request.param == "xla_small_blocks":
        small = lambda q, k, v: 2 * (dataclasses.replace(SMALL, heads=2 - k[2] % 2),)  # noqa: E731
        monkeypatch.setattr(plan, "choose_blocks", small)
    call = functools.partial(attention, implementation=request.param.split("_")[0])
    call.key = request.param
    return call


@functools.cache
def compiled(key: str, setting: Setting, batch: int) -> Any:
    """Output, lse and gradients as one function, compiled once for the tests that use the same setting."""
    q_tokens, k_tokens = tokens(setting, batch)

    def forward_and_gradients(primal, d_out, d_lse):
        def forward(primal):
            return attention(
                **primal, mask=setting.mask, q_tokens=q_tokens, k_tokens=k_tokens, soft_cap=setting.soft_cap,
                scale=setting.scale, implementation=key.split("_")[0],
            )  # fmt: skip

        (out, lse), pull = jax.vjp(forward, primal)
        return out, lse, pull((d_out.astype(out.dtype), d_lse.astype(lse.dtype)))[0]

    return jax.jit(forward_and_gradients)


def run(op: Any, setting: Setting, x: dict[str, np.ndarray], dtype: str = "float32") -> dict[str, np.ndarray]:
    """Output, lse and gradients through `op`, as float64 arrays."""
    primal = {name: jnp.asarray(x[name], dtype) for name in ("q", "k", "v")}
    if setting.sinks:
        primal["sinks"] = jnp.asarray(x["sinks"], jnp.float32)
    function = compiled(op.key, setting, x["q"].shape[0])
    out, lse, gradients = function(primal, jnp.asarray(x["d_out"], dtype), jnp.asarray(x["d_lse"]))
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    return {name: np.asarray(a, np.float64) for name, a in {"out": out, "lse": lse, **gradients}.items()}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], dtype: str = "float32") -> None:
    limits = tolerance(dtype)
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert found[name].shape == right.shape, name
        if name == "lse":
            np.testing.assert_array_equal(np.isneginf(found[name]), np.isneginf(right))
            seen = np.isfinite(right)
            assert np.abs(found[name][seen] - right[seen]).max(initial=0) < limits.lse, name
            continue
        # A gradient that is zero by its formula (one visible key) is compared with the size of what cancels: about 1.
        error = relative_error(found[name], right, floor=0.05)
        assert error <= (limits.out if name == "out" else limits.gradient), f"{name}: {error:.2e} relative"


# At these lengths the default blocks hold whole rows, so the small blocks test more of the blockwise form.
WHOLE_BLOCK = ("one_token", "decode", "grouped", "packed_window", "nothing")
CASES = [("reference", name) for name in SETTINGS]
CASES += [("xla" if name in WHOLE_BLOCK else "xla_small_blocks", name) for name in SETTINGS]


@pytest.mark.parametrize("op, name", CASES, indirect=["op"])
def test_float32_agrees_with_the_oracle(op, name) -> None:
    x = arrays(SETTINGS[name])
    assert_close(run(op, SETTINGS[name], x), oracle(SETTINGS[name], x))


BFLOAT16_CASES = [
    ("reference", "all_at_once"), ("xla", "decode"), ("xla", "grouped"), ("xla_small_blocks", "all_at_once"),
    ("xla_small_blocks", "causal"),
]  # fmt: skip


@pytest.mark.parametrize("op, name", BFLOAT16_CASES, indirect=["op"])
def test_bfloat16_agrees_with_the_oracle(op, name) -> None:
    x = {key: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for key, a in arrays(SETTINGS[name]).items()}
    assert_close(run(op, SETTINGS[name], x, "bfloat16"), oracle(SETTINGS[name], x), "bfloat16")


def test_huge_scores_stay_exact(op) -> None:
    setting = Setting((33, 33, 2, 2, 8, 8), scale=300.0)
    x = arrays(setting)
    s = setting.scale * np.einsum("bthd,bshd->bhts", x["q"], x["k"])
    s = np.where(allowed_by_hand(setting)[:, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    found = run(op, setting, x)
    assert np.abs(found["out"] - np.einsum("bhts,bshe->bthe", p, x["v"])).max() < 2e-3
    assert all(np.isfinite(a).all() for a in found.values())


def test_rows_without_keys_give_zero_and_pass_nothing_on(op) -> None:
    setting = SETTINGS["packed"]
    x = arrays(setting)
    dead = ~allowed_by_hand(setting).any(-1)
    assert dead.any() and not dead.all()
    clean = run(op, setting, x)
    assert (clean["out"][dead] == 0).all() and np.isneginf(clean["lse"][dead]).all() and (clean["q"][dead] == 0).all()
    x["d_out"][dead] = np.nan
    again = run(op, setting, x)
    for name, a in clean.items():
        np.testing.assert_array_equal(a, again[name], err_msg=name)


SPOILT = Setting((37, 37, 4, 2, 8, 8), CAUSAL & masks.sliding_window(12))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["k", "v", "both"])
def test_what_a_row_may_not_see_never_reaches_it(op, bad, where) -> None:
    setting = SPOILT
    x, spoilt = arrays(setting), 20
    d_out = x["d_out"]
    sees = np.zeros(37, bool)
    sees[spoilt : spoilt + 12] = True
    d_out[:, sees] = 0  # Those who see it have NaN gradients of their own: leave them out.
    x["d_lse"][:, sees] = 0
    clean = run(op, setting, x)
    for name in ("k", "v") if where == "both" else (where,):
        x[name][:, spoilt, 1, 3] = bad
    found = run(op, setting, x)
    np.testing.assert_array_equal(found["out"][:, ~sees], clean["out"][:, ~sees])
    np.testing.assert_array_equal(found["lse"][:, ~sees], clean["lse"][:, ~sees])
    np.testing.assert_array_equal(found["q"][:, ~sees], clean["q"][:, ~sees])
    assert not np.isfinite(found["out"][:, sees][:, :, 2:]).all(-1).any()  # Nor is it hidden from those who do.
    # Keys that share no row with those spoilt rows: no seeing row looks further back than 12.
    free = np.r_[0 : spoilt - 11, spoilt + 12 : 37]
    for name in ("k", "v"):
        np.testing.assert_array_equal(found[name][:, free], clean[name][:, free])


def test_a_spoilt_query_stays_in_its_row(op) -> None:
    setting = SPOILT
    x = arrays(setting)
    clean = run(op, setting, x)
    x["q"][:, 20, 1, 0] = np.nan
    found = run(op, setting, x)
    others = np.arange(37) != 20
    np.testing.assert_array_equal(found["out"][:, others], clean["out"][:, others])
    assert np.isnan(found["out"][:, 20, 1]).all()
    seen = np.zeros((2, 37, 2), bool)
    seen[:, 9:21, 0] = True  # Key head 0 serves query heads 0 and 1; keys 9..20 are what row 20 sees.
    for name in ("k", "v"):
        np.testing.assert_array_equal(found[name][~seen], clean[name][~seen], err_msg=name)
    assert np.isnan(found["v"][seen]).all()


def test_repeats_are_bitwise_equal(op) -> None:
    setting = SETTINGS["packed_window"]
    x = arrays(setting)
    first = run(op, setting, x)
    for _ in range(2):
        for name, a in run(op, setting, x).items():
            np.testing.assert_array_equal(a, first[name], err_msg=name)


@pytest.mark.parametrize("mask", [CAUSAL & masks.sliding_window(9), CAUSAL & masks.segments() & masks.valid(), ~CAUSAL])
def test_the_order_of_tokens_is_what_their_columns_say(op, mask) -> None:
    """Keys in any order give the same, queries in another order their own rows; only columns tell who sees whom."""
    rng, batch = np.random.default_rng(5), 2
    q, k, v = (rng.standard_normal((batch, n, h, 8)).astype(np.float32) for n, h in ((21, 4), (26, 2), (26, 2)))

    def columns(length: int) -> Tokens:
        index = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
        return Tokens(index=index, segment=1 + (index >= 11), valid=rng.random((batch, length)) < 0.8)

    sides = columns(21), columns(26)
    orders = [rng.permuted(np.tile(np.arange(n), (batch, 1)), axis=1) for n in (21, 26)]

    def ordered(x: np.ndarray, order: np.ndarray) -> np.ndarray:
        return x[np.arange(batch)[:, None], order]

    @jax.jit
    def run(q, k, v, sides):
        (out, lse), pull = jax.vjp(lambda *x: op(*x, mask=mask, q_tokens=sides[0], k_tokens=sides[1]), q, k, v)
        return out, lse, *pull((jnp.sin(out), jnp.zeros_like(lse)))

    straight = run(q, k, v, sides)
    mixed = [jax.tree.map(lambda x, o=o: ordered(x, o), side) for side, o in zip(sides, orders, strict=True)]
    found = run(ordered(q, orders[0]), ordered(k, orders[1]), ordered(v, orders[1]), tuple(mixed))
    for a, b, order in zip(found, straight, (orders[0],) * 3 + (orders[1],) * 2, strict=True):
        np.testing.assert_allclose(a, ordered(np.asarray(b), order), atol=2e-5)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=["batch", "queries", "keys"])
def test_empty_inputs(op, shape) -> None:
    batch, length, keys = shape
    q, k = jnp.ones((batch, length, 2, 4)), jnp.ones((batch, keys, 1, 4))
    (out, lse), pull = jax.vjp(lambda q, k: op(q, k, k, mask=masks.everything()), q, k)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert (out == 0).all() and (lse == -jnp.inf).all()
    assert all((g == 0).all() for g in pull((out, jnp.zeros_like(lse))))


def test_finite_differences_of_the_reference() -> None:
    setting = Setting((5, 7, 4, 2, 3, 2), CAUSAL & masks.sliding_window(4), soft_cap=2.0, sinks=True)
    with jax.enable_x64(True):
        x = {name: jnp.asarray(a, jnp.float64) for name, a in arrays(setting).items()}
        x["bias"] = jnp.asarray(np.random.default_rng(1).standard_normal((1, 4, 1, 7)))
        x["slope"] = jnp.asarray(np.random.default_rng(2).standard_normal(4))

        @jax.jit
        def loss(primal):
            slope = primal["slope"]
            out, lse = attention(
                primal["q"], primal["k"], primal["v"], mask=setting.mask, soft_cap=setting.soft_cap,
                sinks=primal["sinks"], bias=primal["bias"], implementation="reference",
                score_mod=lambda s, at: s + jnp.sin(slope[at.head]) * (at.query - at.key) * s,
            )  # fmt: skip
            assert lse.dtype == jnp.float64
            return (out * x["d_out"]).sum() + (lse * x["d_lse"]).sum()

        primal = {name: x[name] for name in ("q", "k", "v", "sinks", "bias", "slope")}
        gradients = jax.grad(loss)(primal)
        rng = np.random.default_rng(3)
        for name in primal:
            direction = jnp.asarray(rng.standard_normal(primal[name].shape))
            ahead, behind = ({**primal, name: primal[name] + h * direction} for h in (1e-5, -1e-5))
            slope = (loss(ahead) - loss(behind)) / 2e-5
            assert float((gradients[name] * direction).sum()) == pytest.approx(float(slope), rel=1e-7, abs=1e-7), name


def test_float64_through_the_blockwise_form(monkeypatch) -> None:
    monkeypatch.setattr(plan, "choose_blocks", lambda q, k, v: 2 * (plan.Blocks(16, 8, 1),))
    setting = SETTINGS["all_at_once"]
    with jax.enable_x64(True):
        x = arrays(setting)
        q_tokens, k_tokens = tokens(setting)
        found = jax.jit(
            lambda q, k, v, sinks: attention(
                q, k, v, mask=setting.mask, q_tokens=q_tokens, k_tokens=k_tokens, soft_cap=setting.soft_cap,
                sinks=sinks, implementation="xla",
            )
        )(x["q"], x["k"], x["v"], x["sinks"])  # fmt: skip
        expected = oracle(setting, x)
        np.testing.assert_allclose(found[0], expected["out"], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(found[1], expected["lse"], rtol=1e-12, atol=1e-13)


def test_a_traced_scale_has_a_gradient(op) -> None:
    setting = SETTINGS["grouped"]
    q, k, v = (jnp.asarray(arrays(setting)[name], jnp.float32) for name in "qkv")
    loss = jax.jit(lambda scale: (op(q, k, v, scale=scale)[0] ** 2).sum())
    slope = (loss(0.301) - loss(0.299)) / 0.002
    assert float(jax.grad(loss)(jnp.float32(0.3))) == pytest.approx(float(slope), rel=2e-2)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("window", [8, 30, 64])
def test_exactly_the_live_blocks_are_visited_once(traced, merge, window) -> None:
    mask = CAUSAL & masks.sliding_window(window)
    shape = (2, 64, 2, 8)

    def visits(index):
        both = Tokens(index=index)
        plans, tables = plan.make(
            mask, both, both, shape, shape, Change(1.0, 0.0, None, False), 2 * (plan.Blocks(8, 8, 2, merge),)
        )

        def count(side, i):
            def step(j, blocks, carry, masked):
                return carry.at[0, j + jnp.arange(blocks)].add(1).at[1].add(masked)

            return plans[side].visit(tables[side].lists, 0, 0, i, step, jnp.zeros((2, 8), jnp.int32))

        return [jnp.stack([count(side, i) for i in range(8)]) for side in (0, 1)]

    index = np.arange(64)[None]
    forward, backward = jax.jit(visits)(index) if traced else visits(index)
    allowed = np.asarray(mask.materialise(64))[0, 0].reshape(8, 8, 8, 8)
    np.testing.assert_array_equal(forward[:, 0], allowed.any((1, 3)))
    np.testing.assert_array_equal(backward[:, 0], allowed.any((1, 3)).T)
    partial = (allowed.any((1, 3)) & ~allowed.all((1, 3))).sum(1)
    assert (forward[:, 1, 0] >= partial).all()
    if merge == 1 and not traced:
        full = allowed.all((1, 3)).sum(1)
        np.testing.assert_array_equal(forward[:, 0].sum(1) - full, partial)


@pytest.mark.parametrize("op", ["reference", "xla_small_blocks"], indirect=True)
def test_inside_scan_remat_and_shard_map(op) -> None:
    setting = SETTINGS["grouped"]
    x = {name: jnp.asarray(a, jnp.float32) for name, a in arrays(setting).items()}

    def layer(h):
        return h + op(h, x["k"], x["v"])[0]

    def stacked(h):
        return jax.lax.scan(lambda h, _: (jax.checkpoint(layer)(h), None), h, None, length=2)[0].sum()

    plain = jax.grad(lambda h: layer(layer(h)).sum())(x["q"])
    np.testing.assert_allclose(jax.jit(jax.grad(stacked))(x["q"]), plain, rtol=1e-5, atol=1e-5)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    spec = PartitionSpec("data")
    sharded = jax.shard_map(lambda q, k, v: op(q, k, v)[0], mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)
    loss = jax.jit(jax.grad(lambda q, k, v: (sharded(q, k, v) ** 2).sum(), (0, 1, 2)))
    expected = jax.grad(lambda q, k, v: (op(q, k, v)[0] ** 2).sum(), (0, 1, 2))(x["q"], x["k"], x["v"])
    for found, right in zip(loss(x["q"], x["k"], x["v"]), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)


def test_temporaries_are_blocks_not_the_map() -> None:
    q = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)
    gradients = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v, implementation="xla")[0].sum(), (0, 1, 2)))
    assert gradients.lower(q, q, q).compile().memory_analysis().temp_size_in_bytes < 64 * 2**20


def test_sparse_masks_get_finer_blocks() -> None:
    """Where a known mask leaves little of the map; not for dense or traced ones, nor finer than a map of fine blocks
    needs. The result is that of the reference."""
    live = np.zeros(64, bool)
    live[np.random.default_rng(0).permutation(64)[:6]] = True
    mask, shape, tokens_ = masks.blocks(live.reshape(8, 8), 128), (1, 1024, 2, 8), Tokens(index=np.arange(1024)[None])
    usual = plan.choose_blocks(shape, shape, shape)

    def chosen(mask, tokens_=tokens_, shape=shape, usual=usual):
        return [(one.q, one.k) for one in plan.adapted(usual, mask, tokens_, tokens_, shape, shape)]

    whole = [(one.q, one.k) for one in usual]
    assert whole == [(512, 512), (256, 512)]
    assert chosen(mask) == [(128, 128)] * 2
    assert chosen(masks.causal()) == chosen(masks.everything()) == whole
    assert chosen(masks.blocks(np.eye(4, dtype=bool), 256)) == [(256, 256)] * 2
    seen = []
    jax.jit(lambda live: seen.append(chosen(masks.blocks(live, 128))))(jnp.asarray(live.reshape(8, 8)))
    assert seen == [whole]
    q = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    def gradient(implementation):
        def loss(q):
            return (attention(q, q, q, mask=mask, implementation=implementation)[0] ** 2).sum()

        return jax.jit(jax.grad(loss))(q)

    expected = gradient("reference")
    assert float(jnp.abs(gradient("xla") - expected).max()) < 1e-5 * float(jnp.abs(expected).max())
