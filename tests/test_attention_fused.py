"""What is done around every attention kernel, through a stand-in for a kernel: against the float64 oracle, and against
the reference where functions on scores are concerned."""

import functools
import itertools

import attention_kernel_standin as standin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_attention_op as op_tests
import test_attention_scores as score_tests
from attention_oracle import SETTINGS, arrays, oracle, tokens

from kernels import dispatch
from kernels.attention import IMPLEMENTATIONS, attention, capabilities, cudnn, dropout, fused, masks, program, worklist
from kernels.platform import compiling_for
from kernels.tokens import Tokens, sequence


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(
        IMPLEMENTATIONS,
        "stand_in",
        dispatch.Implementation("stand_in", functools.partial(fused.attention, standin), lambda case: None),
    )


def run(setting, x):
    q_tokens, k_tokens = tokens(setting, x["q"].shape[0])
    names = ["q", "k", "v", *(["sinks"] if setting.sinks else [])]

    def forward(primal):
        return attention(
            **primal, mask=setting.mask, q_tokens=q_tokens, k_tokens=k_tokens, soft_cap=setting.soft_cap,
            scale=setting.scale, implementation="stand_in",
        )  # fmt: skip

    @jax.jit
    def forward_and_gradients(primal, d_out, d_lse):
        (out, lse), pull = jax.vjp(forward, primal)
        return out, lse, pull((d_out, d_lse))[0]

    primal = {name: jnp.asarray(x[name], jnp.float32) for name in names}
    arrived = (jnp.asarray(x[name], jnp.float32) for name in ("d_out", "d_lse"))
    out, lse, gradients = forward_and_gradients(primal, *arrived)
    return {name: np.asarray(a, np.float64) for name, a in {"out": out, "lse": lse, **gradients}.items()}


@pytest.mark.parametrize(
    "name", ["all_at_once", "one_token", "decode", "fewer_keys", "value_wider", "nothing_with_sinks"]
)
def test_it_agrees_with_the_oracle(stand_in, name):
    x = arrays(SETTINGS[name])
    op_tests.assert_close(run(SETTINGS[name], x), oracle(SETTINGS[name], x))


def test_what_a_row_may_not_see_never_reaches_it(stand_in):
    setting = op_tests.SPOILT
    x, spoilt = arrays(setting, batch=1), 20
    sees = np.zeros(37, bool)
    sees[spoilt : spoilt + 12] = True
    x["d_out"][:, sees] = 0
    x["d_lse"][:, sees] = 0
    clean = run(setting, x)
    x["k"][:, spoilt, 1, 3], x["v"][:, spoilt, 1, 2], x["v"][:, spoilt, 0, 2] = np.nan, np.inf, -np.inf
    found = run(setting, x)
    for name in ("out", "lse", "q"):
        np.testing.assert_array_equal(found[name][:, ~sees], clean[name][:, ~sees])
    assert not np.isfinite(found["out"][:, sees]).any()
    free = np.r_[0 : spoilt - 11, spoilt + 12 : 37]
    for name in ("k", "v"):
        np.testing.assert_array_equal(found[name][:, free], clean[name][:, free])


@pytest.mark.parametrize("mask", ["window", "blocks"])
def test_functions_on_scores_biases_and_their_gradients(stand_in, mask):
    """Gathers by head, batch row and column of tokens happen outside of kernels; those by distance are refused."""

    def mixed(scores, at, slope, table, gain):
        near = table[at.batch, at.head, jnp.clip(at.query, 0, 7)]
        late = jnp.where(at.k.position[:, None, None, :] > 3, gain[at.key], 0.0) * at.q.frame[:, None, :, None]
        far = slope[at.head] * (at.query - at.key)
        return scores * (1 + 0.1 * jnp.tanh(slope[at.head] * scores)) + near + late + 0.1 * far

    chosen = score_tests.MASKS[mask] if mask == "window" else masks.causal() | masks.prefix(3)
    primal = {name: x.astype(jnp.float32) for name, x in score_tests.inputs().items()}
    for shape in ((1, 4, 1, 27), (2, 1, 21, 27), (1, 1, 21, 1)):
        primal["bias"] = jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.float32)
        found, right = (
            score_tests.gradients(name, chosen, primal, soft_cap=2.0, function=mixed)
            for name in ("stand_in", "reference")
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
            assert float(jnp.abs(a - b).max()) < 2e-5 * max(float(jnp.abs(b).max()), 1)
        if mask == "window":
            break


def test_what_is_not_elementwise_is_refused_before_anything_is_computed():
    q = jnp.ones((1, 8, 2, 4))
    table = jnp.ones(16)
    by_distance = dict(score_mod=lambda s, at, table: s + table[at.query - at.key], score_arrays=(table,))
    with compiling_for("tpu", "TPU v5e"), pytest.raises(NotImplementedError, match="as a lookup by pair does"):
        attention(q, q, q, implementation="pallas_tpu", **by_distance)
    with compiling_for("tpu", "TPU v5e"):
        assert attention(q, q, q, **by_distance)[0].shape == q.shape  # Another one is chosen.
    turned = dict(score_mod=lambda s, at: s.swapaxes(2, 3))
    with compiling_for("tpu", "TPU v5e"), pytest.raises(NotImplementedError, match="score_mod uses 'transpose'"):
        attention(q, q, q, implementation="pallas_tpu", **turned)


REFUSALS = [
    ("mosaic_gpu", "NVIDIA A100", {}, "made for Hopper GPUs, not for NVIDIA A100"),
    ("mosaic_gpu", "NVIDIA H200", {"dtype": "float32"}, "float32 inputs; it does bfloat16, float16"),
    ("mosaic_gpu", "NVIDIA H200", {"width": 320}, "keys of width 320; at most 256"),
    ("triton", "NVIDIA A100", {"dtype": "float64"}, "float64 inputs"),
    ("cudnn", "NVIDIA H200", {"mask": masks.causal() | masks.prefix(2)}, "it does full attention, and causal"),
    ("cudnn", "NVIDIA H200", {"soft_cap": 3.0}, "scores changed by"),
    ("cudnn", "NVIDIA H200", {"sinks": True}, "sinks"),
    ("cudnn", "NVIDIA H200", {"dropout": 0.1}, "dropout"),
]


@pytest.mark.parametrize("name, kind, change, message", REFUSALS)
def test_refusals_say_why(name, kind, change, message):
    shape = (1, 16, 2, change.pop("width", 64))
    settings = dict(
        q=shape, k=shape, v=shape, dtype="bfloat16", mask=masks.causal(), tokens=2 * (sequence(16),), soft_cap=0.0,
        sinks=False, bias=False, score_mod=False, dropout=0.0, program=lambda: None,
    )  # fmt: skip
    case = capabilities.Case(**{**settings, **change})
    with compiling_for("gpu", kind):
        assert message in capabilities.CAPABILITIES[name].refuses(case)
        if name == "cudnn":
            assert capabilities.CAPABILITIES[name].refuses(capabilities.Case(**settings)) is None


def test_kernels_of_other_platforms_are_refused_by_name():
    q = jnp.ones((1, 8, 2, 4))
    with pytest.raises(NotImplementedError, match="'pallas_tpu' cannot do this case: it runs on tpu, not on cpu"):
        attention(q, q, q, implementation="pallas_tpu")


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_is_asked_for_the_right_thing(monkeypatch, causal, window):
    """What cuDNN is given, in jax's own terms, is what the mask says; a gradient of lse is refused."""
    if window and not causal:
        return

    def stand_in(scale, causal, window, q, k, v):
        size = None if window is None else (window - 1, 0)
        out, lse = jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=causal, local_window_size=size, implementation="xla", return_residual=True
        )
        return out, lse

    monkeypatch.setattr(cudnn, "call", stand_in)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 16, n, 8)), jnp.float32) for n in (4, 2, 2))
    mask = masks.causal() if causal else masks.everything()
    mask = mask if window is None else mask & masks.sliding_window(window)
    both = sequence(16)

    def through(function, *options):
        def loss(q, k, v):
            return (function(q, k, v, mask=mask, **dict(options))[0] ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    found = through(functools.partial(cudnn.attention, scale=0.3))
    right = through(functools.partial(attention, scale=0.3, implementation="reference", q_tokens=both, k_tokens=both))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    with pytest.raises(NotImplementedError, match="no gradient of lse"):
        jax.grad(lambda q: cudnn.attention(q, k, v, mask=mask, scale=0.3)[1].sum())(q)


@pytest.mark.parametrize("traced", [False, True])
def test_lists_hold_every_live_block_once_and_full_ones_first(traced):
    rng = np.random.default_rng(0)
    status = rng.integers(0, 3, (2, 3, 5, 7)).astype(np.int8)
    status[0, 0, 1] = masks.EMPTY
    made = (jax.jit(worklist.lists) if traced else worklist.lists)(status)
    for visits, seen in ((made.by_query, status), (made.by_key, status.swapaxes(2, 3))):
        order, full, live = map(np.asarray, visits)
        for at in itertools.product(*map(range, seen.shape[:3])):
            listed = order[at][: live[at]]
            assert sorted(listed) == list(np.flatnonzero(seen[at]))
            assert set(listed[: full[at]]) == set(np.flatnonzero(seen[at] == masks.FULL))
            assert (order[at][live[at] :] == (listed[-1] if len(listed) else 0)).all()
    assert traced or made.by_query.order.shape[-1] == (status != masks.EMPTY).sum(-1).max()


def test_a_last_block_with_places_beyond_the_keys_is_partial():
    columns = masks.everything().prepare(*2 * (sequence(20),))
    assert (worklist.classes(masks.everything(), columns, 20, 20, 8, 8)[..., -1] == masks.PARTIAL).all()
    assert (worklist.classes(masks.everything(), columns, 20, 20, 10, 10) == masks.FULL).all()


@pytest.mark.parametrize("implementation", ["stand_in", "xla"])
def test_dropout_is_one_pattern_everywhere(stand_in, implementation, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 37, n, 8)), jnp.float32) for n in (4, 2, 2))

    def loss(name, q, k, v, seed=3):
        out, lse = attention(q, k, v, dropout=0.4, dropout_seed=seed, implementation=name)
        return (out * jnp.cos(jnp.arange(8))).sum() + jnp.sin(lse).sum(), (out, lse)

    def all_of(name, **options):
        return jax.jit(jax.grad(functools.partial(loss, name, **options), (0, 1, 2), has_aux=True))(q, k, v)

    right = all_of("reference")
    if implementation == "xla":
        monkeypatch.setattr(op_tests.plan, "choose_blocks", lambda q, k, v: 2 * (op_tests.SMALL,))
    for a, b in zip(jax.tree.leaves(all_of(implementation)), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    plain = attention(q, k, v, implementation="reference")
    np.testing.assert_array_equal(right[1][1], plain[1])  # lse knows nothing of dropout.
    assert float(jnp.abs(right[1][0] - plain[0]).max()) > 0.1
    assert float(jnp.abs(all_of("reference", seed=4)[1][0] - right[1][0]).max()) > 0.1


def test_dropout_drops_what_it_says_and_independently():
    rows, keys = dropout.columns(7, 2, 4, 256, 256)
    kept = np.asarray(dropout.kept(rows[..., None], keys[..., None, :], 0.3)).astype(np.float64)
    error = 3 * np.sqrt(0.21)
    assert abs(kept.mean() - 0.7) < error / np.sqrt(kept.size)
    # Sums over any axis scatter as independent draws do, and neighbours are not alike.
    for axis in range(4):
        n = kept.shape[axis]
        assert 0.9 < kept.sum(axis).var() / (n * 0.21) < 1.1 or n < 8
    for axis in (0, 1, 2, 3):
        moved = np.roll(kept, 1, axis)
        assert abs(((kept - 0.7) * (moved - 0.7)).mean()) < 5 * 0.21 / np.sqrt(kept.size)
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
        attention(*3 * (jnp.ones((1, 4, 1, 4)),), dropout=1.0)


def test_the_program_of_a_mask_is_its_rule():
    """Whatever the mask, blocks of the program answer as the mask does on the whole map."""
    rng = np.random.default_rng(0)
    tokens_ = Tokens(
        index=np.arange(12)[None], segment=jnp.asarray(rng.integers(0, 3, (2, 12))), frame=np.arange(12)[None] // 6,
        modality=jnp.asarray(rng.integers(0, 2, (2, 12))), prompt=jnp.asarray(rng.random((2, 12)) < 0.5),
    )  # fmt: skip
    expressions = [
        masks.causal() & masks.segments() & masks.valid(), masks.causal() | masks.frames(),
        masks.causal() | masks.across_modalities(0, 1), masks.causal() & masks.composite(1), masks.prefix(),
        ~masks.causal(), masks.causal() & masks.head_windows([1, 2, 3, 30], 1),
        masks.keys(rng.random((2, 4, 12)) < 0.5), masks.spans_of_keys(rng.integers(0, 5, 12), rng.integers(5, 12, 12)),
    ]  # fmt: skip
    for mask in expressions:
        made, streams = program.build(
            (2, 12, 4, 8), (2, 12, 2, 8), mask=mask, q_tokens=tokens_, k_tokens=tokens_, scale=1.0, soft_cap=0.0,
            bias=None, score_mod=None, score_arrays=(),
        )  # fmt: skip
        expected = np.broadcast_to(mask.allowed(tokens_, tokens_), (2, 4, 12, 12))
        for b, h in np.ndindex(2, 4):
            rows, cols = ([np.broadcast_to(x, (2, 4, 12))[b, h] for x in side] for side in streams[:2])
            rows, cols = [x[3:9, None] for x in rows], [x[None, 2:12] for x in cols]
            np.testing.assert_array_equal(made.allowed(rows, cols) & np.ones((6, 10), bool), expected[b, h, 3:9, 2:12])


def test_lists_of_blocks_decide_which_blocks_are_visited(stand_in):
    """Kernel blocks lie within the blocks of a list; rules beside it are evaluated by pair; traced lists too."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 80, n, 8)), jnp.float32) for n in (4, 2, 2))
    live = rng.random((1, 4, 5, 3)) < 0.4

    def out(name, live):
        mask = masks.blocks(live, 16, 32) & masks.causal() & masks.sliding_window(37)
        return attention(q, k, v, mask=mask, implementation=name)

    for found in (out("stand_in", live), jax.jit(functools.partial(out, "stand_in"))(live)):
        for a, b in zip(found, out("reference", live), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    whole, tokens_ = masks.blocks(np.ones((4, 4), bool), 24), sequence(80)
    with pytest.raises(NotImplementedError, match="a kernel's blocks are multiples of 16"):
        fused.divided(whole, tokens_, tokens_)
    with pytest.raises(NotImplementedError, match="not known to begin where a block does"):
        fused.divided(masks.blocks(live, 16, 32), sequence(80, 8), tokens_)
    with pytest.raises(NotImplementedError, match="on pairs of queries and keys"):
        out_of = masks.blocks(live, 16, 32) | masks.causal()
        attention(q, k, v, mask=out_of, implementation="stand_in")


def test_what_belongs_to_rows_or_keys_alone_never_becomes_a_map():
    """Broadcast early or late, it enters as a column."""

    def early(s, at, slope):
        row = jnp.broadcast_to(0.5 * at.query, s.shape)
        return s + jnp.log2(1 + row * 2) + jnp.broadcast_to(slope[at.head] * at.key, s.shape).clip(0, 9)

    both = sequence(12)
    slope = jnp.arange(4.0)
    made, streams = program.build(
        (2, 12, 4, 8), (2, 12, 2, 8), mask=masks.causal(), q_tokens=both, k_tokens=both, scale=1.0, soft_cap=0.0,
        bias=None, score_mod=early, score_arrays=(slope,),
    )  # fmt: skip
    assert streams.tile is None and not made.has_tile
    s, at = jnp.zeros((12, 12)), np.arange(12)
    for h in range(4):
        rows, cols = ([np.broadcast_to(x, (2, 4, 12))[0, h] for x in side] for side in streams[:2])
        found = made.scores(s, [x[:, None] for x in rows], [x[None] for x in cols])
        np.testing.assert_allclose(found, np.log2(1 + at)[:, None] + np.clip(h * at, 0, 9), rtol=1e-6)
