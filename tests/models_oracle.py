"""Small models, and what they should do written out in NumPy float64: the decoder, the sampler, counts by hand."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import models
from configs import attention, base
from kernels.tokens import Tokens, sequence
from layers.attention import Attention, AttentionOutput
from layers.cache import StateCache
from layers.hooks import Hooks
from layers.setting import Setting
from models.decoder import Block, DecoderLM

VOCABULARY, ROWS = 50, 64  # Tokens, and rows of the tables: the next multiple of 16.
# Applied where a preset has the field switched on.
SMALL = {
    "heads": 4, "head_dim": 6, "window": 5, "sink_tokens": 2,
    "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
}  # fmt: skip


def options(variant: str, **changes: Any) -> dict[str, Any]:
    """A preset's options at small sizes."""
    chosen = attention.get(variant).to_dict()
    return chosen | {name: value for name, value in SMALL.items() if chosen.get(name)} | changes


def small(variant: str = "gqa", **changes: Any) -> dict[str, Any]:
    """`config.model` of a small decoder; `changes` are its fields. Untied and wide draws: no token repeats for ever."""
    sizes = dict(width=24, depth=2, max_length=32, vocab_multiple=16, init_std=0.3, tie_embeddings=False)
    mlp = dict(kind="swiglu", width=32, bias=False)
    return base.model().to_dict() | sizes | dict(attention=options(variant), mlp=mlp) | changes


LIGHTNING, MLA = options("lightning", lrpe=False), options("mla")
SWIGLU, NORM = dict(kind="swiglu", width=32, bias=False), base.model().norm.to_dict()
RESIDUAL = base.model().residual.to_dict()


def spec(attention: dict[str, Any], **mlp: Any) -> dict[str, dict[str, Any]]:
    """What one layer is, written out."""
    return dict(attention=attention, mlp=SWIGLU | mlp, norm=NORM, residual=RESIDUAL)


# A config, whether it is scanned, its layers written out, and of each the place: stack, block in the pattern, round.
MIXED = {
    "one value per layer, the last repeating": (
        small(depth=4, mlp=SWIGLU | dict(width=(32, 32, 40)), attention=options("gqa", soft_cap=(0., 0., 0., 2., 9.))),
        "never",
        [spec(options("gqa", soft_cap=cap), width=width) for cap, width in ((0., 32), (0., 32), (0., 40), (2., 40))],
        [(0, 0, 0), (0, 0, 1), (1, 0, 0), (2, 0, 0)],
    ),
    "three kinds of attention": (
        small(depth=5, per_layer=(("1::2", {"attention": LIGHTNING}), ("-1", {"attention": MLA, "mlp.width": 16}))),
        "always",
        [spec(options("gqa")), spec(LIGHTNING), spec(options("gqa")), spec(LIGHTNING), spec(MLA, width=16)],
        [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 0)],
    ),
}  # fmt: skip


def built(config: Mapping[str, Any], seed: int = 0) -> DecoderLM:
    """The model of `config` with numbers drawn here: gains and biases are not those of a new model, and nothing has
    to be compiled for it. Constants are the model's own."""
    definition, parameters, constants = nnx.split(nnx.merge(*models.abstract(config, VOCABULARY)), nnx.Param, ...)
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        gain = "gain" in jax.tree_util.keystr(path)
        return jnp.asarray(gain + config["init_std"] * rng.normal(size=leaf.shape), leaf.dtype)

    parameters = jax.tree_util.tree_map_with_path(draw, parameters)
    if jax.tree.leaves(constants):
        constants = jax.jit(lambda: nnx.split(initialised(config, seed), nnx.Param, ...)[2])()
    return nnx.merge(definition, parameters, constants)


def initialised(config: Mapping[str, Any], seed: int = 0) -> DecoderLM:
    """A new model."""
    return models.build(config, vocab_size=VOCABULARY, rngs=nnx.Rngs(seed))


def call(model: DecoderLM, ids: Any, **arguments: Any) -> models.ModelOutput:
    """The model's call as one compiled program."""
    definition, state = nnx.split(model)
    return jax.jit(lambda state, ids: nnx.merge(definition, state)(ids, **arguments))(state, ids)


def some_ids(batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length)).astype(np.int32)


def at(tree: Any, path: str) -> np.ndarray:
    """A parameter by its dotted name, float64."""
    for name in path.split("."):
        tree = getattr(tree, name)
    return np.asarray(tree[...], np.float64)


class Watched(Attention):
    """An attention that passes on a multiple of what comes in, and reports on it through `aux`."""

    def __init__(self, setting: Setting, *, layer_index: int, rngs: nnx.Rngs, weight: float = 1.0) -> None:
        self.weight, self.factor = weight, nnx.Param(jax.random.normal(rngs.params(), (setting.width,)))

    def __call__(self, x, tokens, cache=None, hooks=None, layer=0) -> AttentionOutput:
        aux = {"loss/size": self.weight * jnp.mean(x * x), "loss/deep/sum": jnp.sum(x), "first": x[0, 0, 0]}
        return AttentionOutput(x * self.factor[...], None if cache is None else cache.advance({}, tokens), aux)

    def init_cache(self, batch: int, length: int, dtype: str) -> StateCache:
        return StateCache.create(batch, {})

    def parameter_count(self) -> int:
        return self.factor[...].size

    def flops(self, length: int) -> float:
        return 0.0

    def cache_bytes(self, length: int, itemsize: int, parts: Any = None) -> int:
        return 0


def equations(jaxpr: Any, name: str) -> Iterator[Any]:
    """All equations of a primitive in a program, also those inside other equations."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    yield from equations(getattr(inner, "jaxpr", inner), name)


def scans(caches: bool = False, hooks: Hooks | None = None, **changes: Any) -> list[int]:
    """Rounds of every scan in the program of a small model, which is traced without being made."""
    definition, state = models.abstract(small(attention_implementation="reference", **changes), VOCABULARY)

    def run(state: nnx.State, ids: jax.Array) -> jax.Array:
        model = nnx.merge(definition, state)
        return model(ids, None, model.init_caches(2, 4) if caches else None, hooks).logits

    traced = jax.make_jaxpr(run)(state, jax.ShapeDtypeStruct((2, 4), jnp.int32))
    return [equation.params["length"] for equation in equations(traced.jaxpr, "scan")]


def products(jaxpr: Any) -> int:
    """Operations of all matrix products in a program, a multiply-add being two; nothing may repeat."""
    assert not list(equations(jaxpr, "scan")) and not list(equations(jaxpr, "while"))
    total = 0
    for equation in equations(jaxpr, "dot_general"):
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        total += 2 * equation.outvars[0].aval.size * int(np.prod([left[axis] for axis in contracted]))
    return total


def pairs(length: int, window: int, sinks: int) -> int:
    """(query, key) pairs that a causal row of `length` attends to."""
    return sum(s < sinks or t - s < (window or length) for t in range(length) for s in range(t + 1))


def parameters_by_hand(config: Mapping[str, Any]) -> int:
    """Of a decoder of softmax attention, SwiGLU and RMS norms, untied."""
    heads, kv_heads, each = (config["attention"][name] for name in ("heads", "kv_heads", "head_dim"))
    width = config["width"]
    block = width * each * (2 * heads + 2 * kv_heads) + 3 * width * config["mlp"]["width"] + 2 * width
    return 2 * ROWS * width + config["depth"] * block + width


def flops_by_hand(config: Mapping[str, Any], length: int, dense: bool = False) -> float:
    """Forward per token: every matrix once (the table only as the head), and two products per pair and head."""
    chosen, width = config["attention"], config["width"]
    heads, kv_heads, each = (chosen[name] for name in ("heads", "kv_heads", "head_dim"))
    matrices = width * each * (2 * heads + 2 * kv_heads) + 3 * width * config["mlp"]["width"]
    live = length**2 if dense else pairs(length, chosen["window"], chosen["sink_tokens"])
    return 2 * ROWS * width + config["depth"] * (2 * matrices + 4 * each * heads * live / length)


def remembered(config: Mapping[str, Any], length: int) -> int:
    """Bytes of the content of real caches of one row, without the tokens' metadata."""
    definition, state = models.abstract(config, VOCABULARY)
    caches = jax.eval_shape(lambda state: nnx.merge(definition, state).init_caches(1, length), state)
    content = [getattr(cache, "entries", None) or cache.state for cache in caches.layers]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(content))


# A layer's place: stack, block of its pattern, round.
Place = tuple[int, int, int]


def by_blocks(model: DecoderLM, specs: Sequence[dict], places: Sequence[Place], ids: np.ndarray) -> jax.Array:
    """Logits of a Python loop over new blocks made from `specs`, with the arrays that stand at `places`."""
    x, tokens = model.embedding(ids), sequence(ids.shape[1])
    for layer, (spec, (stack, block, turn)) in enumerate(zip(specs, places, strict=True)):
        definition, fresh = nnx.split(
            nnx.eval_shape(lambda s=spec, n=layer: Block(model.setting, s, layer_index=n, rngs=nnx.Rngs(0)))
        )
        state = jax.tree.map(lambda leaf, i=turn: leaf[i], nnx.state(model.stacks[stack].blocks[block]))
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, fresh)
        x = _run(definition, state, x, tokens)
    hidden = model.norm(x)
    return model.embedding.logits(hidden) if model.head is None else model.head(hidden)


@functools.partial(jax.jit, static_argnums=0)
def _run(definition: nnx.GraphDef, state: nnx.State, x: jax.Array, tokens: Tokens) -> jax.Array:
    return nnx.merge(definition, state)(x, tokens, None, None, -1)[0]


def decoder(model: DecoderLM, config: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, vocabulary] of a decoder whose layers are all alike: softmax attention, SwiGLU, RMS norms."""
    chosen, (stack,) = config["attention"], model.stacks
    x = at(model, "embedding.table")[ids] * config["embedding_scale"]
    residual = config["residual"]

    def joined(part: str, x: np.ndarray, y: np.ndarray, out: np.ndarray, weight: Any) -> np.ndarray:
        if residual["form"] == "sandwich":
            out = _rms(out, weight(f"{part}_out_norm.gain"))
        stream = y if residual["form"] == "carried" else x
        return residual[f"keep_{part}"] * stream + residual[f"gain_{part}"] * out

    for layer in range(config["depth"]):

        def weight(path: str, layer: int = layer) -> np.ndarray:
            return at(stack.blocks[0], path)[layer]

        y = _rms(x, weight("attention_norm.gain"))
        q, k, v = (y @ weight(f"attention.{name}.weight") for name in ("query", "key", "value"))
        x = joined("attention", x, y, _attend(q, k, v, chosen) @ weight("attention.out.weight"), weight)
        y = _rms(x, weight("mlp_norm.gain"))
        gate = y @ weight("mlp.gate.weight")
        out = (gate / (1 + np.exp(-gate)) * (y @ weight("mlp.up.weight"))) @ weight("mlp.down.weight")
        x = joined("mlp", x, y, out, weight)
    head = at(model, "embedding.table").T if config["tie_embeddings"] else at(model, "head.weight")
    logits = (_rms(x, at(model, "norm.gain")) @ head)[..., :VOCABULARY]
    cap = config["logit_cap"]
    return cap * np.tanh(logits / cap) if cap else logits


def _rms(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * gain


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, chosen: Mapping[str, Any]) -> np.ndarray:
    batch, length = q.shape[:2]
    heads, kv_heads, width = (chosen[name] for name in ("heads", "kv_heads", "head_dim"))
    window, sinks = chosen["window"] or length, chosen["sink_tokens"]
    q, k, v = (x.reshape(batch, length, -1, width) for x in (q, k, v))
    angle = np.arange(length)[:, None] * 10000.0 ** (-2 * np.arange(width // 2) / width)
    q, k = _turned(q, angle), _turned(k, angle)
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(batch, length, heads):
        shared = h // (heads // kv_heads)
        seen = [s for s in range(t + 1) if t - s < window or s < sinks]
        scores = k[b, seen, shared] @ q[b, t, h] / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, seen, shared] / weights.sum()
    return out.reshape(batch, length, -1)


def _turned(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def filtered(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The distribution of one row that may be drawn from: each filter on what the one before left, ties together."""
    tempered = np.asarray(logits, np.float64) / temperature
    left = sorted(np.flatnonzero(np.isfinite(tempered)), key=lambda token: -tempered[token])

    def shares() -> np.ndarray:
        weights = np.exp(tempered[left] - tempered[left[0]])
        return weights / weights.sum()

    def cut(count: int) -> list[int]:
        return [token for token in left if tempered[token] >= tempered[left[count - 1]]]

    if 0 < top_k < len(left):
        left = cut(top_k)
    if top_p < 1:
        total, count = 0.0, 0
        for share in shares():
            total, count = total + share, count + 1
            if total >= top_p:
                break
        left = cut(count)
    left = [token for token, share in zip(left, shares(), strict=True) if share >= min_p * shares()[0]]
    result = np.zeros(len(tempered))
    result[left] = shares()
    return result


def greedy(model: DecoderLM, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Argmax after a full pass over each whole row, once per token, without caches.

    Rows are padded on the right, which a causal model does not see. Asserts that no choice is a close one.
    """
    definition, state = nnx.split(model)
    rows = [list(prompt) for prompt in prompts]
    ids = np.zeros((len(rows), model.setting.max_length), np.int32)
    for _ in range(new):
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
        logits = np.asarray(_logits(definition, state, ids))
        for row, tokens in enumerate(rows):
            last = logits[row, len(tokens) - 1, :VOCABULARY]
            second, first = np.sort(last)[-2:]
            assert first - second > 1e-4, "the oracle's choice hangs on rounding: take another seed"
            tokens.append(int(np.argmax(last)))
    return [tokens[len(prompt) :] for tokens, prompt in zip(rows, prompts, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _logits(definition: nnx.GraphDef, state: nnx.State, ids: jax.Array) -> jax.Array:
    return nnx.merge(definition, state)(ids).logits
