"""The latent decode op: every implementation against an independent float64 oracle, kernels interpreted and lowered."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, PartitionSpec
from latent_decode_oracle import FP8, LONG, SETTINGS, Setting, inputs, oracle, places

from kernels import _mosaic_gpu, _triton
from kernels.latent_decode import (
    IMPLEMENTATIONS,
    Quantised,
    cost,
    dequantise,
    latent_decode,
    limits,
    paged_latent_decode,
    quantise,
)  # fmt: skip
from kernels.platform import compiling_for, interpreted
from kernels.tolerance import relative_error, tolerance

BLOCK = 16
HOPPER = hasattr(plgpu, "InterpretGPUParams")  # Whether its kernels can be interpreted.
OWN_SIZES = limits.tpu_block, limits.triton_sizes


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Short rows then have several blocks."""
    monkeypatch.setattr(limits, "XLA_BLOCK", BLOCK)

    def triton_sizes(*case):
        sizes = OWN_SIZES[1](*case)
        return sizes and dataclasses.replace(sizes, block=BLOCK)

    monkeypatch.setattr(limits, "triton_sizes", triton_sizes)
    monkeypatch.setattr(limits, "tpu_block", lambda rows, width, page, slots: 2 * page or BLOCK)


def attend(setting: Setting, x: dict[str, Any], **options: Any) -> tuple[jax.Array, jax.Array]:
    options |= dict(window=setting.window, soft_cap=setting.soft_cap, starts=x.get("starts"), scale=setting.scale)
    cache = Quantised(x["values"], x["scales"]) if "scales" in x else x["values"]
    tables = [x["table"]] if setting.page else []
    op = paged_latent_decode if setting.page else latent_decode
    return op(x["q"], x["q_rope"], cache, x["rope"], *tables, x["lengths"], **options)


@functools.cache
def compiled(name: str, setting: Setting, splits: int) -> Any:
    return jax.jit(lambda x: attend(setting, x, implementation=name, splits=splits))


def run(name: str, setting: Setting, x: dict[str, np.ndarray], splits: int = 1) -> tuple[np.ndarray, ...]:
    with interpreted():
        return tuple(map(np.asarray, compiled(name, setting, splits)(x)))


def assert_close(found: tuple[np.ndarray, ...], setting: Setting, x: dict[str, np.ndarray]) -> None:
    (out, lse), (right, right_lse), limit = found, oracle(setting, x), tolerance(x["q"].dtype)
    assert out.dtype == x["q"].dtype and lse.dtype == np.float32
    assert relative_error(out, right) <= limit.out
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(right_lse))
    seen = np.isfinite(right_lse)
    assert np.abs(lse[seen] - right_lse[seen]).max() <= limit.lse
    assert (out[~seen] == 0).all()


# Those with splits are below.
CASES = [("triton", name) for name in ("ragged", "slices", "tpla", "pages")]
CASES += [("xla", name) for name in ("ragged", "slices", "pages", "slices in pages")]
CASES += [("pallas_tpu", name) for name in ("three queries", "mla", "large pages of slices")]
CASES += [("reference", name) for name in ("three queries", "slices in pages")]


@pytest.mark.parametrize("name, setting", CASES)
def test_float32_agrees_with_the_oracle_and_repeats_itself(name, setting) -> None:
    setting = SETTINGS[setting]
    x = inputs(setting)
    found = run(name, setting, x)
    assert_close(found, setting, x)
    for first, again in zip(found, run(name, setting, x), strict=True):
        np.testing.assert_array_equal(first, again)


BFLOAT16 = [("triton", "slices"), ("xla", "slices"), ("pallas_tpu", "tpla")]


@pytest.mark.parametrize("name, setting", BFLOAT16)
def test_bfloat16_agrees_with_the_oracle(name, setting) -> None:
    x = inputs(SETTINGS[setting], "bfloat16")
    assert_close(run(name, SETTINGS[setting], x), SETTINGS[setting], x)


if HOPPER:

    @pytest.mark.parametrize("splits, setting", [(1 + n % 2, setting) for n, setting in enumerate(LONG)])
    def test_hopper_agrees_with_the_oracle_without_races(setting, splits) -> None:
        x = inputs(LONG[setting], "bfloat16")
        assert_close(run("mosaic_gpu", LONG[setting], x, splits), LONG[setting], x)


SPLITS = [("triton", "three queries", 5), ("triton", "slices in pages", 2)]
SPLITS += [("pallas_tpu", "large pages", 3), ("xla", "three queries", 5)]


@pytest.mark.parametrize("name, setting, splits", SPLITS)
def test_any_number_of_splits_gives_the_same(name, setting, splits) -> None:
    x = inputs(SETTINGS[setting])
    assert_close(run(name, SETTINGS[setting], x, splits), SETTINGS[setting], x)


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if HOPPER or name != "mosaic_gpu"])
def test_what_a_query_may_not_see_never_reaches_it(name) -> None:
    """The last query sees one place more than the first, and a head sees its own slice only."""
    setting = LONG["many rows of slices"] if name == "mosaic_gpu" else SETTINGS["slices"]
    x = inputs(setting, "bfloat16" if name == "mosaic_gpu" else "float32")
    clean, clean_lse = run(name, setting, x)
    row, last = 0, setting.lengths[0] - 1
    for cache in ("values", "scales", "rope"):
        spoilt = x | {cache: x[cache].copy()}
        at = (row, last) if cache == "rope" else (row, last, 0)
        spoilt[cache][at] = np.nan
        out, lse = run(name, setting, spoilt)
        sees = np.zeros(clean_lse.shape, bool)
        sees[row, -1, : None if cache == "rope" else setting.shape[2] // 2] = True
        np.testing.assert_allclose(out[~sees], clean[~sees], atol=1e-7)
        np.testing.assert_array_equal(lse[~sees], clean_lse[~sees])
        if (name, cache) != ("triton", "values"):  # A GPU's NaN is 480 to Triton's interpreter.
            assert np.isnan(out[sees]).any(-1).all()


def test_xla_elsewhere_takes_rows_together() -> None:
    setting = SETTINGS["three queries"]
    x = inputs(setting)
    with compiling_for("gpu"):
        found = jax.jit(lambda x: attend(setting, x, implementation="xla", splits=2))(x)
    assert_close(tuple(map(np.asarray, found)), setting, x)


def test_a_plain_cache_is_joined_and_given_to_decode() -> None:
    setting = SETTINGS["slices in pages"]
    x = inputs(setting)
    right = run("reference", setting, x)
    scales = np.repeat(x.pop("scales"), setting.shape[4] // setting.blocks, -1)
    x["values"] = x["values"].astype(np.float32) * scales
    for found, quantised in zip(
        jax.jit(functools.partial(attend, setting, implementation="reference"))(x), right, strict=True
    ):
        np.testing.assert_allclose(found, quantised, atol=2e-6)


@pytest.mark.parametrize("empty", [(0, ("q", "q_rope", "values", "scales", "rope", "lengths")), (1, ("q", "q_rope")),
                                   (1, ("values", "scales", "rope"))])  # fmt: skip
def test_no_rows_no_queries_no_places(empty) -> None:
    x = {name: list(np.shape(array)) for name, array in inputs(SETTINGS["tpla"]).items()}
    for name in empty[1]:
        x[name][empty[0]] = 0
    kinds = dict(lengths="int32", values="int8", scales="float32")
    x = {name: jnp.zeros(shape, kinds.get(name, "bfloat16")) for name, shape in x.items()}
    out, lse = jax.jit(functools.partial(attend, SETTINGS["tpla"]))(x)
    assert out.shape == x["q"].shape and lse.shape == x["q"].shape[:3]
    assert (out == 0).all() and jnp.isneginf(lse).all()


def _numbers(kind: str) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((7, 256)) * np.logspace(-3, 3, 7)[:, None]
    x[0, :128], x[1, 130], x[2, :128] = 0, 1e4, 1e-42
    return x.astype(kind)


@pytest.mark.parametrize("kept", ["int8", FP8])
@pytest.mark.parametrize("block", [None, 32, 256])
@pytest.mark.parametrize("kind", ["float32", jnp.bfloat16])
def test_quantised_numbers_are_near(kept, block, kind) -> None:
    x = _numbers(kind)
    found = quantise(jnp.asarray(x), dtype=kept, block=block)
    assert found.values.dtype == kept and found.scales.shape == (7, 256 // (block or 128))
    exact = x.astype(np.float64)
    scale = np.repeat(np.asarray(found.scales, np.float64), block or 128, 1)
    most = np.abs(exact.reshape(7, -1, block or 128)).max(-1).repeat(block or 128, 1)
    assert (np.abs(most / scale / (127 if kept == "int8" else 448) - 1)[most > 1e-30] < 1e-6).all()
    error = np.abs(np.asarray(dequantise(found), np.float64) - exact)
    bound = scale / 2 if kept == "int8" else np.maximum(np.abs(exact) / 16, scale * 2**-10)
    assert (error <= bound * (1 + 1e-4)).all()
    assert (np.asarray(dequantise(found))[exact == 0] == 0).all()


def test_dequantising_multiplies_each_block_by_its_scale() -> None:
    x = Quantised(jnp.array([[1, -2, 3, 100]], jnp.int8), jnp.array([[0.5, 2.0]]))
    np.testing.assert_array_equal(dequantise(x), [[0.5, -1, 6, 200]])
    assert dequantise(x, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("kept", ["int8", FP8])
def test_what_is_no_number_stays_none_and_keeps_to_its_block(kept) -> None:
    x = np.ones((3, 256), np.float32)
    x[0, 3], x[1, 200] = np.nan, -np.inf
    found = np.asarray(dequantise(quantise(jnp.asarray(x), dtype=kept)))
    assert np.isnan(found[0, :128]).all() and np.isnan(found[1, 128:]).all()
    np.testing.assert_allclose(found[[0, 1, 2, 2], [128, 0, 0, 255]], 1, rtol=2**-8)


def test_a_width_that_128_does_not_divide_is_one_block() -> None:
    assert quantise(jnp.ones((2, 3, 80))).scales.shape == (2, 3, 1)
    with pytest.raises(ValueError, match="blocks of 32 channels do not divide 80"):
        quantise(jnp.ones((2, 80)), block=32)
    with pytest.raises(ValueError, match="int8 and float8_e4m3fn, not uint8"):
        quantise(jnp.ones((2, 80)), dtype=jnp.uint8)


def shapes(setting: Setting, dtype: str = "bfloat16") -> dict[str, Any]:
    """Those of `inputs`, which are not drawn."""
    queries, slots, heads, slices, width, rope_width = setting.shape
    batch = len(setting.lengths)
    lead = (batch * slots // setting.page + 1, setting.page) if setting.page else (batch, slots)
    axes = (*lead, slices) if slices > 1 else lead
    table = {"table": struct((batch, slots // setting.page), "int32")} if setting.page else {}
    return table | {
        "q": struct((batch, queries, heads, width), dtype),
        "q_rope": struct((batch, queries, heads, rope_width), dtype),
        "values": struct((*axes, width), setting.kept),
        "scales": struct((*axes, setting.blocks), "float32"),
        "rope": struct((*lead, rope_width), dtype),
        "lengths": struct((batch,), "int32"),
    }


def struct(shape: tuple[int, ...], dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


MISFITS = [
    (dict(q=struct((2, 16, 256))), "q_latent must have four axes"),
    (dict(q_rope=struct((2, 1, 8, 64))), "differ in batch, queries or heads"),
    (dict(rope=struct((2, 39, 64))), "must be .N, S, C. or"),
    (dict(rope=struct((2, 40, 32))), "differ in width: 256 and 256, 64 and 32"),
    (dict(values=struct((2, 40, 3, 256), "int8")), "3 slices do not divide 16"),
    (dict(rope=struct((2, 40, 64), "float32")), "must share one float type, not bfloat16, float32"),
    (dict(values=struct((2, 40, 256), "uint8")), "int8 or float8_e4m3fn with float32 scales, not uint8"),
    (dict(scales=struct((2, 40, 2))), "int8 or float8_e4m3fn with float32 scales"),
    (dict(scales=struct((2, 40, 3), "float32")), "one per token and block of channels"),
    (dict(scales=struct((2, 41, 2), "float32")), "one per token and block of channels"),
    (dict(q=struct((3, 1, 16, 256)), q_rope=struct((3, 1, 16, 64))), "differ in batch"),
    (dict(lengths=struct((2,), "float32")), "lengths must be 2 integers"),
    (dict(starts=struct((3,), "int32")), "starts must be 2 integers"),
    (dict(window=0), "at least 1 token"),
    (dict(splits=0), "splits must be at least 1"),
]


@pytest.mark.parametrize("changed, message", MISFITS)
def test_misfits_are_named(changed, message) -> None:
    setting = dataclasses.replace(SETTINGS["tpla"], window=changed.pop("window", None))
    options = {"splits": changed.pop("splits")} if "splits" in changed else {}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(attend, setting, **options), shapes(setting) | changed)


def test_a_block_table_of_another_batch_is_a_misfit() -> None:
    setting = SETTINGS["pages"]
    x = shapes(setting) | {"table": struct((3, 6), "int32")}
    with pytest.raises(ValueError, match="block_table must be integers"):
        jax.eval_shape(functools.partial(attend, setting), x)


def test_a_derivative_is_refused() -> None:
    setting = SETTINGS["ragged"]
    x = inputs(setting)
    with pytest.raises(NotImplementedError, match="no derivative with a quantised cache"):
        jax.grad(lambda q: attend(setting, x | {"q": q})[0].sum())(jnp.asarray(x["q"]))


TPLA = Setting((9, 9), (1, 256, 64, 1, 256, 64), blocks=2)
REFUSALS = {
    "reference": [(TPLA, dict(splits=2), "leave splits out")],
    "pallas_tpu": [
        (TPLA, dict(dtype="float16"), "bfloat16 and float32, not in float16"),
        (TPLA, dict(blocks=4), "256 channels in 4 blocks: it takes blocks of multiples of 128"),
        (TPLA, dict(shape=(1, 256, 64, 1, 96, 64), blocks=1), "multiples of 128"),
        (TPLA, dict(shape=(17, 256, 64, 1, 256, 64)), "made for a few queries"),
        (TPLA, dict(shape=(1, 1 << 15, 64, 1, 256, 64), page=1 << 15), "make pages smaller"),
        (TPLA, dict(page=64), "scales in pages of 64 places lie scattered"),
        (TPLA, dict(shape=(1, 1 << 25, 64, 1, 256, 64), page=128), "make pages larger"),
    ],
    "mosaic_gpu": [
        (TPLA, dict(dtype="float32"), "bfloat16 and float16, not in float32"),
        (TPLA, dict(blocks=8), "it takes multiples of 64"),
        (TPLA, dict(shape=(1, 256, 64, 1, 256, 32)), "it takes multiples of 64"),
        (TPLA, dict(shape=(1, 256, 64, 1, 320, 64), blocks=1), "of 128 above 256"),
        (TPLA, dict(page=32), "pages of 32: it takes"),
        (TPLA, dict(shape=(1, 56, 64, 1, 256, 64)), "56 places"),
        (TPLA, dict(shape=(1, 256, 64, 1, 640, 64), blocks=5), "too much for registers"),
        (TPLA, dict(shape=(1, 256, 64, 1, 512, 192), blocks=4), "or shared memory"),
        (TPLA, dict(kind="NVIDIA A100"), "made for Hopper"),
    ],
    "triton": [
        (TPLA, dict(shape=(1, 256, 64, 1, 192, 64), blocks=2), "a power of two, or one block"),
        (TPLA, dict(shape=(1, 256, 64, 1, 1024, 64), blocks=4), "too much for registers"),
        (TPLA, dict(shape=(1, 256, 64, 1, 512, 2048), blocks=4), "or shared memory"),
        (TPLA, dict(kept=FP8, kind="NVIDIA A100"), "keep the cache in int8"),
    ],
}


@pytest.mark.parametrize(
    "name, setting, changed, reason", [(name, *refusal) for name, refusals in REFUSALS.items() for refusal in refusals]
)
def test_what_cannot_be_done_is_refused_with_the_reason(name, setting, changed, reason) -> None:
    changed = dict(changed)
    dtype, kind, splits = changed.pop("dtype", "bfloat16"), changed.pop("kind", "NVIDIA H200"), changed.pop("splits", 1)
    setting = dataclasses.replace(setting, **changed)
    call = functools.partial(attend, setting, implementation=name, splits=splits)
    platform = "tpu" if name == "pallas_tpu" else "gpu"
    with compiling_for(platform, kind), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(call, shapes(setting, dtype))


def test_kernels_run_on_their_platforms_only() -> None:
    setting = SETTINGS["tpla"]
    for name in ("pallas_tpu", "mosaic_gpu", "triton"):
        with pytest.raises(NotImplementedError, match="not on cpu"):
            jax.eval_shape(functools.partial(attend, setting, implementation=name), shapes(setting))


LOWERED = {
    "mla": Setting((9, 9), (2, 4096, 16, 1, 512, 64), blocks=4, kept=FP8, window=999),
    "tpla": Setting((9, 9), (1, 4096, 128, 2, 256, 64), blocks=2, page=128),
}


@pytest.mark.parametrize("setting", LOWERED)
def test_lowered_for_chips_that_are_not_there(setting, monkeypatch) -> None:
    monkeypatch.setattr(limits, "tpu_block", OWN_SIZES[0])
    monkeypatch.setattr(limits, "triton_sizes", OWN_SIZES[1])
    setting = LOWERED[setting]

    def lowered(platform, kind, lowering, **options):
        with compiling_for(platform, kind):
            traced = jax.jit(functools.partial(attend, setting, **options)).trace(shapes(setting))
            return traced.lower(lowering_platforms=(lowering,))

    assert lowered("tpu", "TPU v5e", "tpu").as_text().count("tpu_custom_call") == 1  # Chosen, not named.
    assert lowered("gpu", "NVIDIA H200", "cuda").as_text().count("stablehlo.custom_call @mosaic_gpu") == 1
    attend_ptx, _ = _triton.ptx(lowered("gpu", "NVIDIA H200", "cuda", implementation="triton"))
    assert ".target sm_90" in attend_ptx and "cp.async" in attend_ptx  # Bytes are copied ahead.
    assert ("cvt.rn.f16x2.e4m3x2" if setting.kept == FP8 else "wgmma.mma_async") in attend_ptx


@pytest.mark.parametrize("rows", [16, 64, 65])
def test_blocks_fit_the_shared_memory_of_a_hopper(rows) -> None:
    for width, rope_width in itertools.product((64, 128, 192, 256, 384, 512), (64, 128)):
        sizes = limits.hopper_sizes(rows, width, rope_width)
        if sizes is None:
            continue
        both = 2 * 64 * (width + rope_width)
        reading = sizes.row_groups * both + sizes.tiles * both + sizes.stages * 64 * width
        writing = 4 * 64 * width * sizes.row_groups + 4 * 64 * sizes.groups  # In the same place, later.
        assert sizes.stages >= 2 and max(reading, writing) + 512 <= _mosaic_gpu.SHARED_BYTES
        assert 64 * sizes.row_groups >= min(rows, 65) or sizes.column_groups == 2
    assert limits.hopper_sizes(128, 512, 64) is not None, "the latent of DeepSeek-V2"
    assert limits.hopper_sizes(128, 256, 64).tiles == 2, "half of it, multiplied out ahead"


def test_blocks_of_a_tpu_fill_lanes_and_pages() -> None:
    for rows, width, page in itertools.product((16, 128, 1024), (128, 256, 512), (0, 128, 384, 4096)):
        block = OWN_SIZES[0](rows, width, page, 1 << 20)
        assert block % 128 == 0 and block % (page or 128) == 0 and 128 <= block <= max(page, 2048)
    assert OWN_SIZES[0](16, 512, 0, 40) == 40, "a short cache is one block"


def test_sharded_over_slices() -> None:
    """What TPLA's devices do: each has a slice of the latent, all heads of its own queries, and the rotary key."""
    setting = SETTINGS["slices"]
    x = inputs(setting)
    mesh = Mesh(np.array(jax.devices()[:2]), ("slices",))
    third = PartitionSpec(None, None, "slices")
    specs = {name: third if name in ("q", "q_rope", "values", "scales") else PartitionSpec() for name in x}
    call = jax.shard_map(
        lambda x: attend(setting, x, implementation="xla"), mesh=mesh, in_specs=(specs,), out_specs=third
    )
    assert_close(tuple(map(np.asarray, jax.jit(call)(x))), setting, x)


@pytest.mark.parametrize("setting", ["ragged", "three queries", "slices"])
def test_cost_counts_what_is_seen(setting) -> None:
    setting = SETTINGS[setting]
    queries, _, heads, slices, width, rope_width = setting.shape
    options = dict(window=setting.window or 0, starts=setting.starts or 0)
    seen = [[set(places(setting, row, t)) for t in range(queries)] for row in range(len(setting.lengths))]
    pairs, tokens = sum(len(s) for row in seen for s in row), sum(len(set().union(*row)) for row in seen)
    assert cost.pairs(setting.lengths, queries, **options) == pairs
    assert cost.keys(setting.lengths, queries, **options) == tokens
    q = (len(setting.lengths), queries, heads, width)
    assert cost.flops(q, rope_width, pairs) == heads * pairs * 2 * (width + rope_width + width)
    x = inputs(setting, "bfloat16")
    per_token = sum(x[name][0, 0].nbytes for name in ("values", "scales", "rope"))
    moved = tokens * per_token + x["q"].nbytes * 2 + x["q_rope"].nbytes + 4 * x["q"].size // width
    assert cost.bytes(q, rope_width, tokens, slices=slices, blocks=setting.blocks) == moved


def test_cost_of_a_token_is_that_of_the_literature() -> None:
    assert cost.token_bytes(512, 64, blocks=4) == 656  # FlashMLA's, against 1152 in bfloat16.


def test_decode_is_what_quantisation_is_held_to() -> None:
    """Eight-bit latents give nearly what the latents themselves give."""
    setting = SETTINGS["tpla"]
    x = inputs(setting) | {"rope": np.zeros((2, 40, 64), np.float32)}
    latent = np.random.default_rng(1).standard_normal((2, 40, 256)).astype(np.float32)

    @jax.jit
    def outputs(latent):
        caches = [{"values": latent}]
        caches += [quantise(latent, dtype=kept)._asdict() for kept in ("int8", FP8)]
        plain = {name: array for name, array in x.items() if name not in ("values", "scales")}
        return [attend(setting, plain | cache, implementation="reference")[0] for cache in caches]

    right, eight, float_eight = outputs(latent)
    assert relative_error(eight, right) <= 0.012 and relative_error(float_eight, right) <= 0.04
