"""The layers in float64 NumPy: plain loops over tokens, heads and channel pairs, written from the formulas alone.

Parameters arrive as arrays by dotted name ("query.weight"), tokens as two arrays [B, T]: `document` (0 is padding) and
`position`. Attention oracles run in stages; `Sites` keeps what stands at each stage, and changes it where asked to.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.setting import Setting

QUICK = {"xla_backend_optimization_level": 0}  # For programs that run once: compiling them is all the time there is.


@dataclasses.dataclass(frozen=True)
class Blank(Setting):
    """A setting whose matrices start at zero, for layers that get their numbers from `parameters`: no draw compiles."""

    def normal(self, key: jax.Array, shape: tuple[int, ...], std: float) -> jax.Array:
        return jnp.asarray(np.zeros(shape), self.param_dtype)


def parameters(module: nnx.Module, seed: int = 0) -> dict[str, np.ndarray]:
    """Gives every parameter a random value (gains are no longer 1, biases and sinks no longer 0); returns them."""
    rng, values, state = np.random.default_rng(seed), {}, nnx.state(module, nnx.Param)
    for path, variable in sorted(nnx.to_flat_state(state), key=lambda item: item[0]):
        shape, name = variable[...].shape, ".".join(path)
        spread = shape[0] ** -0.5 if name.endswith("weight") else 0.4
        drawn = spread * rng.standard_normal(shape) + name.endswith("gain")
        variable[...] = jnp.asarray(drawn, variable[...].dtype)
        values[name] = np.asarray(variable[...], np.float64)
    nnx.update(module, state)
    return values


def relative(found: jax.Array, wanted: np.ndarray) -> float:
    """Largest difference over the largest wanted number; infinite where something found is not finite."""
    found = np.asarray(found, np.float64)
    assert found.shape == np.shape(wanted), f"{found.shape} instead of {np.shape(wanted)}"
    return np.abs(found - wanted).max() / np.abs(wanted).max() if np.isfinite(found).all() else math.inf


class Sites:
    """What stands at each stage of a layer, after the edits: functions of NumPy arrays by the name of the stage."""

    def __init__(self, edits: Mapping[str, Callable] | None = None) -> None:
        self.edits, self.seen = edits or {}, {}

    def __call__(self, name: str, value: np.ndarray) -> np.ndarray:
        self.seen[name] = self.edits[name](value) if name in self.edits else value
        return self.seen[name]


# Rotary positions.


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Radians per position of each pair of channels, the factor on cos and sin, and the one on latent logits."""

    frequencies: tuple[float, ...]
    layout: str = "half"
    amplitude: float = 1.0
    logit_factor: float = 1.0


def plain_frequencies(dim: int, base: float) -> list[float]:
    """RoFormer (arXiv 2104.09864): base^(-2i/dim)."""
    return [base ** (-2 * i / dim) for i in range(dim // 2)]


def yarn_gain(factor: float, mscale: float) -> float:
    """g(f, s) = 0.1 s ln f + 1, or 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def yarn(dim, base, factor, original, fast, slow, mscale=1.0, mscale_all_dim=0.0, layout="half") -> Rotation:
    """YaRN (arXiv 2309.00071) as DeepSeek-V2 and -V3 use it."""

    def turning(turns):  # The pair, not whole, that turns so often over the original length.
        return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = max(math.floor(turning(fast)), 0), min(math.ceil(turning(slow)), dim - 1)
    frequencies = []
    for i, extrapolated in enumerate(plain_frequencies(dim, base)):
        ramp = min(max((i - low) / (high - low if high > low else 0.001), 0), 1)
        frequencies.append(extrapolated / factor * ramp + extrapolated * (1 - ramp))
    overall = yarn_gain(factor, mscale_all_dim)
    return Rotation(tuple(frequencies), layout, yarn_gain(factor, mscale) / overall, overall**2)


def llama31(dim, base, factor, original, low_freq_factor, high_freq_factor) -> list[float]:
    """Llama 3.1's rule, in wavelengths: short ones stay, long ones stretch, between them a blend."""
    frequencies = []
    for frequency in plain_frequencies(dim, base):
        wavelength = 2 * math.pi / frequency
        if wavelength > original / low_freq_factor:
            frequency /= factor
        elif wavelength >= original / high_freq_factor:
            smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        frequencies.append(frequency)
    return frequencies


def rotate(x: np.ndarray, position: np.ndarray, rotation: Rotation) -> np.ndarray:
    """x [B, T, H, D]: each pair of channels as one complex number, times amplitude e^(i position frequency); channels
    behind those with a frequency are left alone."""
    turned, half = np.array(x), len(rotation.frequencies)
    for i, frequency in enumerate(rotation.frequencies):
        first, second = (i, i + half) if rotation.layout == "half" else (2 * i, 2 * i + 1)
        z = (x[..., first] + 1j * x[..., second]) * rotation.amplitude * np.exp(1j * frequency * position)[..., None]
        turned[..., first], turned[..., second] = z.real, z.imag
    return turned


# Token by token.


def rms(x: np.ndarray, gain: np.ndarray | float = 1.0, epsilon: float = 1e-6) -> np.ndarray:
    """RMSNorm (arXiv 1910.07467)."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * gain


def layer_norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    """LayerNorm (arXiv 1607.06450)."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * gain + bias


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def dense(p: dict, name: str, x: np.ndarray, bias: bool = False) -> np.ndarray:
    return x @ p[f"{name}.weight"] + (p[f"{name}.bias"] if bias else 0)


def mlp(p: dict, x: np.ndarray, kind: str, bias: bool) -> np.ndarray:
    """SwiGLU, GEGLU (arXiv 2002.05202), GELU in its tanh form (arXiv 1606.08415), squared ReLU (arXiv 2109.08668)."""
    up = dense(p, "up", x, bias)
    if kind == "swiglu":
        hidden = silu(dense(p, "gate", x, bias)) * up
    elif kind == "geglu":
        hidden = gelu(dense(p, "gate", x, bias)) * up
    elif kind == "gelu":
        hidden = gelu(up)
    else:
        hidden = np.maximum(up, 0) ** 2
    return dense(p, "down", hidden, bias)


# Attention.


def places(document: np.ndarray) -> np.ndarray:
    """How many tokens of its document come before each token."""
    place = np.zeros(document.shape, int)
    for b, row in enumerate(document):
        for t in range(1, len(row)):
            place[b, t] = place[b, t - 1] + 1 if row[t] == row[t - 1] else 0
    return place


def visible(document: np.ndarray, window: int = 0, sink_tokens: int = 0) -> np.ndarray:
    """[B, T, S]: earlier tokens (and itself) of the own document, near enough or among its first `sink_tokens`."""
    batch, length = document.shape
    place, answer = places(document), np.zeros((batch, length, length), bool)
    for b in range(batch):
        for t in range(length):
            for s in range(t + 1):
                near = not window or t - s < window or place[b, s] < sink_tokens
                answer[b, t, s] = document[b, s] > 0 and document[b, s] == document[b, t] and near
    return answer


def softmax_heads(q, k, v, seen, *, scale, site, soft_cap=0.0, sinks=None) -> np.ndarray:
    """Softmax attention, query by query and key by key; head h reads key/value head floor(h Hk / H)."""
    batch, length, heads, _ = q.shape
    per_key_head = heads // k.shape[2]
    scores = np.zeros((batch, heads, length, length))
    for b, h, t, s in np.ndindex(scores.shape):
        score = scale * (q[b, t, h] @ k[b, s, h // per_key_head])
        scores[b, h, t, s] = soft_cap * math.tanh(score / soft_cap) if soft_cap else score
    scores = site("scores", scores)
    weights = np.zeros(scores.shape)
    for b, h, t in np.ndindex(scores.shape[:3]):
        terms = np.where(seen[b, t], np.exp(scores[b, h, t]), 0)
        total = terms.sum() + (0 if sinks is None else math.exp(sinks[h]))
        weights[b, h, t] = terms / total if total else 0
    weights = site("probabilities", weights)
    out = np.zeros((batch, length, heads, v.shape[-1]))
    for b, h, t, s in np.ndindex(scores.shape):
        out[b, t, h] += weights[b, h, t, s] * v[b, s, h // per_key_head]
    return out


def mha(
    p: dict, x, document, position, *, heads, kv_heads, head_dim, value_dim=0, window=0, sink_tokens=0,
    learned_sinks=False, qk_norm=False, norm_epsilon=1e-6, soft_cap=0.0, scale=0.0, qkv_bias=False,
    out_bias=False, rope, edits=None,
) -> Sites:  # fmt: skip
    """Multi-head, grouped and multi-query attention; `rope` is a Rotation, or None for no positions."""
    site = Sites(edits)
    x = site("layer_input", x)
    q = dense(p, "query", x, qkv_bias).reshape(*x.shape[:2], heads, head_dim)
    k = dense(p, "key", x, qkv_bias).reshape(*x.shape[:2], kv_heads, head_dim)
    v = dense(p, "value", x, qkv_bias).reshape(*x.shape[:2], kv_heads, value_dim or head_dim)
    if qk_norm:
        q, k = rms(q, p["query_norm.gain"], norm_epsilon), rms(k, p["key_norm.gain"], norm_epsilon)
    q = site("query_raw", q)
    if rope is not None:
        q, k = rotate(q, position, rope), rotate(k, position, rope)
    out = softmax_heads(
        site("query", q), k, v, visible(document, window, sink_tokens), scale=scale or 1 / math.sqrt(head_dim),
        site=site, soft_cap=soft_cap, sinks=p["sinks"] if learned_sinks else None,
    )  # fmt: skip
    site("out", dense(p, "out", site("heads", out).reshape(*x.shape[:2], -1), out_bias))
    return site


def mla(
    p: dict, x, document, position, *, heads, q_lora_rank=0, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim,
    v_head_dim, latent_norm="rms", norm_epsilon=1e-6, window=0, soft_cap=0.0, scale=0.0, query_down_bias=False,
    query_bias=False, latent_bias=False, out_bias=False, rope, edits=None,
) -> Sites:  # fmt: skip
    """DeepSeek-V2 (arXiv 2405.04434), equations 9 to 19: keys and values expanded head by head, nothing absorbed."""
    site = Sites(edits)
    x = site("layer_input", x)
    batch, length, d_n, d_r = *x.shape[:2], qk_nope_head_dim, qk_rope_head_dim
    q = x
    if q_lora_rank:
        q = dense(p, "query_down", x, query_down_bias)
        q = rms(q, p["query_norm.gain"], norm_epsilon) if latent_norm == "rms" else q
        assert q.shape[-1] == q_lora_rank
    q = site("query_raw", dense(p, "query", q, query_bias).reshape(batch, length, heads, d_n + d_r))
    q = site("query", np.concatenate([q[..., :d_n], rotate(q[..., d_n:], position, rope)], -1))
    latent = dense(p, "latent", x, latent_bias)
    latent = rms(latent, p["latent_norm.gain"], norm_epsilon) if latent_norm == "rms" else latent
    assert latent.shape[-1] == kv_lora_rank
    key_positions = rotate(dense(p, "rope_key", x, latent_bias)[:, :, None], position, rope)[:, :, 0]
    k, v = np.zeros((batch, length, heads, d_n + d_r)), np.zeros((batch, length, heads, v_head_dim))
    for h in range(heads):
        k[:, :, h, :d_n] = latent @ p["key_up.weight"][:, h * d_n : (h + 1) * d_n]
        k[:, :, h, d_n:] = key_positions
        v[:, :, h] = latent @ p["value_up.weight"][:, h * v_head_dim : (h + 1) * v_head_dim]
    scale = (scale or 1 / math.sqrt(d_n + d_r)) * rope.logit_factor
    out = softmax_heads(q, k, v, visible(document, window), scale=scale, site=site, soft_cap=soft_cap)
    site("out", dense(p, "out", site("heads", out).reshape(batch, length, -1), out_bias))
    return site


def decay_rate(head: int, heads: int, layer: int, depth: int, rule: str, layer_factor: bool = True) -> float:
    """s of head 0..H-1 in layer 0..L-1: the paper's formula (fla counts its h from 0), or the released code's."""
    if rule == "none":
        return 0.0
    if rule == "paper":
        return 8 * head / heads * (1 - layer / depth if layer_factor else 1)

    def slopes(n):
        if math.log2(n).is_integer():
            return [2 ** (-8 * h / n) for h in range(1, n + 1)]
        below = 2 ** math.floor(math.log2(n))
        return slopes(below) + slopes(2 * below)[0::2][: n - below]

    return slopes(heads)[head] * (1 - layer / (depth - 1) + 1e-5 if layer_factor else 1)


def lightning(
    p: dict, x, document, position, *, heads, head_dim, layer, depth, value_dim=0, decay="alibi", layer_factor=True,
    activation="silu", activate_values=False, gate="plain", norm_gain=False, lrpe=False, norm_epsilon=1e-6, edits=None,
) -> Sites:  # fmt: skip
    """Lightning attention (arXiv 2405.17381): KV_t = lambda KV_(t-1) + k_t v_t^T and o_t = q_t^T KV_t, by token."""
    site = Sites(edits)
    x = site("layer_input", x)
    act = {"silu": silu, "elu1": lambda z: np.where(z > 0, 1 + z, np.exp(z)), "none": lambda z: z}[activation]
    q = act(dense(p, "query", x)).reshape(*x.shape[:2], heads, head_dim)
    k = act(dense(p, "key", x)).reshape(*x.shape[:2], heads, head_dim)
    v = dense(p, "value", x).reshape(*x.shape[:2], heads, value_dim or head_dim)
    v = act(v) if activate_values else v
    q = site("query_raw", q)
    if lrpe:
        angle = position[..., None, None] * p["theta"]
        q, k = (np.concatenate([z * np.cos(angle), z * np.sin(angle)], -1) for z in (q, k))
    q, out = site("query", q), np.zeros(v.shape)
    for b, h in np.ndindex(len(x), heads):
        kept, last = math.exp(-decay_rate(h, heads, layer, depth, decay, layer_factor)), 0
        state = np.zeros((q.shape[-1], v.shape[-1]))
        for t in range(x.shape[1]):
            if document[b, t] == 0:
                continue  # Padding neither adds to the state nor ages it.
            state, last = (kept * state if document[b, t] == last else 0 * state), document[b, t]
            state = state + np.outer(k[b, t, h], v[b, t, h])
            out[b, t, h] = q[b, t, h] @ state
    gain = p["norm.gain"] if norm_gain else 1.0
    merged = rms(site("heads", out).reshape(*x.shape[:2], -1), gain, norm_epsilon)
    if gate != "none":
        opened = dense(p, "gate", x)
        merged = merged * (1 / (1 + np.exp(-opened)) if gate == "sigmoid" else opened)
    site("out", dense(p, "out", merged))
    return site
