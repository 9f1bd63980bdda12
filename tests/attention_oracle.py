"""An oracle of the attention op in float64 NumPy, written from the formulas alone, and the settings it is asked."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from kernels.attention import masks
from kernels.tokens import Tokens, packed

CAUSAL = masks.causal()


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
