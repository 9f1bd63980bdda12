"""An oracle of the latent decode op in float64 NumPy, one query at a time, and the settings it is asked."""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Setting:
    """One call: rows' lengths, [T, S, heads, slices, C, R], blocks with a scale, pages, and what else is on."""

    lengths: tuple[int, ...]
    shape: tuple[int, int, int, int, int, int]
    blocks: int = 1
    kept: str = "int8"
    page: int = 0
    window: int | None = None
    starts: tuple[int, ...] | None = None
    soft_cap: float = 0.0

    @property
    def scale(self) -> float:
        return 0.5 / np.sqrt(self.shape[4] + self.shape[5])


FP8 = "float8_e4m3fn"
SETTINGS = {
    "ragged": Setting((0, 1, 15, 16, 17, 48), (1, 48, 4, 1, 32, 8)),
    "three queries": Setting((0, 2, 3, 17, 50), (3, 50, 4, 1, 256, 16), blocks=2, window=7, soft_cap=1.5),
    "slices": Setting((33, 0, 40, 16), (2, 40, 8, 2, 128, 64), kept=FP8, starts=(5, 0, 39, 30)),
    "mla": Setting((23, 40), (2, 40, 16, 1, 512, 64), blocks=4, kept=FP8),
    "tpla": Setting((23, 40), (1, 40, 16, 1, 256, 64), blocks=2),
    "pages": Setting((0, 3, 24, 13), (1, 24, 4, 1, 64, 8), blocks=4, kept=FP8, page=4),
    # Of the blocks of 16 one is just, or just not, seen whole by all three queries.
    "slices in pages": Setting((0, 33, 34, 35), (3, 36, 4, 2, 16, 8), page=3, window=18),
    "large pages": Setting((0, 170, 33, 256), (2, 256, 4, 1, 256, 128), blocks=2, page=128, starts=(0, 5, 0, 140)),
    "large pages of slices": Setting((290, 3), (3, 384, 4, 2, 128, 64), kept=FP8, page=128, window=150),
}
# For blocks of 64 places and columns, which are the smallest that Hopper's instructions take.
LONG = {
    "long": Setting((130, 192), (3, 200, 6, 1, 128, 64), blocks=2, window=70, starts=(5, 140), soft_cap=1.5),
    "long mla": Setting((136,), (1, 136, 4, 1, 384, 64), blocks=3, kept=FP8),
    "many rows of slices": Setting((70,), (2, 72, 80, 2, 64, 64), kept=FP8),
    "long pages": Setting((200, 0), (2, 256, 4, 1, 64, 64), page=128, starts=(70, 0)),
}


def places(setting: Setting, row: int, query: int) -> range:
    """The places that a query sees."""
    own = setting.lengths[row] - setting.shape[0] + query
    first = setting.starts[row] if setting.starts else 0
    return range(max(first, own - setting.window + 1 if setting.window else 0, 0), own + 1)


def inputs(setting: Setting, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Arrays of a call, in the op's layout; what no query may see is NaN or infinite, unused tables point anywhere."""
    rng = np.random.default_rng(0)
    queries, slots, heads, slices, width, rope_width = setting.shape
    batch, kept = len(setting.lengths), jnp.dtype(setting.kept)
    axes = (batch, slots, slices) if slices > 1 else (batch, slots)

    def draw(*shape: int) -> np.ndarray:
        return np.array(jnp.asarray(rng.standard_normal(shape), dtype))

    latent = 40 * rng.standard_normal((*axes, width))
    latent = np.clip(np.round(latent), -127, 127) if setting.kept == "int8" else latent
    caches = {
        "values": latent.astype(kept),
        "scales": (rng.uniform(0.3, 2, (*axes, setting.blocks)) / 40).astype(np.float32),
        "rope": draw(batch, slots, rope_width),
    }
    dead = np.ones((batch, slots), bool)
    for row in range(batch):
        for query in range(queries):
            dead[row, places(setting, row, query)] = False
    caches["values"][dead] = -128 if setting.kept == "int8" else np.nan
    caches["scales"][dead] = np.inf
    caches["rope"][dead] = -np.inf
    x = {
        "q": draw(batch, queries, heads, width),
        "q_rope": draw(batch, queries, heads, rope_width),
        "lengths": np.array(setting.lengths, np.int32),
    }
    if setting.page:
        used = ~dead.reshape(batch, -1, setting.page).all(-1)
        table = rng.permutation(used.size + 2)[: used.size].reshape(used.shape)
        for name, cache in caches.items():
            pages = np.zeros((used.size + 2, setting.page, *cache.shape[2:]), cache.dtype)
            pages[:] = -128 if cache.dtype == np.int8 else np.nan
            pages[table] = cache.reshape(*used.shape, setting.page, *cache.shape[2:])
            caches[name] = pages
        x["table"] = np.where(used, table, np.where(rng.random(used.shape) < 0.5, -7, 10**9)).astype(np.int32)
    if setting.starts:
        x["starts"] = np.array(setting.starts, np.int32)
    return x | caches


def oracle(setting: Setting, x: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Output and lse, float64: each number of the cache times the scale of its block, then the softmax."""
    queries, _, heads, slices, width, _ = setting.shape
    out = np.zeros((len(setting.lengths), queries, heads, width))
    lse = np.full(out.shape[:3], -np.inf)
    channel = np.arange(width) // (width // setting.blocks)
    for row, query, head in np.ndindex(lse.shape):
        seen = np.array(places(setting, row, query), int)
        at = (row, seen)
        if setting.page:
            at = (x["table"][row, seen // setting.page], seen % setting.page)
        own = (*at, head * slices // heads) if slices > 1 else at
        latent = x["values"][own].astype(np.float64) * x["scales"][own].astype(np.float64)[:, channel]
        s = latent @ x["q"][row, query, head].astype(np.float64)
        s += x["rope"][at].astype(np.float64) @ x["q_rope"][row, query, head].astype(np.float64)
        s *= setting.scale
        if setting.soft_cap:
            s = setting.soft_cap * np.tanh(s / setting.soft_cap)
        if len(s):
            weights = np.exp(s - s.max())
            out[row, query, head] = weights @ latent / weights.sum()
            lse[row, query, head] = s.max() + np.log(weights.sum())
    return out, lse
