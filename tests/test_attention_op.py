"""The attention op: every implementation against an independent float64 oracle, forward and every gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels.attention import IMPLEMENTATIONS, attention, masks, plan, probabilities, xla
from kernels.tokens import Tokens, packed

CAUSAL = masks.causal()
# Relative RMS against float64, per dtype: output and gradients; absolute for lse.
TOLERANCE = {"float32": (2e-6, 5e-6, 1e-5), "bfloat16": (8e-3, 1.5e-2, 1e-2)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One call: [T, S, heads, kv heads, width, value width], the mask, and what else is on."""

    shape: tuple[int, int, int, int, int, int]
    mask: masks.Mask = CAUSAL
    packed: bool = False
    soft_cap: float = 0.0
    sinks: bool = False
    scale: float | None = None


SETTINGS = {
    "causal": Setting((64, 64, 4, 4, 16, 16)),
    "odd": Setting((37, 37, 2, 2, 12, 12)),
    "one_token": Setting((1, 1, 2, 1, 8, 8)),
    "decode": Setting((1, 41, 4, 2, 8, 8)),
    "fewer_queries": Setting((19, 50, 4, 2, 8, 8)),
    "fewer_keys": Setting((50, 19, 4, 2, 8, 8)),
    "grouped": Setting((33, 33, 6, 2, 8, 8)),
    "multi_query": Setting((33, 33, 6, 1, 8, 8)),
    "value_wider": Setting((33, 33, 4, 2, 8, 20)),
    "everything": Setting((32, 48, 2, 2, 8, 8), masks.everything()),
    "window": Setting((70, 70, 2, 2, 8, 8), CAUSAL & masks.sliding_window(9)),
    "window_one": Setting((40, 40, 2, 2, 8, 8), CAUSAL & masks.sliding_window(1)),
    "window_sink_tokens": Setting((70, 70, 4, 2, 8, 8), CAUSAL & (masks.sliding_window(9) | masks.sink_tokens(3))),
    "packed": Setting((70, 70, 4, 2, 8, 8), CAUSAL & masks.segments() & masks.valid(), packed=True),
    "packed_window": Setting(
        (70, 70, 4, 2, 8, 8),
        CAUSAL & masks.segments() & masks.valid() & (masks.sliding_window(9) | masks.sink_tokens(2)),
        packed=True,
    ),
    "soft_cap": Setting((33, 33, 4, 2, 8, 8), soft_cap=1.5, scale=0.7),
    "sinks": Setting((33, 33, 4, 2, 8, 8), sinks=True),
    "all_at_once": Setting(
        (70, 70, 4, 2, 8, 12), CAUSAL & masks.segments() & masks.valid(), packed=True, soft_cap=2.0, sinks=True
    ),
    "nothing": Setting((33, 33, 4, 2, 8, 8), ~masks.everything()),
    "nothing_with_sinks": Setting((33, 33, 4, 2, 8, 8), ~masks.everything(), sinks=True),
}


def arrays(setting: Setting, seed: int = 0, batch: int = 2) -> dict[str, np.ndarray]:
    """Inputs and the gradients that arrive, float64."""
    rng = np.random.default_rng(seed)
    length, keys, heads, kv_heads, width, value_width = setting.shape
    made = {
        "q": rng.standard_normal((batch, length, heads, width)),
        "k": rng.standard_normal((batch, keys, kv_heads, width)),
        "v": rng.standard_normal((batch, keys, kv_heads, value_width)),
        "d_out": rng.standard_normal((batch, length, heads, value_width)),
        "d_lse": rng.standard_normal((batch, length, heads)),
    }
    if setting.sinks:
        made["sinks"] = rng.standard_normal(heads)
    return made


def tokens(setting: Setting, batch: int = 2) -> tuple[Tokens | None, Tokens | None]:
    if not setting.packed:
        return None, None
    length, pattern = setting.shape[0], [[1, 1, 1, 2, 3, 3, 0], [1, 2, 2, 2, 2, 2, 2]]
    segment = np.array([np.resize(np.repeat(row, length // 7), length) for row in pattern])
    both = packed(jnp.asarray(np.resize(segment, (batch, length))))
    return both, both


def allowed_by_hand(setting: Setting) -> np.ndarray:
    """[B, T, S], from the definitions and not from the masks' own code."""
    length, keys = setting.shape[:2]
    t, s = np.arange(length)[:, None] + keys - length, np.arange(keys)[None]
    q_tokens, _ = tokens(setting)
    if q_tokens is None:
        start, same, valid = np.zeros((2, 1, keys), int), np.ones((2, length, keys), bool), np.ones((2, 1, keys), bool)
    else:
        segment = np.asarray(q_tokens.segment)
        same, valid = segment[:, :, None] == segment[:, None, :], segment[:, None, :] > 0
        start = np.array([[list(row).index(x) for x in row] for row in segment])[:, None, :]
        if 0 in segment[0]:  # Padding at the end starts where it begins.
            assert (segment[0] == 0).argmax() == start[0, 0, -1]
    text = repr(setting.mask)
    if text == "~everything()":
        return np.zeros((2, length, keys), bool)
    allowed = np.ones((2, length, keys), bool)
    if "causal" in text:
        allowed &= t >= s
    if "segments" in text:
        allowed &= same
    if "valid" in text:
        allowed &= valid
    if "window" in text:
        near = t - s < int(text.split("sliding_window(")[1].split(")")[0])
        if "sink_tokens" in text:
            near = near | (s - start < int(text.split("sink_tokens(")[1].split(")")[0]))
        allowed &= near
    return allowed


def oracle(setting: Setting, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Output, lse and gradients in float64 NumPy, by the formulas of the softmax's derivative."""
    q, k, v = x["q"], x["k"], x["v"]
    ratio = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, ratio, axis=2), np.repeat(v, ratio, axis=2)
    scale = q.shape[-1] ** -0.5 if setting.scale is None else setting.scale
    s = scale * np.einsum("bthd,bshd->bhts", q, k)
    slope = np.ones_like(s)
    if setting.soft_cap:
        capped = np.tanh(s / setting.soft_cap)
        s, slope = setting.soft_cap * capped, 1 - capped**2
    e = np.where(allowed_by_hand(setting)[:, None], np.exp(s), 0.0)
    sink = np.exp(x["sinks"])[None, :, None] if setting.sinks else 0.0
    total = e.sum(-1) + sink
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    p = e / np.where(total == 0, 1, total)[..., None]
    d_out, d_lse = x["d_out"].transpose(0, 2, 1, 3), x["d_lse"].transpose(0, 2, 1)
    d_p = np.einsum("bhte,bshe->bhts", d_out, v)
    slack = (p * d_p).sum(-1) - d_lse
    d_s = p * (d_p - slack[..., None])
    d_raw = d_s * slope * scale
    fold = lambda g: g.reshape(*g.shape[:2], -1, ratio, g.shape[-1]).sum(3)  # noqa: E731
    found = {
        "out": np.einsum("bhts,bshe->bthe", p, v),
        "lse": lse.transpose(0, 2, 1),
        "q": np.einsum("bhts,bshd->bthd", d_raw, k),
        "k": fold(np.einsum("bhts,bthd->bshd", d_raw, x["q"])),
        "v": fold(np.einsum("bhts,bhte->bshe", p, d_out)),
    }
    if setting.sinks:
        found["sinks"] = -(sink / total * slack).sum((0, 2))
    return found


SMALL = plan.Blocks(16, 8, 2)


@pytest.fixture(params=["reference", "xla", "xla_small_blocks"])
def op(request, monkeypatch):
    """The op through one implementation; the small blocks make short rows take every path of the blockwise form."""
    if request.param == "xla_small_blocks":
        small = lambda q, k, v: dataclasses.replace(SMALL, heads=2 - k[2] % 2)  # noqa: E731
        monkeypatch.setattr(plan, "choose_blocks", small)
        monkeypatch.setattr(xla, "FEW_ROWS", 0)
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
    out_tolerance, gradient_tolerance, lse_tolerance = TOLERANCE[dtype]
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert found[name].shape == right.shape, name
        if name == "lse":
            np.testing.assert_array_equal(np.isneginf(found[name]), np.isneginf(right))
            seen = np.isfinite(right)
            assert np.abs(found[name][seen] - right[seen]).max(initial=0) < lse_tolerance, name
            continue
        error = np.sqrt(np.mean((found[name] - right) ** 2))
        size = np.sqrt(np.mean(right**2))
        # A gradient that is zero by its formula (one visible key) is compared with the size of what cancels: about 1.
        limit = (out_tolerance if name == "out" else gradient_tolerance) * max(size, 0.05)
        assert error <= limit, f"{name}: {error / max(size, 1e-30):.2e} relative"


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
    monkeypatch.setattr(plan, "choose_blocks", lambda q, k, v: plan.Blocks(16, 8, 1))
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


def test_bias_and_score_mod_mean_what_they_say() -> None:
    setting = Setting((9, 11, 4, 2, 8, 8))
    x, rng = arrays(setting), np.random.default_rng(7)
    bias = rng.standard_normal((2, 4, 9, 11))
    s = np.einsum("bthd,bshd->bhts", x["q"], np.repeat(x["k"], 2, axis=2)) * 8**-0.5
    batch, head, t, key = np.ogrid[:2, :4, :9, :11]
    modified = (s + bias) * (1 + head) - 0.1 * (t + 2 - key) + batch
    e = np.where(allowed_by_hand(setting)[:, None], np.exp(modified), 0)
    out = np.einsum("bhts,bshe->bthe", e / e.sum(-1, keepdims=True), np.repeat(x["v"], 2, axis=2))

    def score_mod(scores, at):
        return scores * (1 + at.head) - 0.1 * (at.q.index[:, None, :, None] - at.k.index[:, None, None, :]) + at.batch

    q, k, v = (jnp.asarray(x[name], jnp.float32) for name in "qkv")
    found, lse = attention(q, k, v, bias=jnp.asarray(bias), score_mod=score_mod)
    np.testing.assert_allclose(found, out, atol=2e-5)
    np.testing.assert_allclose(lse, np.log(e.sum(-1)).transpose(0, 2, 1), atol=2e-5)
    assert at_row_numbers(q, k) == (list(range(9)), list(range(11)))


def at_row_numbers(q: jax.Array, k: jax.Array) -> tuple[list[int], list[int]]:
    """The query and key numbers that a score_mod is given."""
    seen = []
    probabilities(q, k, score_mod=lambda s, at: seen.append((at.query.ravel(), at.key.ravel())) or s)
    return seen[0][0].tolist(), seen[0][1].tolist()


def test_what_is_not_declared_is_refused_with_the_reason() -> None:
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(NotImplementedError, match="'xla' cannot do this case: score_mod"):
        attention(q, q, q, score_mod=lambda s, at: s, implementation="xla")
    with pytest.raises(NotImplementedError, match="'xla' cannot do this case: bias"):
        attention(q, q, q, bias=jnp.zeros(4), implementation="xla")
    with pytest.raises(ValueError, match="unknown implementation 'pallas' of attention"):
        attention(q, q, q, implementation="pallas")
    assert list(IMPLEMENTATIONS) == ["xla", "reference"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": (1, 4, 8)}, "q must be"),
        ({"k": (1, 5, 2, 8)}, "differ in batch, length or heads"),
        ({"q": (1, 4, 2, 7)}, "differ in batch or width"),
        ({"k": (1, 4, 3, 8), "v": (1, 4, 3, 8)}, "3 key heads do not divide 2"),
        ({"sinks": (3,)}, "one logit per query head"),
        ({"bias": (2, 4, 4, 3)}, "does not broadcast"),
        ({"bias": (2, 2, 4, 4)}, "does not broadcast"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message) -> None:
    given = {name: jnp.ones(shape) for name, shape in {**dict.fromkeys("qkv", (1, 4, 2, 8)), **change}.items()}
    with pytest.raises(ValueError, match=message):
        attention(**given)


def test_other_misuse_is_named() -> None:
    q, row = jnp.ones((1, 4, 2, 8)), Tokens(index=jnp.arange(4)[None])
    with pytest.raises(ValueError, match="share one type"):
        attention(q, q, q.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="floating point"):
        attention(*3 * [q.astype(jnp.int32)])
    with pytest.raises(ValueError, match="both, or neither"):
        attention(q, q, q, q_tokens=row)
    with pytest.raises(ValueError, match=r"k_tokens of shape \(1, 3\)"):
        attention(q, q, q, q_tokens=row, k_tokens=Tokens(index=jnp.arange(3)[None]))
    with pytest.raises(ValueError, match=r"rows \[4\] reach beyond the 4"):
        probabilities(q, q, rows=[4])


def test_probabilities_are_the_chosen_rows_and_heads_of_the_map() -> None:
    setting = SETTINGS["all_at_once"]
    x = arrays(setting)
    q_tokens, k_tokens = tokens(setting)
    q, k = (jnp.asarray(x[name], jnp.float32) for name in "qk")
    options = {"mask": setting.mask, "q_tokens": q_tokens, "k_tokens": k_tokens, "soft_cap": 2.0}
    options |= {"sinks": jnp.asarray(x["sinks"], jnp.float32), "bias": jnp.asarray(np.linspace(0, 1, 4 * 70 * 70).reshape(4, 70, 70))}
    whole = probabilities(q, k, **options)
    v = jnp.eye(70)[None, :, None, :].repeat(2, 0).repeat(2, 2)
    np.testing.assert_allclose(whole.transpose(0, 2, 1, 3), attention(q, k, v, **options)[0], atol=1e-6)
    for rows, heads in [([3, -1, 3], [2]), (slice(5, 9), slice(None)), (jnp.array([0]), slice(1, None, 2)), (7, 3)]:
        some = jax.jit(lambda q, k, rows=rows, heads=heads: probabilities(q, k, rows=rows, heads=heads, **options))(q, k)
        picked = np.asarray(whole)[:, heads if isinstance(heads, slice) else np.atleast_1d(heads)]
        picked = picked[:, :, rows if isinstance(rows, slice) else np.atleast_1d(rows)]
        np.testing.assert_allclose(some, picked, atol=1e-7)


def test_probabilities_form_only_what_was_asked() -> None:
    q = jnp.ones((1, 512, 4, 8))
    text = str(jax.make_jaxpr(lambda q: probabilities(q, q, rows=[-1], heads=[2]))(q))
    assert "512,512" not in text and "1,1,1,512" in text


def test_a_traced_scale_has_a_gradient(op) -> None:
    setting = SETTINGS["grouped"]
    q, k, v = (jnp.asarray(arrays(setting)[name], jnp.float32) for name in "qkv")
    loss = jax.jit(lambda scale: (op(q, k, v, scale=scale)[0] ** 2).sum())
    slope = (loss(0.301) - loss(0.299)) / 0.002
    assert float(jax.grad(loss)(jnp.float32(0.3))) == pytest.approx(float(slope), rel=2e-2)


def test_blocks_beyond_the_mask_are_never_visited(op, monkeypatch) -> None:
    """The work follows the live blocks: NaN planted in a skipped block of a static and of a traced mask does nothing,
    even where every pair of it would be multiplied out by a mask that is only applied."""
    setting = Setting((64, 64, 2, 2, 8, 8), CAUSAL & masks.sliding_window(8))
    q_tokens = Tokens(index=jnp.arange(64)[None])
    x = {name: jnp.asarray(a, jnp.float32) for name, a in arrays(setting).items()}
    counted = []

    def count(q, k, v, tokens):
        the_plan, tables = plan.make(setting.mask, tokens, tokens, q.shape, k.shape, 1.0, 0.0, plan.Blocks(8, 8, 2))
        zeros = jnp.zeros((8,), jnp.int32)
        visit = lambda lists, i: the_plan.visit(lists, 0, 0, i, lambda j, c, masked: c.at[j].add(1), zeros)  # noqa: E731
        return jnp.stack([visit(tables.rows, i) for i in range(8)]), jnp.stack([visit(tables.keys, i) for i in range(8)])

    for run_it in (count, jax.jit(count)):
        counted.append(run_it(x["q"], x["k"], x["v"], q_tokens))
    expected = np.eye(8) + np.eye(8, k=-1)
    for by_rows, by_keys in counted:
        np.testing.assert_array_equal(by_rows, expected)
        np.testing.assert_array_equal(by_keys, expected.T)


def test_inside_scan_remat_and_shard_map(op) -> None:
    setting = SETTINGS["grouped"]
    x = {name: jnp.asarray(a, jnp.float32) for name, a in arrays(setting).items()}

    def layer(h):
        return h + op(h, x["k"], x["v"])[0]

    def stacked(h):
        return jax.lax.scan(lambda h, _: (jax.checkpoint(layer)(h), None), h, None, length=2)[0].sum()

    plain = jax.grad(lambda h: layer(layer(h)).sum())(x["q"])
    np.testing.assert_allclose(jax.jit(jax.grad(stacked))(x["q"]), plain, rtol=1e-5, atol=1e-5)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    spec = PartitionSpec("data")
    sharded = jax.shard_map(
        lambda q, k, v: op(q, k, v)[0], mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec
    )
    loss = jax.jit(jax.grad(lambda q, k, v: (sharded(q, k, v) ** 2).sum(), (0, 1, 2)))
    expected = jax.grad(lambda q, k, v: (op(q, k, v)[0] ** 2).sum(), (0, 1, 2))(x["q"], x["k"], x["v"])
    for found, right in zip(loss(x["q"], x["k"], x["v"]), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)


def test_temporaries_are_blocks_not_the_map() -> None:
    q = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)
    gradients = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v, implementation="xla")[0].sum(), (0, 1, 2)))
    assert gradients.lower(q, q, q).compile().memory_analysis().temp_size_in_bytes < 64 * 2**20
