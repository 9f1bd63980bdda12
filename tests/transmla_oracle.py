"""TransMLA (arXiv 2502.07864) on one layer in float64 NumPy, step by step as its authors' code does it.

Matrices are [out, in], heads are half-split (channel c with c + d/2), as in the checkpoints that code reads. Every loop
is written out; `fault` plants one of the mistakes a conversion can make.
"""

import dataclasses

import numpy as np

FAULTS = (
    "other U for im", "no factor on queries", "centred PCA", "PCA of rotated keys", "heads dropped", "apart",
    "no balance", "smallest first", "every frequency", "inverted gain",
)  # fmt: skip


@dataclasses.dataclass
class Layer:
    """GQA of h query and g key/value heads of d channels (values: dv)."""

    h: int
    g: int
    d: int
    dv: int
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    o: np.ndarray
    qb: np.ndarray
    kb: np.ndarray
    vb: np.ndarray
    frequencies: np.ndarray
    scale: float
    soft_cap: float = 0.0
    window: int = 0


@dataclasses.dataclass
class Latent:
    """MLA: q_down [rq, D], q_up [h, d + r, rq], rope_key [r, D], down [c, D], key_up [h, d, c], value_up [h, dv, c]."""

    q_down: np.ndarray
    q_up: np.ndarray
    qb: np.ndarray
    rope_key: np.ndarray
    rope_key_b: np.ndarray
    down: np.ndarray
    down_b: np.ndarray
    key_up: np.ndarray
    value_up: np.ndarray
    frequencies: np.ndarray
    gain: float = 0.0  # Of a norm of the latent, and of that of the queries; 0 is none.
    q_gain: float = 0.0


def softmax_rows(layer, scores):
    """Causal, within the window, with the soft cap."""
    t = len(scores)
    if layer.soft_cap:
        scores = layer.soft_cap * np.tanh(scores / layer.soft_cap)
    ages = np.arange(t)[:, None] - np.arange(t)[None]
    seen = (ages >= 0) & ((ages < layer.window) if layer.window else True)
    weights = np.where(seen, np.exp(scores - np.where(seen, scores, -np.inf).max(1, keepdims=True)), 0)
    return weights / weights.sum(1, keepdims=True)


def turn_half(x, frequencies):
    """Rotary positions 0.. of one head [T, d], half-split."""
    angle = np.arange(len(x))[:, None] * frequencies
    half = x.shape[1] // 2
    re, im = x[:, :half], x[:, half:]
    return np.concatenate([re * np.cos(angle) - im * np.sin(angle), im * np.cos(angle) + re * np.sin(angle)], axis=1)


def turn_pairs(x, frequencies):
    """The same with a pair's channels adjacent."""
    angle = np.arange(len(x))[:, None] * frequencies
    out = np.empty_like(x)
    out[:, 0::2] = x[:, 0::2] * np.cos(angle) - x[:, 1::2] * np.sin(angle)
    out[:, 1::2] = x[:, 1::2] * np.cos(angle) + x[:, 0::2] * np.sin(angle)
    return out


def gqa(layer, x):
    """The layer's output [T, D]."""
    outs = []
    for i in range(layer.h):
        j = i * layer.g // layer.h
        q = x @ layer.q[i * layer.d : (i + 1) * layer.d].T + layer.qb[i * layer.d : (i + 1) * layer.d]
        k = x @ layer.k[j * layer.d : (j + 1) * layer.d].T + layer.kb[j * layer.d : (j + 1) * layer.d]
        v = x @ layer.v[j * layer.dv : (j + 1) * layer.dv].T + layer.vb[j * layer.dv : (j + 1) * layer.dv]
        scores = turn_half(q, layer.frequencies) @ turn_half(k, layer.frequencies).T * layer.scale
        outs.append(softmax_rows(layer, scores) @ v)
    return np.concatenate(outs, axis=1) @ layer.o.T


def size(c):
    """Root mean square of each row."""
    return np.sqrt(np.mean(c**2, axis=1, keepdims=True) + 1e-6)


def mla(layer, latent, x, scale):
    """The converted layer's output [T, D]; `scale` is MLA's."""
    c, low = x @ latent.down.T + latent.down_b, x @ latent.q_down.T
    c = c / size(c) * latent.gain if latent.gain else c
    low = low / size(low) * latent.q_gain if latent.q_gain else low
    kr = turn_pairs(x @ latent.rope_key.T + latent.rope_key_b, latent.frequencies)
    outs = []
    for i in range(layer.h):
        q = low @ latent.q_up[i].T + latent.qb[i]
        nope, rope = q[:, : latent.key_up.shape[1]], turn_pairs(q[:, latent.key_up.shape[1] :], latent.frequencies)
        scores = (nope @ (c @ latent.key_up[i].T).T + rope @ kr.T) * scale
        outs.append(softmax_rows(layer, scores) @ (c @ latent.value_up[i].T))
    return np.concatenate(outs, axis=1) @ layer.o.T


def principal(rows, fault=""):
    """Eigenvectors as columns, the largest first: of the second moment about zero, damped by 1% of its diagonal."""
    if fault == "centred PCA":
        rows = rows - rows.mean(0)
    moment = rows.T @ rows
    moment = moment + 0.01 * np.mean(np.diag(moment)) * np.eye(len(moment))
    values, vectors = np.linalg.eigh(moment)
    order = np.argsort(values) if fault == "smallest first" else np.argsort(-values)
    return vectors[:, order]


def rotation(layer, keys, fold, collapse, fault=""):
    """The matrix that makes new key channels of old ones (columns are new), by groups of frequencies."""
    g, d = layer.g, layer.d
    result = np.zeros((g * d, g * d))
    groups, each = d // 2 // fold, fold // collapse
    for i in range(groups):
        members = [(c, kv, a) for c in range(collapse) for kv in range(g) for a in range(each)]
        channel = lambda kv, j, part: kv * d + j + part * d // 2  # noqa: E731
        old = [[channel(kv, i * fold + a * collapse + c, part) for c, kv, a in members] for part in (0, 1)]
        both = principal(np.concatenate([keys[:, old[0]], keys[:, old[1]]]))
        if fault == "heads dropped":
            both = np.eye(len(members))
        u = [both, principal(keys[:, old[1]]) if fault == "other U for im" else both]
        for p, (c, kv, a) in enumerate(members):
            pair = c * g * d // 2 // collapse + kv * groups * each + i * each + a
            for part in (0, 1):
                result[old[part], 2 * pair + part] = u[part][:, p]
    return result


def convert(layer, x, fold, collapse, rank, q_rank=0, norms=False, weights=False, fault=""):
    """Steps 1 to 7 with the inputs x [N, D] as calibration (`weights`: steps 4 to 6 by the weights alone)."""
    d, r, lat = layer.d, layer.d // collapse, layer.g * layer.d
    keys = x @ layer.k.T + layer.kb
    if fault == "PCA of rotated keys":
        heads = np.split(keys, layer.g, axis=1)
        keys = np.concatenate([turn_half(head, layer.frequencies) for head in heads], axis=1)
    turn = rotation(layer, keys, fold, collapse, fault)
    k, kb = turn.T @ layer.k, turn.T @ layer.kb
    k_up = np.stack([np.eye(lat)[j * d : (j + 1) * d] for j in (np.arange(layer.h) * layer.g // layer.h)]) @ turn
    v_up = np.stack([
        np.eye(layer.g * layer.dv)[j * layer.dv : (j + 1) * layer.dv] for j in (np.arange(layer.h) * layer.g // layer.h)
    ])  # fmt: skip
    nope = k[r:].T if weights else x @ k[r:].T + kb[r:]
    values = layer.v.T if weights else x @ layer.v.T + layer.vb
    ratio = np.linalg.norm(nope, axis=0).mean() / np.linalg.norm(values, axis=0).mean()
    ratio = 1.0 if fault == "no balance" else ratio
    down = np.concatenate([k[r:] / ratio, layer.v])
    down_b = np.concatenate([kb[r:] / ratio, layer.vb])
    width = lat - r
    key_up = np.concatenate([k_up[:, :, r:] * ratio, np.zeros((layer.h, d, len(layer.v)))], axis=2)
    value_up = np.concatenate([np.zeros((layer.h, layer.dv, width)), v_up], axis=2)
    joint = np.concatenate([nope / ratio, values], axis=1)
    if fault == "apart":  # Keys and values each by themselves, half of the latent for each.
        turn_c = np.zeros((len(down), rank))
        turn_c[:width, : rank // 2] = principal(joint[:, :width])[:, : rank // 2]
        turn_c[width:, rank // 2 :] = principal(joint[:, width:])[:, : rank - rank // 2]
    else:
        turn_c = principal(joint, fault)[:, :rank]
    rows = layer.q.T if weights else x @ layer.q.T + layer.qb
    some = principal(rows, fault)[:, :q_rank] if q_rank else np.eye(len(layer.q))
    q_down, qb = some.T @ layer.q, layer.qb.reshape(layer.h, d)
    factor = 1.0 if fault == "no factor on queries" else layer.scale * (d + r) ** 0.5
    heads = some.reshape(layer.h, d, -1)
    q_up = factor * np.stack([np.concatenate([heads[i], k_up[i][:, :r].T @ heads[i]]) for i in range(layer.h)])
    qb = factor * np.stack([np.concatenate([qb[i], k_up[i][:, :r].T @ qb[i]]) for i in range(layer.h)])
    down, down_b = turn_c.T @ down, turn_c.T @ down_b
    sizes = [size(x @ down.T + down_b), size(x @ q_down.T)]
    gains = [np.mean(1 / each) if fault == "inverted gain" else np.mean(each) for each in sizes]
    frequencies = layer.frequencies[: r // 2] if fault == "every frequency" else layer.frequencies[::collapse]
    return Latent(
        q_down, q_up, qb, k[:r], kb[:r], down, down_b, key_up @ turn_c, value_up @ turn_c, frequencies,
        gains[0] if norms else 0.0, gains[1] if norms and q_rank else 0.0,
    )  # fmt: skip
