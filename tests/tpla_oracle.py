"""MLA and TPLA (arXiv 2508.15881) in float64 NumPy: one row of tokens, loops over queries, heads and slices.

Row vectors times matrices. A token sees itself and what stands before it in the row; `positions` only turn the rope
channels. Slice j of the latent is its channels j d/g .. (j+1) d/g - 1; `gain` multiplies normalised latents before they
are cached.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Weights:
    """One MLA layer: h heads of n content, r rope and v value channels over a latent of d; D is the model's width.

    `query` is [D, h (n+r)], or [rq, h (n+r)] behind `query_down` [D, rq] and the normalisation with `query_gain` [rq].
    Columns are head-major: head i owns n+r of `query` (content first), n of `key_up`, v of `value_up`, v rows of `out`.
    """

    h: int
    n: int
    r: int
    v: int
    d: int
    query: np.ndarray
    latent: np.ndarray  # [D, d]
    rope_key: np.ndarray  # [D, r]
    gain: np.ndarray  # [d]
    key_up: np.ndarray  # [d, h n]
    value_up: np.ndarray  # [d, h v]
    out: np.ndarray  # [h v, D]
    query_down: np.ndarray | None = None
    query_gain: np.ndarray | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[5:]:
            if getattr(self, field.name) is not None:
                setattr(self, field.name, np.array(getattr(self, field.name), np.float64))
        width, rank = self.latent.shape[0], self.query.shape[0]
        if (self.query_down is None) != (self.query_gain is None):
            raise ValueError("query_down and query_gain come together")
        wanted = {
            "query": (width if self.query_down is None else rank, self.h * (self.n + self.r)),
            "latent": (width, self.d),
            "rope_key": (width, self.r),
            "gain": (self.d,),
            "key_up": (self.d, self.h * self.n),
            "value_up": (self.d, self.h * self.v),
            "out": (self.h * self.v, width),
            "query_down": (width, rank),
            "query_gain": (rank,),
        }
        for name, shape in wanted.items():
            found = getattr(self, name)
            if found is not None and found.shape != shape:
                raise ValueError(f"{name} is {found.shape}, not {shape}")

    def head_key_up(self, head: int) -> np.ndarray:
        return self.key_up[:, head * self.n : (head + 1) * self.n]

    def head_value_up(self, head: int) -> np.ndarray:
        return self.value_up[:, head * self.v : (head + 1) * self.v]

    def head_out(self, head: int) -> np.ndarray:
        return self.out[head * self.v : (head + 1) * self.v]


# The pieces.


def rope(x: np.ndarray, position: float, theta: float) -> np.ndarray:
    """Turns x [..., r]: channel i of the first half with channel i of the second, by position theta^(-2i/r) radians."""
    half = x.shape[-1] // 2
    turned = np.array(x, np.float64)
    for i in range(half):
        angle = position * theta ** (-2 * i / x.shape[-1])
        x1, x2 = x[..., i], x[..., half + i]
        turned[..., i] = x1 * np.cos(angle) - x2 * np.sin(angle)
        turned[..., half + i] = x2 * np.cos(angle) + x1 * np.sin(angle)
    return turned


def probabilities(scores: np.ndarray) -> np.ndarray:
    """The softmax of one query's scores [S]."""
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def whole_norm(c: np.ndarray, eps: float) -> np.ndarray:
    """One token's channels over their root mean square: c / sqrt(||c||^2 / d + eps)."""
    return c / np.sqrt((c @ c) / len(c) + eps)


def slice_norm(c_j: np.ndarray, d: int, alpha_j: float, eps: float) -> np.ndarray:
    """Section 3: a slice c_j [d/g] over its estimate of the whole latent's, c_j / sqrt(alpha_j / d ||c_j||^2 + eps)."""
    return c_j / np.sqrt(alpha_j / d * (c_j @ c_j) + eps)


def channels(d: int, slices: int, j: int) -> slice:
    """Where slice j lies among d channels."""
    if d % slices:
        raise ValueError(f"{d} channels do not make {slices} equal slices")
    return slice(j * (d // slices), (j + 1) * (d // slices))


def queries(weights: Weights, x: np.ndarray, positions: np.ndarray, theta: float, eps: float):
    """Content [T, h, n] and turned rope [T, h, r] of the queries; eps is also the query's own normalisation's."""
    content = np.zeros((len(x), weights.h, weights.n))
    turned = np.zeros((len(x), weights.h, weights.r))
    for t, token in enumerate(x):
        if weights.query_down is not None:
            token = whole_norm(token @ weights.query_down, eps) * weights.query_gain
        by_head = (token @ weights.query).reshape(weights.h, weights.n + weights.r)
        content[t] = by_head[:, : weights.n]
        turned[t] = rope(by_head[:, weights.n :], positions[t], theta)
    return content, turned


def latents(weights: Weights, x: np.ndarray, eps: float) -> np.ndarray:
    """c^ [T, d] as MLA caches it: the whole normalisation, times the gain. After `fold`, what `pca` is fitted on."""
    found = np.zeros((len(x), weights.d))
    for t, token in enumerate(x):
        found[t] = whole_norm(token @ weights.latent, eps) * weights.gain
    return found


def sliced_latents(weights: Weights, x: np.ndarray, eps: float, slices: int, norm_factor) -> np.ndarray:
    """c^ [T, d] of TPLA: every slice by its own normalisation, times its part of the gain."""
    found = np.zeros((len(x), weights.d))
    for t, token in enumerate(x):
        c = token @ weights.latent
        for j in range(slices):
            at = channels(weights.d, slices, j)
            found[t, at] = slice_norm(c[at], weights.d, norm_factor[j], eps) * weights.gain[at]
    return found


def cache(weights, x, positions, theta, eps, slices, norm_factor, norm="slice", prefill=0):
    """What is cached: c^ [T, d], of tokens before `prefill` by the whole normalisation, and turned rope keys [T, r]."""
    if norm not in ("slice", "whole"):
        raise ValueError(f"norm is {norm!r}, not slice or whole")
    c = latents(weights, x, eps)
    if norm == "slice":
        c[prefill:] = sliced_latents(weights, x[prefill:], eps, slices, norm_factor)
    k_rope = np.zeros((len(x), weights.r))
    for t, token in enumerate(x):
        k_rope[t] = rope(token @ weights.rope_key, positions[t], theta)
    return c, k_rope


# The layers.


def mla(weights: Weights, x, positions, theta: float, eps: float, scale: float) -> np.ndarray:
    """Exact MLA of x [T, D], unabsorbed: keys and values of every head are written out."""
    x = np.asarray(x, np.float64)
    q_content, q_rope = queries(weights, x, positions, theta, eps)
    c, k_rope = cache(weights, x, positions, theta, eps, 1, None, norm="whole")
    y = np.zeros_like(x)
    for i in range(weights.h):
        key = c @ weights.head_key_up(i)
        value = c @ weights.head_value_up(i)
        for t in range(len(x)):
            scores = [scale * (q_content[t, i] @ key[s] + q_rope[t, i] @ k_rope[s]) for s in range(t + 1)]
            y[t] += probabilities(np.array(scores)) @ value[: t + 1] @ weights.head_out(i)
    return y


def tpla(
    weights: Weights,
    x,
    positions,
    theta: float,
    eps: float,
    scale: float,
    slices: int,
    norm_factor,
    logit_factor,
    norm: str = "slice",
    softmax: str = "slice",
    prefill: int = 0,
    out: str = "allreduce",
) -> np.ndarray:
    """TPLA of x [T, D] by sections 1, 3, 4 and 6, absorbed: all heads over every slice, the slices' outputs summed.

    Tokens before `prefill` are MLA's, in what they attend to and in what they cache. norm="whole" normalises the other
    tokens' latents as MLA does, and ignores `norm_factor` (alpha [g]). softmax="whole" is one softmax over the
    slices' summed scores, the rope's counted once, and ignores `logit_factor` (mu [g]). out="scatter_heads" sums the
    slices' values of each head before the output projection, where "allreduce" sums after it: equal but for rounding.
    """
    if softmax not in ("slice", "whole") or out not in ("allreduce", "scatter_heads"):
        raise ValueError(f"softmax={softmax!r} or out={out!r} is not known")
    x = np.asarray(x, np.float64)
    q_content, q_rope = queries(weights, x, positions, theta, eps)
    c, k_rope = cache(weights, x, positions, theta, eps, slices, norm_factor, norm, prefill)
    y = np.zeros_like(x)
    y[:prefill] = mla(weights, x[:prefill], positions[:prefill], theta, eps, scale)
    for t in range(prefill, len(x)):
        by_slice = np.zeros((slices, x.shape[1]))
        values = np.zeros((slices, weights.h, weights.v))
        for i in range(weights.h):
            absorbed = weights.head_key_up(i) @ q_content[t, i]  # [d]
            rope_scores = k_rope[: t + 1] @ q_rope[t, i]
            parts = [channels(weights.d, slices, j) for j in range(slices)]
            content = [c[: t + 1, at] @ absorbed[at] for at in parts]
            for j, at in enumerate(parts):
                if softmax == "whole":
                    p = probabilities(scale * (sum(content) + rope_scores))
                else:
                    p = probabilities(scale * (logit_factor[j] * content[j] + rope_scores))
                values[j, i] = (p @ c[: t + 1, at]) @ weights.head_value_up(i)[at]
                by_slice[j] += values[j, i] @ weights.head_out(i)
        y[t] = by_slice.sum(0) if out == "allreduce" else values.sum(0).reshape(-1) @ weights.out
    return y


def gla(
    weights: Weights, x, positions, theta, eps, scale, slices, norm_factor, logit_factor=None, norm="slice", prefill=0
) -> np.ndarray:
    """Section 1's GLA made of MLA: heads j h/g .. (j+1) h/g - 1 over slice j alone; mu is 1 unless given."""
    if weights.h % slices:
        raise ValueError(f"{weights.h} heads do not make {slices} equal groups")
    x = np.asarray(x, np.float64)
    q_content, q_rope = queries(weights, x, positions, theta, eps)
    c, k_rope = cache(weights, x, positions, theta, eps, slices, norm_factor, norm, prefill)
    y = np.zeros_like(x)
    y[:prefill] = mla(weights, x[:prefill], positions[:prefill], theta, eps, scale)
    for t in range(prefill, len(x)):
        for i in range(weights.h):
            j = i // (weights.h // slices)
            at = channels(weights.d, slices, j)
            mu = 1.0 if logit_factor is None else logit_factor[j]
            content = c[: t + 1, at] @ (weights.head_key_up(i)[at] @ q_content[t, i])
            p = probabilities(scale * (mu * content + k_rope[: t + 1] @ q_rope[t, i]))
            y[t] += (p @ c[: t + 1, at]) @ weights.head_value_up(i)[at] @ weights.head_out(i)
    return y


# Section 2: what is absorbed in the weights.


def fold(weights: Weights) -> Weights:
    """The gain moved into both up-projections: diag(gain) W."""
    gain = np.diag(weights.gain)
    return dataclasses.replace(
        weights, key_up=gain @ weights.key_up, value_up=gain @ weights.value_up, gain=np.ones(weights.d)
    )


def rotate(weights: Weights, U: np.ndarray) -> Weights:
    """Latent columns times U [d, d], up-projections U^T times themselves; rope columns stay. Wants the gain folded."""
    if not np.all(weights.gain == 1):
        raise ValueError("fold the gain before rotating")
    return dataclasses.replace(
        weights, latent=weights.latent @ U, key_up=U.T @ weights.key_up, value_up=U.T @ weights.value_up
    )


def hadamard(d: int, signs) -> np.ndarray:
    """diag(signs) H / sqrt(d), H Sylvester's: its entry is -1 where row and column share an odd number of bits."""
    if d & (d - 1):
        raise ValueError(f"{d} is no power of two")
    return np.array([[signs[a] * (-1.0) ** (a & b).bit_count() for b in range(d)] for a in range(d)]) / np.sqrt(d)


def pca(latents: np.ndarray, center: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors (columns) and eigenvalues, largest first, of F^T F / N; center=True takes F's mean away before."""
    F = np.asarray(latents, np.float64)
    if center:
        F = F - F.mean(0)
    values, vectors = np.linalg.eigh(F.T @ F / len(F))
    return vectors[:, ::-1], values[::-1]


# Sections 3 and 4: the factors.


def energies(of: np.ndarray, slices: int) -> np.ndarray:
    """e [g]: each slice's part of the sum of eigenvalues [d], or of the sum of squares of latents [N, d]."""
    of = np.asarray(of, np.float64)
    by_channel = of if of.ndim == 1 else (of**2).sum(0)
    return np.array([by_channel[channels(len(by_channel), slices, j)].sum() for j in range(slices)]) / by_channel.sum()


def norm_factors(energies: np.ndarray) -> np.ndarray:
    """alpha_j = 1 / e_j; for the identity and Hadamard's rotation give e_j = 1/g, which makes alpha_j = g."""
    return 1 / np.asarray(energies, np.float64)


def logit_factors(kind: str, energies: np.ndarray, cap: float = 8.0, **calibration) -> np.ndarray:
    """mu [g]: "one", "energy" (e_j), "inv_energy" (1 / e_j, at most cap), or "lsq" with what `lsq` takes."""
    energies = np.asarray(energies, np.float64)
    if kind == "lsq":
        return lsq(slices=len(energies), **calibration)
    return {"one": np.ones_like(energies), "energy": energies, "inv_energy": np.minimum(1 / energies, cap)}[kind]


def lsq(weights: Weights, rows, eps: float, slices: int, norm: str = "slice", norm_factor=None) -> np.ndarray:
    """mu [g]: the factor on slice j's content logits that comes nearest to the whole latent's, by least squares.

    Over all pairs of a query and a key it sees, of all heads of all `rows` (a sequence of [T, D]), each of weight 1.
    From both logits goes their mean over the keys that the query sees. The whole logits are MLA's; the slice's are over
    latents of the sliced normalisation (norm="slice", with norm_factor), or of the whole one. 1 where a slice's are 0.
    """
    if norm not in ("slice", "whole"):
        raise ValueError(f"norm is {norm!r}, not slice or whole")
    products, squares = np.zeros(slices), np.zeros(slices)
    for x in rows:
        x = np.asarray(x, np.float64)
        content, _ = queries(weights, x, np.zeros(len(x)), 1.0, eps)  # Content has no positions.
        c = latents(weights, x, eps)
        local_c = c if norm == "whole" else sliced_latents(weights, x, eps, slices, norm_factor)
        for t in range(len(x)):
            for i in range(weights.h):
                absorbed = weights.head_key_up(i) @ content[t, i]
                full = c[: t + 1] @ absorbed
                full = full - full.mean()
                for j in range(slices):
                    at = channels(weights.d, slices, j)
                    local = local_c[: t + 1, at] @ absorbed[at]
                    local = local - local.mean()
                    products[j] += local @ full
                    squares[j] += local @ local
    return np.array([p / s if s > 0 else 1.0 for p, s in zip(products, squares, strict=True)])
