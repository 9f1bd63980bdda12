"""An oracle of the decode op in float64 NumPy, one query at a time, and the settings it is asked."""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Setting:
    """One call: rows' lengths, [T, S, heads, kv heads, width, value width], pages, and what else is on."""

    lengths: tuple[int, ...]
    shape: tuple[int, int, int, int, int, int]
    page: int = 0
    shared: bool = False
    window: int | None = None
    starts: tuple[int, ...] | None = None
    sinks: bool = False
    soft_cap: float = 0.0


SETTINGS = {
    "ragged": Setting((0, 1, 15, 16, 17, 48), (1, 48, 8, 2, 40, 24)),
    "three queries": Setting((0, 2, 3, 17, 50), (3, 50, 6, 3, 128, 128), window=7, sinks=True),
    "capped": Setting((33, 0, 40, 16), (2, 40, 4, 2, 128, 128), starts=(5, 0, 39, 30), sinks=True, soft_cap=1.5),
    "latent": Setting((23, 40, 1), (2, 40, 4, 1, 576, 512), shared=True),
    "wide": Setting((37, 20), (1, 40, 4, 2, 256, 256)),
    "pages": Setting((0, 3, 24, 13), (1, 24, 8, 2, 128, 128), page=4),
    # Of the blocks of 16 one is just, or just not, seen whole by all three queries.
    "pages of three": Setting((0, 33, 34, 35), (3, 36, 4, 2, 16, 16), page=3, window=18, sinks=True),
    "latent pages": Setting((9, 0, 24), (2, 32, 4, 1, 128, 64), page=16, shared=True, starts=(0, 0, 9)),
}
# For blocks of 64 and 128, which are the smallest that Hopper's instructions take.
LONG = {
    "long": Setting(
        (0, 3, 130, 192), (3, 200, 6, 3, 64, 128), window=70, starts=(0, 0, 5, 140), sinks=True, soft_cap=1.5
    ),
    "long latent": Setting((23, 136), (2, 136, 4, 1, 448, 384), shared=True),
    "long pages": Setting((0, 3, 170, 66), (2, 192, 4, 2, 64, 64), page=16, window=75),
    "longest pages": Setting((70, 256), (1, 256, 4, 2, 64, 64), page=128, sinks=True),
    "long latent pages": Setting((9, 0, 130), (2, 192, 4, 1, 128, 64), page=64, shared=True, starts=(0, 0, 9)),
    "many rows": Setting((7, 24), (3, 24, 48, 2, 64, 64)),
}


def places(setting: Setting, row: int, query: int) -> range:
    """The places that a query sees."""
    own = setting.lengths[row] - setting.shape[0] + query
    first = setting.starts[row] if setting.starts else 0
    return range(max(first, own - setting.window + 1 if setting.window else 0, 0), own + 1)


def inputs(setting: Setting, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Arrays of a call, in the op's layout; what no query may see is NaN or infinite, unused tables point anywhere."""
    rng = np.random.default_rng(0)
    queries, slots, heads, kv_heads, width, value_width = setting.shape
    batch = len(setting.lengths)

    def draw(*shape: int) -> np.ndarray:
        return np.array(jnp.asarray(rng.standard_normal(shape), dtype))

    x = {"q": draw(batch, queries, heads, width), "lengths": np.array(setting.lengths, np.int32)}
    caches = {"k": draw(batch, slots, kv_heads, width)}
    if not setting.shared:
        caches["v"] = draw(batch, slots, kv_heads, value_width)
    dead = np.ones((batch, slots), bool)
    for row in range(batch):
        for query in range(queries):
            dead[row, places(setting, row, query)] = False
    for number, cache in enumerate(caches.values()):
        cache[dead] = (np.nan, np.inf, -np.inf)[number]
    if setting.page:
        used = ~dead.reshape(batch, -1, setting.page).all(-1)
        table = rng.permutation(used.size + 2)[: used.size].reshape(used.shape)
        for name, cache in caches.items():
            pages = np.full((used.size + 2, setting.page, *cache.shape[2:]), np.nan, cache.dtype)
            pages[table] = cache.reshape(*used.shape, setting.page, *cache.shape[2:])
            caches[name] = pages
        x["table"] = np.where(used, table, np.where(rng.random(used.shape) < 0.5, -7, 10**9)).astype(np.int32)
    if setting.starts:
        x["starts"] = np.array(setting.starts, np.int32)
    if setting.sinks:
        x["sinks"] = rng.standard_normal(heads).astype(np.float32)
    return x | caches


def oracle(setting: Setting, x: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Output and lse, float64."""
    queries, _, heads, kv_heads, width, value_width = setting.shape
    out = np.zeros((len(setting.lengths), queries, heads, value_width))
    lse = np.full(out.shape[:3], -np.inf)
    values = x["k"][..., :value_width] if setting.shared else x["v"]
    for row, query, head in np.ndindex(lse.shape):
        seen = np.array(places(setting, row, query), int)
        at = (row, seen)
        if setting.page:
            at = (x["table"][row, seen // setting.page], seen % setting.page)
        k, v = (cache[*at, head * kv_heads // heads].astype(np.float64) for cache in (x["k"], values))
        s = k @ x["q"][row, query, head].astype(np.float64) * width**-0.5
        if setting.soft_cap:
            s = setting.soft_cap * np.tanh(s / setting.soft_cap)
        weights = np.exp(s)
        total = weights.sum() + (np.exp(np.float64(x["sinks"][head])) if setting.sinks else 0)
        if total > 0:
            out[row, query, head] = weights @ v / total
            lse[row, query, head] = np.log(total)
    return out, lse
