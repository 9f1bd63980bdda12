"""Positions, norms, channel mixers, embeddings, dense layers and caches against float64 NumPy and lists."""

import math

import jax
import jax.numpy as jnp
import layers_oracle as oracle
import numpy as np
import pytest
from flax import nnx
from layers_oracle import Blank, Rotation, relative

from kernels.tokens import Tokens, packed, sequence
from layers.cache import SlotCache, StateCache, content_bytes
from layers.embedding import Embedding
from layers.linear import Linear
from layers.mlp import MLP
from layers.norm import Norm
from layers.rope import Rope
from layers.setting import Setting

EXACT = 1e-12  # Of formulas that the product evaluates in float64.
CLOSE = 3e-6  # Of sums in float32.
BFLOAT16 = 2.0**-8  # Half a unit in the last place, relative.


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers that float32 holds exactly, as float64."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


def exact(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


# Rotary positions.

POSITION = np.array([[0, 1, 2, 3, 0.25, 7.5, -2, 31], [5, 5, 5, 0, 1, 1.75, 100, 100.5]])
YARNS = {
    "deepseek-v3": dict(dim=64, base=1e4, factor=40, original=4096, fast=32, slow=1, mscale=1.0, mscale_all_dim=1.0),
    "deepseek-v2": dict(
        dim=64, base=1e4, factor=40, original=4096, fast=32, slow=1, mscale=0.707, mscale_all_dim=0.707
    ),
    "kimi-k2": dict(dim=64, base=5e4, factor=32, original=4096, fast=1.0, slow=1, mscale=1.0, mscale_all_dim=1.0),
    "llama-2-128k": dict(dim=128, base=1e4, factor=32, original=4096, fast=32, slow=1),
    "small": dict(dim=16, base=100, factor=4, original=64, fast=8, slow=0.5, mscale=0.8, mscale_all_dim=0.3),
    "clipped": dict(dim=8, base=1e4, factor=16, original=32, fast=32, slow=1, mscale=1.3),
}


# One program per rope and shape, where a call alone compiles every small operation.
turn = jax.jit(lambda rope, x, position: rope.rotate(x, position), static_argnums=0, compiler_options=oracle.QUICK)


def yarn_pair(name: str, layout: str = "half") -> tuple[Rope, Rotation, dict]:
    """The product's rope and the oracle's, with the same settings."""
    options = YARNS[name]
    names = dict(base="theta", original="original_length", fast="beta_fast", slow="beta_slow")
    given = {names.get(field, field): value for field, value in options.items() if field != "dim"}
    return Rope(scaling="yarn", layout=layout, **given), oracle.yarn(layout=layout, **options), options


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotation_turns_each_pair_by_its_angle(layout, dtype):
    """Both pairings, float positions that repeat and run backwards; bfloat16 vectors are turned by float32 angles."""
    x = jnp.asarray(draw(2, 8, 3, 10), dtype)
    found = turn(Rope(theta=50.0, layout=layout), x, POSITION)
    wanted = oracle.rotate(exact(x), POSITION, Rotation(tuple(oracle.plain_frequencies(10, 50.0)), layout))
    assert found.dtype == dtype
    assert relative(found, wanted) < (2e-5 if dtype == "float32" else BFLOAT16)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotation_by_yarn_also_scales(layout):
    rope, rotation, options = yarn_pair("small", layout)
    x = draw(2, 8, 3, options["dim"])
    assert rotation.amplitude > 1.05
    assert relative(turn(rope, jnp.asarray(x, jnp.float32), POSITION), oracle.rotate(x, POSITION, rotation)) < 2e-5


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_logits_depend_on_the_distance_only(layout):
    rope, x = Rope(theta=30.0, layout=layout), jnp.asarray(draw(2, 1, 1, 8), jnp.float32)

    def logit(of_query, of_key):
        q, k = (turn(rope, x[i : i + 1], np.full((1, 1), at)) for i, at in enumerate((of_query, of_key)))
        return float(jnp.vdot(q, k))

    near, moved, other = logit(3.5, 1.0), logit(43.5, 41.0), logit(1.0, 3.5)
    assert abs(near - moved) < 1e-4
    assert abs(near - other) > 1e-2  # The direction counts: a query after its key is not a query before it.


def test_without_theta_nothing_turns():
    x = jnp.asarray(draw(2, 8, 1, 6), jnp.float32)
    np.testing.assert_array_equal(turn(Rope(theta=0.0), x, POSITION), x)


@pytest.mark.parametrize(("dim", "theta"), [(2, 10.0), (8, 10000.0), (128, 500000.0)])
def test_plain_and_linear_frequencies(dim, theta):
    """Position interpolation (arXiv 2306.15595) divides every frequency, that is every position, by the factor."""
    plain = np.array(oracle.plain_frequencies(dim, theta))
    np.testing.assert_allclose(Rope(theta=theta).frequencies(dim), plain, rtol=EXACT)
    linear = Rope(theta=theta, scaling="linear", factor=4.0)
    np.testing.assert_allclose(linear.frequencies(dim), plain / 4, rtol=EXACT)
    x = jnp.asarray(draw(2, 8, 2, dim), jnp.float32)
    apart = oracle.rotate(exact(x), POSITION / 4, Rotation(tuple(plain)))
    assert relative(turn(linear, x, POSITION), apart) < 2e-5


def test_ntk_keeps_the_fastest_pair_and_stretches_the_slowest():
    """base' = base factor^(d/(d-2)): pair 0 turns as before, the last one exactly `factor` times slower."""
    dim, theta, factor = 16, 10000.0, 5.0
    found, plain = (
        rope.frequencies(dim) for rope in (Rope(theta=theta, scaling="ntk", factor=factor), Rope(theta=theta))
    )
    np.testing.assert_allclose(found, oracle.plain_frequencies(dim, theta * factor ** (16 / 14)), rtol=EXACT)
    np.testing.assert_allclose(plain[[0, -1]] / found[[0, -1]], [1, factor], rtol=EXACT)


@pytest.mark.parametrize("name", YARNS)
def test_yarn_frequencies_and_factors(name):
    rope, rotation, options = yarn_pair(name)
    found = rope.frequencies(options["dim"])
    np.testing.assert_allclose(found, rotation.frequencies, rtol=EXACT)
    assert math.isclose(rope.amplitude, rotation.amplitude, rel_tol=EXACT)
    assert math.isclose(rope.logit_factor, rotation.logit_factor, rel_tol=EXACT)
    # The paper's two ends: more than beta_fast turns stay, fewer than beta_slow are interpolated.
    plain = np.array(oracle.plain_frequencies(options["dim"], options["base"]))
    turns, factor = options["original"] * plain / (2 * math.pi), options["factor"]
    np.testing.assert_allclose(found[turns > options["fast"]], plain[turns > options["fast"]], rtol=EXACT)
    np.testing.assert_allclose(found[turns < options["slow"]], plain[turns < options["slow"]] / factor, rtol=EXACT)
    assert np.all(np.diff(plain / found) >= -1e-9)


def test_yarn_as_published():
    """Numbers known from the checkpoints: where DeepSeek's ramp lies, m on the logits, YaRN's own 0.1 ln s + 1."""
    rope, _, _ = yarn_pair("deepseek-v3")
    stretch = np.array(oracle.plain_frequencies(64, 1e4)) / rope.frequencies(64)
    assert math.isclose(stretch[10], 1) and 1.01 < stretch[11] and stretch[22] < 39 and math.isclose(stretch[23], 40)
    assert math.isclose(192**-0.5 * rope.logit_factor, 0.135234, rel_tol=1e-5) and rope.amplitude == 1
    assert math.isclose(yarn_pair("deepseek-v2")[0].logit_factor, 1.58963, rel_tol=1e-5)
    assert math.isclose(yarn_pair("kimi-k2")[0].logit_factor, 1.81326, rel_tol=1e-5)
    assert math.isclose(yarn_pair("llama-2-128k")[0].amplitude, 0.1 * math.log(32) + 1, rel_tol=EXACT)
    assert yarn_pair("llama-2-128k")[0].logit_factor == 1


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "llama3"])
def test_only_yarn_changes_lengths_and_logits(scaling):
    rope = Rope(scaling=scaling, factor=8.0, mscale=2.0, mscale_all_dim=0.5)
    assert rope.amplitude == 1 and rope.logit_factor == 1


@pytest.mark.parametrize(
    ("dim", "theta", "factor", "original", "low", "high"),
    [(128, 500000.0, 8.0, 8192, 1.0, 4.0), (64, 500000.0, 32.0, 8192, 1.0, 4.0), (16, 100.0, 3.0, 64, 0.5, 5.0)],
)
def test_llama3_frequencies(dim, theta, factor, original, low, high):
    rope = Rope(
        theta=theta,
        scaling="llama3",
        factor=factor,
        original_length=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )
    wanted = np.array(oracle.llama31(dim, theta, factor, original, low, high))
    np.testing.assert_allclose(rope.frequencies(dim), wanted, rtol=EXACT)
    stretch = np.array(oracle.plain_frequencies(dim, theta)) / wanted
    assert (
        (stretch == 1).any()
        and np.isclose(stretch, factor).any()
        and ((1.01 < stretch) & (stretch < 0.99 * factor)).any()
    )


def test_rope_names_what_does_not_fit():
    with pytest.raises(ValueError, match="'yarrn' is not one of none, linear"):
        Rope(scaling="yarrn")
    with pytest.raises(ValueError, match="'halves' is not one of half, interleaved"):
        Rope(layout="halves")
    with pytest.raises(ValueError, match="rotary width 7 must be even"):
        Rope().frequencies(7)


# Norms.


def norm_by_hand(kind: str, p: dict[str, np.ndarray], x: np.ndarray, epsilon: float) -> np.ndarray:
    assert set(p) == {"rms": {"gain"}, "layer": {"gain", "bias"}, "srms": set()}[kind]
    return (
        oracle.layer_norm(x, p["gain"], p["bias"], epsilon)
        if kind == "layer"
        else oracle.rms(x, p.get("gain", 1), epsilon)
    )


@pytest.mark.parametrize("kind", ["rms", "layer", "srms"])
def test_norms(kind):
    """The epsilon inside the root (large enough to be seen), gain and bias; in float64 nothing is cut to float32."""
    with jax.enable_x64(True):
        norm = Norm(Setting(7, param_dtype="float64"), 7, kind=kind, epsilon=0.3)
        p, x = oracle.parameters(norm), draw(2, 3, 7) + 0.7
        assert relative(norm(jnp.asarray(x)), norm_by_hand(kind, p, x, 0.3)) < 1e-14
    assert relative(norm(jnp.asarray(x, jnp.float32)), norm_by_hand(kind, p, x, 0.3)) < CLOSE


@pytest.mark.parametrize("kind", ["rms", "layer", "srms"])
def test_norms_of_bfloat16_take_their_statistics_in_float32(kind):
    """1,024 channels around a large mean: all but ties come out as the exact result, rounded once."""
    norm, x = Norm(Setting(1024), 1024, kind=kind), jnp.asarray(draw(4, 1024) + 20, jnp.bfloat16)
    found = norm(x)
    wanted = oracle.layer_norm(exact(x), 1, 0, 1e-6) if kind == "layer" else oracle.rms(exact(x))
    assert found.dtype == jnp.bfloat16
    assert np.mean(exact(found) == exact(jnp.asarray(wanted, jnp.bfloat16))) > 0.995


def test_norm_with_an_offset():
    """What is stored is the gain less 1: a new norm stores 0."""
    with jax.enable_x64(True):
        norm = Norm(Setting(7, param_dtype="float64"), 7, offset=1.0)
        assert np.all(np.asarray(norm.gain[...]) == 0)
        p, x = oracle.parameters(norm), draw(2, 3, 7)
        assert relative(norm(jnp.asarray(x)), oracle.rms(x, 1 + p["gain"])) < 1e-14


def test_norm_starts_as_the_identity_on_normalised_rows():
    x = draw(3, 8)
    for kind, wanted in (("rms", oracle.rms(x)), ("layer", oracle.layer_norm(x, 1, 0, 1e-6)), ("srms", oracle.rms(x))):
        assert relative(Norm(Setting(8), 8, kind=kind)(jnp.asarray(x, jnp.float32)), wanted) < CLOSE
    with pytest.raises(ValueError, match="'batch' is not one of rms"):
        Norm(Setting(8), 8, kind="batch")


# Channel mixers.


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "geglu", "gelu", "relu2"])
def test_mlp(kind, bias):
    with jax.enable_x64(True):
        layer = MLP(Blank(6, param_dtype="float64"), kind=kind, width=11, bias=bias, rngs=nnx.Rngs(0))
        p, x = oracle.parameters(layer), 2 * draw(2, 3, 6)
        assert relative(layer(jnp.asarray(x)), oracle.mlp(p, x, kind, bias)) < 1e-14
    declared = MLP.parameter_count(6, kind=kind, hidden=11, bias=bias)
    assert declared == sum(value.size for value in p.values())
    assert any(name.endswith("bias") for name in p) == bias


def test_mlp_initialisation_and_refusal():
    """What writes into the residual stream starts smaller by sqrt(2 depth); an unknown kind is named."""
    layer = MLP(Setting(64, depth=8, init_std=0.1), width=128, rngs=nnx.Rngs(0))
    for part, std in ((layer.gate, 0.1), (layer.up, 0.1), (layer.down, 0.1 / 4)):
        assert math.isclose(np.std(part.weight[...]), std, rel_tol=0.05)
    with pytest.raises(ValueError, match="'reglu' is not one of swiglu"):
        MLP(Setting(6), kind="reglu", rngs=nnx.Rngs(0))


# Embeddings and dense layers.


def embedding(scale: float = 1.0, compute_dtype: str = "float32") -> tuple[Embedding, np.ndarray]:
    """Five rows of three numbers, and the table."""
    layer = Embedding(Blank(3, compute_dtype=compute_dtype), 5, scale=scale, rngs=nnx.Rngs(0))
    return layer, oracle.parameters(layer)["table"]


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, "float32"), (3.0, "float32"), (1.7, "bfloat16")])
def test_embedding_rows(scale, dtype):
    layer, table = embedding(scale, dtype)
    ids = np.array([[0, 4, 4, 2], [1, 3, 0, 0]])
    found = layer(jnp.asarray(ids))
    assert found.dtype == dtype
    assert relative(found, scale * table[ids]) < (CLOSE if dtype == "float32" else 2.5 * BFLOAT16)


@pytest.mark.parametrize("outside", [5, 6, 1000, -1, -5, -6])
def test_embedding_of_ids_outside_is_nan(outside):
    layer, table = embedding()
    found = np.asarray(layer(jnp.asarray([[3, outside, 1]])))
    np.testing.assert_array_equal(found[0, [0, 2]], table[[3, 1]].astype(np.float32))
    assert np.isnan(found[0, 1]).all()


def test_tied_logits_use_the_same_table_unscaled():
    layer, table = embedding(scale=3.0)
    x = draw(2, 4, 3)
    assert relative(layer.logits(jnp.asarray(x, jnp.float32)), x @ table.T) < CLOSE
    narrow = jnp.asarray(x, jnp.bfloat16)
    wanted = exact(narrow) @ exact(jnp.asarray(table, jnp.bfloat16)).T
    assert layer.logits(narrow).dtype == jnp.bfloat16 and relative(layer.logits(narrow), wanted) < BFLOAT16


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (4,), (2, 4), (2, 3, 4)])
def test_linear(leading, bias):
    with jax.enable_x64(True):
        layer = Linear(Blank(5, param_dtype="float64"), 5, 7, axes=("embed", "mlp"), bias=bias, rngs=nnx.Rngs(0))
        p, x = oracle.parameters(layer), draw(*leading, 5)
        assert set(p) == ({"weight", "bias"} if bias else {"weight"})
        assert relative(layer(jnp.asarray(x)), x @ p["weight"] + p.get("bias", 0)) < 1e-14
        assert layer.matrix("float32").dtype == jnp.float32 and layer.matrix("float32").shape == (5, 7)


def test_linear_in_bfloat16_accumulates_in_float32():
    """4,096 products of bfloat16 numbers and a bias, rounded once."""
    layer = Linear(Blank(4096), 4096, 3, axes=("embed", "mlp"), bias=True, rngs=nnx.Rngs(0))
    p, x = oracle.parameters(layer), jnp.asarray(draw(20, 4096) + 1, jnp.bfloat16)
    wanted = exact(x) @ exact(jnp.asarray(p["weight"], jnp.bfloat16)) + p["bias"]
    found = layer(x)
    assert found.dtype == jnp.bfloat16
    assert np.all(np.abs(exact(found) - wanted) <= 1.1 * BFLOAT16 * np.abs(wanted) + 1e-4)


def test_matrices_start_with_their_standard_deviation_whatever_their_format():
    def start(dtype, **options):
        setting = Setting(64, param_dtype=dtype, init_std=0.2)
        return Linear(setting, 64, 128, axes=("embed", "mlp"), bias=True, rngs=nnx.Rngs(5), **options)

    wide, narrow = start("float32"), start("bfloat16")
    assert math.isclose(np.std(wide.weight[...]), 0.2, rel_tol=0.05) and not wide.bias[...].any()
    assert math.isclose(np.std(start("float32", std=0.03).weight[...]), 0.03, rel_tol=0.05)
    np.testing.assert_array_equal(wide.weight[...].astype(jnp.bfloat16), narrow.weight[...])


# Caches.

append = jax.jit(lambda cache, entries, tokens: cache.append(entries, tokens), compiler_options=oracle.QUICK)
# New tokens per row, and padding up to the longer row: prefill, single steps, chunks longer than any window below.
ARRIVALS = [(4, 2), (1, 1), (1, 0), (9, 3), (1, 1), (0, 2), (1, 1), (1, 1), (3, 9), (2, 1), (1, 1), (0, 0), (1, 1)]
LENGTH = 27


def content(row: int, order: int) -> float:
    """What stands for one token: no two are alike, none is 0."""
    return 1000.0 * (row + 1) + order


def arriving(seen: list[int], counts: tuple[int, int]) -> tuple[dict[str, jax.Array], Tokens]:
    """The next tokens of both rows; padding carries NaN."""
    width = max(*counts, 1)
    value, index = np.full((2, width), np.nan), np.zeros((2, width), np.int32)
    for row, count in enumerate(counts):
        index[row] = seen[row] + np.arange(width)
        value[row, :count] = [content(row, seen[row] + i) for i in range(count)]
    valid = np.arange(width) < np.array(counts)[:, None]
    entries = {"k": value[:, :, None, None] * [[1.0], [-1.0]], "c": value[:, :, None] + [0.5, 0.25, 0.0]}
    entries = {name: jnp.asarray(entry, jnp.float32) for name, entry in entries.items()}
    return entries, Tokens(index=jnp.asarray(index), valid=jnp.asarray(valid))


def remembered(entries: dict[str, jax.Array], tokens: Tokens, row: int) -> list[int]:
    """Sorted numbers of the valid tokens held for a row, each checked to come with its own entries."""
    index, valid = np.asarray(tokens.index)[row], np.asarray(tokens.valid)[row]
    for slot in np.flatnonzero(valid):
        value = content(row, index[slot])
        np.testing.assert_array_equal(entries["k"][row, slot], [[value], [-value]])
        np.testing.assert_array_equal(entries["c"][row, slot], [value + 0.5, value + 0.25, value])
    return sorted(index[valid].tolist())


@pytest.mark.parametrize(("pinned", "window"), [(0, 0), (0, 4), (2, 4), (3, 1)])
def test_slot_cache_shows_what_a_list_of_tokens_shows(pinned, window):
    """Every query sees all earlier tokens, or the last `window` and the first `pinned`, once each, rows apart."""
    cache = SlotCache.create(2, LENGTH, {"k": (2, 1), "c": (3,)}, "float32", pinned=pinned, window=window)
    assert cache.fresh and cache.slots == (pinned + window if window else LENGTH)
    seen = [0, 0]
    for counts in ARRIVALS:
        entries, tokens = arriving(seen, counts)
        view, cache = append(cache, entries, tokens)
        for row, count in enumerate(counts):
            shown = remembered(view.entries, view.tokens, row)
            assert len(shown) == len(set(shown))
            for query in range(seen[row], seen[row] + count):
                all_before = range(query + 1)
                wanted = [s for s in all_before if not window or query - s < window or s < pinned]
                near = [s for s in shown if s <= query and (not window or query - s < window or s < pinned)]
                assert near == wanted
            seen[row] += count
            kept = [s for s in range(seen[row]) if not window or s < pinned or s >= seen[row] - window]
            assert remembered(cache.entries, cache.tokens, row) == kept
        assert cache.length.tolist() == seen and not cache.fresh
    assert min(seen) > pinned + window + 9  # The ring went round.


@pytest.mark.parametrize(("pinned", "window"), [(0, 4), (2, 4)])
def test_a_prompt_longer_than_the_ring(pinned, window):
    """A first chunk longer than all slots is seen whole by itself; what stays are the pinned and the last tokens."""
    cache = SlotCache.create(2, LENGTH, {"k": (2, 1), "c": (3,)}, "float32", pinned=pinned, window=window)
    entries, tokens = arriving([0, 0], (15, 3))
    view, cache = append(cache, entries, tokens)
    assert [remembered(view.entries, view.tokens, row) for row in (0, 1)] == [list(range(15)), [0, 1, 2]]
    assert remembered(cache.entries, cache.tokens, 0) == [*range(pinned), *range(11, 15)]
    assert remembered(cache.entries, cache.tokens, 1) == [0, 1, 2]


def test_a_ring_is_not_larger_than_the_sequence():
    """Where the whole sequence fits in fewer slots than the ring has, nothing is overwritten and the length binds."""
    cache = SlotCache.create(2, 5, {"k": (2, 1), "c": (3,)}, "float32", pinned=2, window=4)
    assert (cache.slots, cache.pinned, cache.window) == (5, 0, 0)
    for seen in range(5):
        _, cache = append(cache, *arriving([seen, seen], (1, 1)))
    assert remembered(cache.entries, cache.tokens, 1) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="6 tokens do not fit a cache of 5 slots"):
        cache.append(*arriving([0, 0], (6, 6)))


def test_slot_cache_without_padding_column_and_with_one_index_for_all_rows():
    cache = SlotCache.create(2, 8, {"k": (1,)}, "bfloat16")
    _, cache = append(cache, {"k": jnp.full((2, 3, 1), 1.0)}, sequence(3))
    view, cache = append(cache, {"k": jnp.full((2, 2, 1), 2.0)}, sequence(2, 3))
    assert view.entries["k"].dtype == jnp.bfloat16  # Stored in the cache's format, whatever arrives.
    index, k, valid = np.asarray(view.tokens.index), exact(view.entries["k"]), np.asarray(view.tokens.valid)
    for row in (0, 1):
        assert index[row, valid[row]].tolist() == [0, 1, 2, 3, 4]
        assert k[row, valid[row], 0].tolist() == [1, 1, 1, 2, 2]


def test_caches_refuse_what_they_cannot_hold():
    entries, documents = {"k": jnp.ones((1, 4, 1))}, packed(jnp.asarray([[1, 1, 2, 2]]))
    slots = SlotCache.create(1, 8, {"k": (1,)}, "float32")
    with pytest.raises(ValueError, match="one document per row"):
        slots.append(entries, documents)
    with pytest.raises(ValueError, match="9 tokens do not fit a cache of 8 slots"):
        slots.append({"k": jnp.ones((1, 9, 1))}, sequence(9))
    with pytest.raises(ValueError, match="one document per row"):
        StateCache.create(1, {"kv": (2,)}).advance({"kv": jnp.ones((1, 2))}, documents)


def test_content_bytes_counts_entries_only():
    shapes = {"k": (2, 3), "c": (5,)}
    assert content_bytes(SlotCache.create(4, 10, shapes, "bfloat16")) == 4 * 10 * (6 + 5) * 2
    assert content_bytes(SlotCache.create(4, 10, shapes, "float32", pinned=1, window=2)) == 4 * 3 * (6 + 5) * 4
    assert content_bytes(StateCache.create(4, shapes)) == 4 * (6 + 5) * 4


def test_state_cache_counts_valid_tokens():
    cache = StateCache.create(3, {"kv": (2, 2), "z": (4,)})
    assert cache.fresh and cache.state["kv"].shape == (3, 2, 2) and not cache.state["z"].any()
    later = {"kv": jnp.ones((3, 2, 2)), "z": jnp.full((3, 4), 2.0)}
    cache = cache.advance(later, sequence(5))
    valid = jnp.asarray([[True, True, True], [True, False, False], [False, False, False]])
    cache = cache.advance(later, sequence(3, cache.length, valid=valid))
    assert cache.length.tolist() == [8, 6, 5] and not cache.fresh
    assert cache.state is later
