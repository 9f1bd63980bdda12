"""The decode op: every implementation against an independent float64 oracle, kernels interpreted and lowered."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_oracle import LONG, SETTINGS, Setting, inputs, oracle, places
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # The only way to ask for races.
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from kernels import _mosaic_gpu, _triton
from kernels.decode import (
    IMPLEMENTATIONS,
    combine,
    cost,
    decode_attention,
    limits,
    paged_decode_attention,
    pallas_tpu,
    schedule,
)  # fmt: skip
from kernels.platform import compiling_for, interpreted

# Relative RMS of the output against float64, absolute error of lse.
TOLERANCE = {"float32": (2e-6, 1e-5), "bfloat16": (8e-3, 1e-3)}
BLOCK = 16
HOPPER = hasattr(plgpu, "InterpretGPUParams")  # Whether its kernels can be interpreted.

OWN_SIZES = limits.tpu_block, limits.triton_sizes


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Short rows then have several blocks."""

    def triton_sizes(*case):
        sizes = OWN_SIZES[1](*case)
        return sizes and dataclasses.replace(sizes, block=BLOCK)

    monkeypatch.setattr(limits, "XLA_BLOCK", BLOCK)
    monkeypatch.setattr(limits, "tpu_block", lambda *_: BLOCK)
    monkeypatch.setattr(limits, "triton_sizes", triton_sizes)


def attend(setting: Setting, x: dict[str, Any], **options: Any) -> tuple[jax.Array, jax.Array]:
    options |= dict(window=setting.window, soft_cap=setting.soft_cap, starts=x.get("starts"), sinks=x.get("sinks"))
    options["value_width"] = setting.shape[5] if setting.shared else None
    if setting.page:
        return paged_decode_attention(x["q"], x["k"], x.get("v"), x["table"], x["lengths"], **options)
    return decode_attention(x["q"], x["k"], x.get("v"), x["lengths"], **options)


@functools.cache
def compiled(name: str, setting: Setting, splits: int) -> Any:
    return jax.jit(lambda x: attend(setting, x, implementation=name, splits=splits))


def run(name: str, setting: Setting, x: dict[str, np.ndarray], splits: int = 1) -> tuple[np.ndarray, ...]:
    with interpreted():
        return tuple(map(np.asarray, compiled(name, setting, splits)(x)))


def assert_close(found: tuple[np.ndarray, ...], setting: Setting, x: dict[str, np.ndarray], dtype="float32") -> None:
    (out, lse), (right, right_lse) = found, oracle(setting, x)
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == np.float32 and out.shape == right.shape
    error = np.sqrt(np.mean((out.astype(np.float64) - right) ** 2) / np.mean(right**2))
    assert error <= TOLERANCE[dtype][0], f"{error:.1e}"
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(right_lse))
    seen = np.isfinite(right_lse)
    assert np.abs(lse[seen] - right_lse[seen]).max() <= TOLERANCE[dtype][1]
    assert (out[~seen] == 0).all()


CASES = [("triton", setting) for setting in SETTINGS if setting != "wide"]
CASES += [("xla", setting) for setting in SETTINGS if setting not in ("wide", "pages", "latent pages")]
CASES += [("reference", setting) for setting in ("ragged", "capped", "pages of three")]
# Pages of several heads go through the TPU's kernel below, where races are looked for.
CASES += [("pallas_tpu", name) for name in ("ragged", "three queries", "capped", "latent", "latent pages")]


@pytest.mark.parametrize("name, setting", CASES)
def test_float32_agrees_with_the_oracle_and_repeats_itself(name, setting) -> None:
    setting = SETTINGS[setting]
    x = inputs(setting)
    found = run(name, setting, x)
    assert_close(found, setting, x)
    for first, again in zip(found, run(name, setting, x), strict=True):
        np.testing.assert_array_equal(first, again)


BFLOAT16 = [("xla", "pages"), ("triton", "latent pages"), ("triton", "capped")]
BFLOAT16 += [("pallas_tpu", "wide")]


@pytest.mark.parametrize("name, setting", BFLOAT16)
def test_bfloat16_agrees_with_the_oracle(name, setting) -> None:
    x = inputs(SETTINGS[setting], "bfloat16")
    assert_close(run(name, SETTINGS[setting], x), SETTINGS[setting], x, "bfloat16")


if HOPPER:

    @pytest.mark.parametrize("splits, setting", [(1 + 2 * (n % 2), setting) for n, setting in enumerate(LONG)])
    def test_hopper_agrees_with_the_oracle_without_races(setting, splits) -> None:
        x = inputs(LONG[setting], "bfloat16")
        assert_close(run("mosaic_gpu", LONG[setting], x, splits), LONG[setting], x, "bfloat16")


SPLITS = [("xla", "three queries", 5), ("pallas_tpu", "capped", 5)]
SPLITS += [("triton", setting, splits) for setting in ("three queries", "pages") for splits in (2, 5)]


@pytest.mark.parametrize("name, setting, splits", SPLITS)
def test_any_number_of_splits_gives_the_same(name, setting, splits) -> None:
    setting = SETTINGS[setting]
    x = inputs(setting)
    for found, right in zip(run(name, setting, x, splits), run(name, setting, x, 1), strict=True):
        np.testing.assert_allclose(found, right, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if HOPPER or name != "mosaic_gpu"])
def test_what_a_query_may_not_see_never_reaches_it(name) -> None:
    """The last query sees one place more than the first, and a head sees its own keys and values only."""
    setting = SETTINGS["capped"]
    x = inputs(setting, "bfloat16" if name == "mosaic_gpu" else "float32")
    clean, clean_lse = run(name, setting, x)
    row, last = 0, setting.lengths[0] - 1
    for cache, bad in itertools.product("kv", (np.nan, np.inf)):
        spoilt = x | {cache: x[cache].copy()}
        spoilt[cache][row, last, 0, 3] = bad
        out, lse = run(name, setting, spoilt)
        sees = np.zeros(clean_lse.shape, bool)
        sees[row, -1, :2] = True
        np.testing.assert_allclose(out[~sees], clean[~sees], atol=1e-7)
        np.testing.assert_array_equal(lse[~sees], clean_lse[~sees])
        if np.isnan(bad):
            assert np.isnan(out[sees]).any(-1).all()


@pytest.mark.parametrize(
    "mode, kind, splits, calls",
    [("eager", "TPU v5e", 1, 1), ("on_wait", "TPU v5e", 1, 1), ("on_wait", "TPU v5p", 2, 2)],
)
def test_copies_of_pages_have_no_races(mode, kind, splits, calls, monkeypatch) -> None:
    """On one core, and on two with a table too large for their scalar memory."""
    setting = SETTINGS["pages"]
    x = inputs(setting)
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", dma_execution_mode=mode)
    monkeypatch.setattr(pallas_tpu, "interpreting", lambda: params)
    monkeypatch.setattr(limits, "TPU_TABLE", x["table"].size // calls)
    with compiling_for("tpu", kind):
        call = jax.jit(lambda x: attend(setting, x, splits=splits)).trace(x)
        assert str(call.jaxpr).count("pallas_call[") == calls
        found = call.lower(lowering_platforms=("cpu",)).compile()(x)
    assert_close(tuple(map(np.asarray, found)), setting, x)
    assert not interpret_pallas_call.races.races_found


def test_xla_elsewhere_takes_rows_together() -> None:
    setting = SETTINGS["three queries"]
    x = inputs(setting)
    with compiling_for("gpu"):
        found = jax.jit(lambda x: attend(setting, x, implementation="xla", splits=2))(x)
    assert_close(tuple(map(np.asarray, found)), setting, x)


def test_sharded_over_rows_and_heads() -> None:
    setting = SETTINGS["capped"]
    x = inputs(setting)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("rows", "heads"))
    whole, rows = PartitionSpec("rows", None, "heads"), PartitionSpec("rows")
    specs = dict.fromkeys("qkv", whole) | dict(lengths=rows, starts=rows, sinks=PartitionSpec("heads"))
    call = jax.shard_map(
        lambda x: attend(setting, x, implementation="xla"), mesh=mesh, in_specs=(specs,), out_specs=whole
    )
    assert_close(tuple(map(np.asarray, jax.jit(call)(x))), setting, x)


@pytest.mark.parametrize("empty", [(0, "qkvl"), (1, "q"), (1, "kv")])
def test_no_rows_no_queries_no_places(empty) -> None:
    x = {"q": (2, 1, 4, 128), "k": (2, 8, 2, 128), "v": (2, 8, 2, 128), "lengths": (2,)}
    for name, shape in x.items():
        x[name] = tuple(0 if name[0] in empty[1] and axis == empty[0] else n for axis, n in enumerate(shape))
    arrays = {name: jnp.zeros(shape, "int32" if name == "lengths" else "bfloat16") for name, shape in x.items()}
    out, lse = jax.jit(decode_attention)(**arrays)
    assert out.shape == x["q"] and lse.shape == x["q"][:3]
    assert (out == 0).all() and jnp.isneginf(lse).all()
    with interpreted():
        for name in IMPLEMENTATIONS:
            assert jax.eval_shape(functools.partial(decode_attention, implementation=name), **arrays)[0].shape == x["q"]


@pytest.mark.parametrize("setting", ["three queries", "capped", "latent pages"])
def test_gradients_agree_with_finite_differences_of_the_oracle(setting) -> None:
    """What no query may see is NaN or infinite there, and has no gradient."""
    setting = SETTINGS[setting]
    x = inputs(setting)
    names = [name for name in ("q", "k", "v", "sinks") if name in x]
    rng = np.random.default_rng(1)
    out, lse = oracle(setting, x)
    d_out, d_lse = rng.standard_normal(out.shape), np.where(np.isfinite(lse), rng.standard_normal(lse.shape), 0)

    @jax.jit
    def gradients(arrays):
        pull = jax.vjp(lambda arrays: attend(setting, x | arrays, implementation="xla", splits=2), arrays)[1]
        return pull((jnp.asarray(d_out, jnp.float32), jnp.asarray(d_lse, jnp.float32)))[0]

    found = gradients({name: jnp.asarray(x[name]) for name in names})
    wide = {name: x[name].astype(np.float64) for name in names}
    for name in names:
        assert (np.asarray(found[name])[~np.isfinite(x[name])] == 0).all()
        direction = rng.standard_normal(x[name].shape)
        values = []
        for step in (1e-6, -1e-6):
            out, lse = oracle(setting, x | wide | {name: wide[name] + step * direction})
            values.append((out * d_out).sum() + (np.where(np.isfinite(lse), lse, 0) * d_lse).sum())
        right = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose((np.asarray(found[name]) * direction).sum(), right, rtol=2e-4, atol=1e-4)


def shapes(q, k, v=None, table=None, dtype="float32") -> tuple[Any, ...]:
    struct = jax.ShapeDtypeStruct
    caches = [None if shape is None else struct(shape, dtype) for shape in (k, v)]
    tables = [] if table is None else [struct(table, "int32")]
    return struct(q, dtype), *caches, *tables, struct(q[:1], "int32")


Q, K = (2, 1, 8, 128), (2, 32, 2, 128)
REFUSALS = {
    "reference": [(shapes(Q, K, K), dict(splits=2), "leave splits out")],
    "pallas_tpu": [
        (shapes(Q, K, K, dtype="float16"), {}, "bfloat16 and float32, not in float16"),
        (shapes((2, 1, 8, 192), (2, 32, 2, 192), K), {}, "pad both to a multiple of 128"),
        (shapes((2, 300, 8, 128), (2, 32, 8, 128), (2, 32, 8, 128)), {}, "made for a few queries"),
        (shapes((2, 1, 8, 64), (9, 16, 2, 64), (9, 16, 2, 64), (2, 4)), {}, "pages of width 64 are scattered"),
        (shapes((2, 1, 6, 128), (9, 16, 3, 128), (9, 16, 3, 128), (2, 4)), {}, "pages of 3 key/value heads"),
        (shapes(Q, (9, 2, 2, 128), (9, 2, 2, 128), (2, 4)), {}, "must fill tiles of 8 rows"),
        (shapes(Q, (9, 16, 8, 128), (9, 16, 8, 128), (2, 1 << 18)), {}, "make pages larger"),
    ],
    "mosaic_gpu": [
        (shapes(Q, K, K), {}, "bfloat16 and float16, not in float32"),
        (shapes((2, 1, 8, 80), (2, 32, 2, 80), (2, 32, 2, 80), dtype="float16"), {}, "multiples of 64"),
        (shapes((2, 1, 8, 448), (2, 32, 1, 448), dtype="float16"), dict(value_width=320), "of 128 for values"),
        (shapes(Q, (2, 31, 2, 128), (2, 31, 2, 128), dtype="float16"), {}, "a cache of 31 places"),
        (shapes(Q, (9, 4, 2, 128), (9, 4, 2, 128), (2, 4), dtype="float16"), {}, "pages of 4 places"),
        (shapes((2, 1, 8, 640), (2, 32, 1, 640), dtype="float16"), dict(value_width=640), "too much for registers"),
        (shapes((2, 1, 8, 640), (2, 32, 1, 640), dtype="float16"), dict(value_width=512), "or shared memory"),
    ],
    "triton": [
        (shapes((2, 1, 8, 1024), (2, 32, 2, 1024), (2, 32, 2, 1024)), {}, "too much for registers"),
        (shapes((2, 1, 8, 2048), (2, 32, 1, 2048)), dict(value_width=512), "shared memory"),
    ],
}


@pytest.mark.parametrize(
    "name, case, options, reason", [(name, *refusal) for name, refusals in REFUSALS.items() for refusal in refusals]
)
def test_what_cannot_be_done_is_refused_with_the_reason(name, case, options, reason) -> None:
    op = paged_decode_attention if len(case) == 5 else decode_attention
    with interpreted(), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(functools.partial(op, implementation=name, **options), *case)


def test_kernels_run_on_their_platforms_only() -> None:
    x = inputs(SETTINGS["capped"])
    for name in ("pallas_tpu", "mosaic_gpu", "triton"):
        with pytest.raises(NotImplementedError, match="not on cpu"):
            attend(SETTINGS["capped"], x, implementation=name)


MISFITS = [
    (shapes((2, 1, 8), K, K), {}, "four axes"),
    (shapes((3, 1, 8, 128), K, K), {}, "differ in batch"),
    (shapes(Q, K, (2, 31, 2, 128)), {}, "differ in batch, length or heads"),
    (shapes((2, 1, 8, 64), K, K), {}, "differ in width"),
    (shapes((2, 1, 7, 128), K, K), {}, "2 key heads do not divide 7"),
    (shapes(Q, K), {}, "without v, value_width"),
    (shapes(Q, K), dict(value_width=129), "1 to 128 columns"),
    (shapes(Q, K, K), dict(value_width=64), "leave it out"),
    (shapes(Q, K, K), dict(window=0), "at least 1 token"),
    (shapes(Q, K, K), dict(splits=0), "splits must be at least 1"),
    (shapes(Q, K, K), dict(sinks=jnp.zeros(7)), "one logit per query head"),
    (shapes(Q, K, K), dict(starts=jnp.zeros(2)), "starts must be 2 integers"),
    (shapes(Q, K, K, dtype="int32"), {}, "share one float type"),
    (shapes(Q, (9, 16, 2, 128), (9, 16, 2, 128), (3, 4)), {}, "block_table must be integers"),
]


@pytest.mark.parametrize("case, options, message", MISFITS)
def test_misfits_are_named(case, options, message) -> None:
    op = paged_decode_attention if len(case) == 5 else decode_attention
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(op, **options), *case)


LOWERED = {
    "latent": (shapes((2, 2, 16, 576), (2, 4096, 1, 576), dtype="bfloat16"), dict(value_width=512)),
    "pages": (
        shapes((2, 1, 32, 128), (99, 16, 8, 128), (99, 16, 8, 128), (2, 256), dtype="bfloat16"),
        dict(window=999),
    ),
}


@pytest.mark.parametrize("case", LOWERED)
def test_lowered_for_chips_that_are_not_there(case, monkeypatch) -> None:
    arguments, options = LOWERED[case]
    monkeypatch.setattr(limits, "tpu_block", OWN_SIZES[0])
    monkeypatch.setattr(limits, "triton_sizes", OWN_SIZES[1])
    op = paged_decode_attention if len(arguments) == 5 else decode_attention

    def lowered(platform, kind, lowering, **more):
        with compiling_for(platform, kind):
            traced = jax.jit(functools.partial(op, **options, **more)).trace(*arguments)
            return traced.lower(lowering_platforms=(lowering,))

    assert lowered("tpu", "TPU v5e", "tpu").as_text().count("tpu_custom_call") == 1  # Chosen, not named.
    assert lowered("gpu", "NVIDIA H200", "cuda").as_text().count("stablehlo.custom_call @mosaic_gpu") == 1
    attend, together = _triton.ptx(lowered("gpu", "NVIDIA H200", "cuda", implementation="triton"))
    assert ".target sm_90" in attend and "mma.sync" in attend and "cp.async" in attend
    assert "mma.sync" not in together


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("page", [0, 16, 128])
def test_blocks_fit_the_shared_memory_of_a_hopper(page, shared) -> None:
    for width, value_width in itertools.product(range(64, 1025, 64), (64, 128, 256, 384, 512)):
        sizes = limits.hopper_sizes(width, value_width, shared, page)
        if sizes is None or (shared and value_width > width):
            continue
        columns = width + (0 if shared else value_width)
        reading = 2 * 64 * width + sizes.stages * sizes.block * 2 * columns
        writing = 4 * 64 * value_width + 4 * 64  # In the same place, later.
        spoilt = 4 * sizes.groups * sizes.block
        assert sizes.stages >= 2 and max(reading, writing) + spoilt + 512 <= _mosaic_gpu.SHARED_BYTES
        assert sizes.block % max(page % sizes.block, 8) == 0 and sizes.pieces == max(
            1, sizes.block // (page or sizes.block)
        )
    assert limits.hopper_sizes(576, 512, True, page) is not None, "the latent of DeepSeek-V2"


@pytest.mark.parametrize(
    "tiles, blocks, parallel, splits",
    [(64, 512, 132, 2), (132, 512, 132, 1), (106, 512, 132, 1), (105, 512, 132, 5), (1, 4, 132, 1), (1, 5, 132, 5),
     (8, 1024, 132, 15), (1, 1024, 132, 109), (1, 9999, 2, 2), (0, 99, 132, 1), (64, 512, 108, 3)],
)  # fmt: skip
def test_number_of_splits(tiles, blocks, parallel, splits) -> None:
    assert schedule.choose_splits(tiles, blocks, parallel) == splits


def test_units_of_devices() -> None:
    assert [
        schedule.units(kind)
        for kind in ("NVIDIA H200", "NVIDIA H100 PCIe", "TPU v5 lite", "TPU v5", "TPU v5p", "TPU v6 lite", "?")
    ] == [132, 114, 1, 2, 2, 1, 108]


@pytest.mark.parametrize("splits, window", [(1, 0), (2, 0), (5, 30)])
def test_parts_are_the_live_blocks_once_each(splits, window) -> None:
    lengths, starts = (jnp.array(x, jnp.int32) for x in ((0, 1, 15, 16, 17, 100, 40), (0, 0, 0, 0, 16, 3, 50)))
    cut = jax.jit(lambda *rows: schedule.parts(*schedule.visible(*rows, 2, window, 96), 16, splits))
    begin, count = map(np.asarray, cut(lengths, starts))
    for row in range(7):
        found = [block for b, n in zip(begin[row], count[row], strict=True) for block in range(b, b + n)]
        live = set()
        for query in range(2):
            own = int(lengths[row]) - 2 + query
            low = max(starts[row], own - window + 1 if window else 0)
            live |= {place // 16 for place in range(low, min(own + 1, 96))}
        assert found == sorted(live)
    for groups in (1, 7):
        after = np.asarray(schedule.next_live(jnp.asarray(count.reshape(-1)), groups))
        for piece, then in enumerate(after):
            end = count.size if groups == 1 else (piece // splits + 1) * splits
            later = [n for n in range(piece + 1, end) if count.flat[n]]
            assert then == (later[0] if later else piece)


@jax.jit
def _combined(outs, lses):
    return combine(outs, lses)


@hypothesis_settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.floats(-80, 80, width=32), max_size=4), min_size=5, max_size=5), st.integers(0, 2**31))
def test_combining_sets_is_attention_to_all_of_them(sets, seed) -> None:
    rng = np.random.default_rng(seed)
    values = [rng.standard_normal((len(s), 3)) for s in sets]
    outs, lses = np.full((5, 3), np.nan, np.float32), np.full(5, -np.inf, np.float32)
    for i, (s, v) in enumerate(zip(sets, values, strict=True)):
        if s:
            weights = np.exp(np.float64(s))
            outs[i], lses[i] = weights @ v / weights.sum(), np.log(weights.sum())
    out, lse = _combined(outs, lses)
    weights = np.exp(np.concatenate([np.float64(s) for s in sets]))
    if weights.size:
        np.testing.assert_allclose(out, weights @ np.concatenate(values) / weights.sum(), atol=2e-5)
        np.testing.assert_allclose(lse, np.log(weights.sum()), rtol=1e-6, atol=1e-6)
    else:
        assert (out == 0).all() and lse == -np.inf


def test_combining_has_derivatives() -> None:
    lses = jnp.array([[0.5, -jnp.inf, -jnp.inf], [1.0, 2.0, -jnp.inf]])
    weights = jax.nn.softmax(lses[:, 0])
    outs = jnp.arange(6.0).reshape(2, 3, 1)
    d_outs, d_lses = jax.grad(lambda *x: combine(*x)[0].sum(), (0, 1))(outs, lses)
    np.testing.assert_allclose(d_outs[..., 0], [[weights[0], 0, 0], [weights[1], 1, 0]], rtol=1e-6)
    slope = weights[0] * weights[1] * (outs[0, 0, 0] - outs[1, 0, 0])
    np.testing.assert_allclose(d_lses, [[slope, 0, 0], [-slope, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("setting", ["ragged", "three queries", "capped"])
def test_cost_counts_what_is_seen(setting) -> None:
    setting = SETTINGS[setting]
    queries, _, heads, kv_heads, width, value_width = setting.shape
    options = dict(window=setting.window or 0, starts=setting.starts or 0)
    seen = [[set(places(setting, row, t)) for t in range(queries)] for row in range(len(setting.lengths))]
    pairs, keys = sum(len(s) for row in seen for s in row), sum(len(set().union(*row)) for row in seen)
    assert cost.pairs(setting.lengths, queries, **options) == pairs
    assert cost.keys(setting.lengths, queries, **options) == keys
    q = (len(setting.lengths), queries, heads, width)
    assert cost.flops(q, value_width, pairs) == heads * pairs * 2 * (width + value_width)
    moved = 2 * (
        keys * kv_heads * (width + value_width) + len(setting.lengths) * queries * heads * (width + value_width)
    )
    assert cost.bytes(q, kv_heads, value_width, keys) == moved + 4 * len(setting.lengths) * queries * heads


def test_cost_of_a_latent_cache_counts_a_token_once() -> None:
    args = ((1, 1, 16, 576), 1, 512)
    assert cost.bytes(*args, 1001, shared=True) - cost.bytes(*args, 1, shared=True) == 1000 * 576 * 2
