"""What callers of the attention op may give it, what they are refused, and the rows of the map they may ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import SETTINGS, Setting, allowed_by_hand, arrays, tokens

from kernels.attention import IMPLEMENTATIONS, attention, probabilities
from kernels.tokens import Tokens


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


def test_unknown_implementations_are_refused() -> None:
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="unknown implementation 'pallas' of attention"):
        attention(q, q, q, implementation="pallas")
    assert list(IMPLEMENTATIONS) == ["pallas_tpu", "mosaic_gpu", "cudnn", "triton", "xla", "reference"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": (1, 4, 8)}, "q must be"),
        ({"k": (1, 5, 2, 8)}, "differ in batch, length or heads"),
        ({"q": (1, 4, 2, 7)}, "differ in batch or width"),
        ({"k": (1, 4, 3, 8), "v": (1, 4, 3, 8)}, "3 key heads do not divide 2"),
        ({"sinks": (3,)}, "one logit per query head"),
        ({"sinks": (1, 3, 2)}, "one logit per query head"),
        ({"sinks": (1, 4, 1)}, "one logit per query head"),
        ({"bias": (2, 4, 4, 3)}, "does not broadcast"),
        ({"bias": (1, 3, 4, 4)}, "does not broadcast"),
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
    options |= {
        "sinks": jnp.asarray(x["sinks"], jnp.float32),
        "bias": jnp.asarray(np.linspace(0, 1, 4 * 70 * 70).reshape(4, 70, 70)),
    }
    whole = probabilities(q, k, **options)
    v = jnp.eye(70)[None, :, None, :].repeat(2, 0).repeat(2, 2)
    np.testing.assert_allclose(whole.transpose(0, 2, 1, 3), attention(q, k, v, **options)[0], atol=1e-6)
    for rows, heads in [([3, -1, 3], [2]), (slice(5, 9), slice(None)), (jnp.array([0]), slice(1, None, 2)), (7, 3)]:
        some = jax.jit(lambda q, k, rows=rows, heads=heads: probabilities(q, k, rows=rows, heads=heads, **options))(
            q, k
        )
        picked = np.asarray(whole)[:, heads if isinstance(heads, slice) else np.atleast_1d(heads)]
        picked = picked[:, :, rows if isinstance(rows, slice) else np.atleast_1d(rows)]
        np.testing.assert_allclose(some, picked, atol=1e-7)


def test_probabilities_form_only_what_was_asked() -> None:
    q = jnp.ones((1, 512, 4, 8))
    text = str(jax.make_jaxpr(lambda q: probabilities(q, q, rows=[-1], heads=[2]))(q))
    assert "512,512" not in text and "1,1,1,512" in text
