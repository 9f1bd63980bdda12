"""A decoder language model: embedding, blocks, norm, logits. Blocks of one kind are stacked and scanned."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.platform import default_platform
from kernels.tokens import Tokens, sequence
from layers import attention
from layers.cache import Caches, LayerCache
from layers.embedding import Embedding
from layers.hooks import Hooks
from layers.linear import Linear
from layers.moe import Experts, channel_mixer
from layers.norm import Norm
from layers.rope import Rope
from layers.setting import Setting
from models.plan import Spec, segments
from sharding import logical

_ACTIVATIONS = ("batch", "length", "embed")
_UNROLLED_ON_CPU = 16
_REMAT = {
    "none": logical.save_all_but_gathered,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("linear"),
}


class ModelOutput(NamedTuple):
    """Logits [B, T, V] in float32, the caches after these tokens (None without), and auxiliary outputs.

    `aux["loss/<name>"]` are scalars to add to the objective, summed over layers; everything else a layer returned is
    under "<key>/<layer number>".
    """

    logits: Float[Array, "B T V"]
    caches: Caches | None
    aux: dict[str, Array]


class Block(nnx.Module):
    """Attention, then the channel mixer, each in a residual: x = keep x + gain f(norm(x)).

    `residual` of the spec: `form` "pre", that; "sandwich": f is normed once more before it is added (Gemma 2, arXiv
    2408.00118); "carried": keep multiplies norm(x) (MiniMax-01, arXiv 2501.08313). keep and gain are 1 in most
    networks.
    """

    def __init__(self, setting: Setting, spec: Spec, *, layer_index: int, rngs: nnx.Rngs) -> None:
        options = dict(spec["attention"])
        variant = attention.get(options.pop("layer"))
        if "rope" in options:
            options["rope"] = Rope(**options["rope"])
        self.attention_norm = Norm(setting, setting.width, **spec["norm"])
        self.attention = variant(setting, layer_index=layer_index, rngs=rngs, **options)
        self.mlp_norm = Norm(setting, setting.width, **spec["norm"])
        residual = dict(spec["residual"])
        self.carried, sandwich = residual["form"] == "carried", residual["form"] == "sandwich"
        self.attention_out_norm = Norm(setting, setting.width, **spec["norm"]) if sandwich else None
        self.mlp_out_norm = Norm(setting, setting.width, **spec["norm"]) if sandwich else None
        parts = ("attention", "mlp")
        self.keep, self.gain = (
            tuple(residual.get(f"{kind}_{part}", 1.0) for part in parts) for kind in ("keep", "gain")
        )
        self.mlp = channel_mixer(setting, rngs=rngs, **spec["mlp"])

    def __call__(
        self, x: Float[Array, "B T D"], tokens: Tokens, cache: LayerCache | None, hooks: Hooks | None, layer: int
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, dict[str, Array]]:
        normed = self.attention_norm(x)
        mixed = self.attention(normed, tokens, cache, hooks, layer)
        x = self._joined(0, x, normed, mixed.out, self.attention_out_norm)
        normed = self.mlp_norm(x)
        out, losses = self.mlp(normed, tokens) if isinstance(self.mlp, Experts) else (self.mlp(normed), {})
        x = self._joined(1, x, normed, out, self.mlp_out_norm)
        return x, mixed.cache, {**mixed.aux, **losses}

    def _joined(self, part: int, x: Array, normed: Array, out: Array, norm: Norm | None) -> Float[Array, "B T D"]:
        keep, gain = self.keep[part], self.gain[part]
        stream, out = normed if self.carried else x, out if norm is None else norm(out)
        stream, out = stream if keep == 1 else keep * stream, out if gain == 1 else gain * out
        return logical.constrain(stream + out, _ACTIVATIONS)


class Stack(nnx.Module):
    """`repeats` rounds of a pattern of blocks; the parameters of equal blocks are stacked on a leading axis."""

    def __init__(self, blocks: Sequence[Block], repeats: int, first: int) -> None:
        """`blocks` are one round, their arrays stacked; `first` is the number of the first layer."""
        self.repeats, self.first, self.period = repeats, first, len(blocks)
        self.blocks = nnx.List(list(blocks))

    @classmethod
    def create(cls, setting: Setting, pattern: Sequence[Spec], repeats: int, first: int, key: jax.Array) -> "Stack":
        """New blocks after `pattern`."""
        layers = [first + place + len(pattern) * jnp.arange(repeats) for place in range(len(pattern))]
        return cls([_stacked(setting, spec, key, at) for spec, at in zip(pattern, layers, strict=True)], repeats, first)

    def scan(self, x: Array, tokens: Tokens, remat: str) -> tuple[Array, dict[str, Array]]:
        """All rounds in one `lax.scan`; what the layers return is stacked over rounds."""
        definitions, states = zip(*(nnx.split(block) for block in self.blocks), strict=True)

        def round_(x: Array, states: tuple) -> tuple[Array, list[dict[str, Array]]]:
            returned = []
            for definition, state in zip(definitions, states, strict=True):
                x, _, aux = nnx.merge(definition, state)(x, tokens, None, None, -1)
                returned.append(aux)
            return x, returned

        x, stacked = jax.lax.scan(_rematerialised(round_, remat), x, states)
        numbered = {}
        for place, aux in enumerate(stacked):
            for key, values in aux.items():
                for i in range(self.repeats):
                    numbered[f"{key}/{self.first + i * self.period + place}"] = values[i]
        return x, numbered

    def unrolled(self) -> list[Block]:
        """The blocks one by one, in order."""
        return self._cut(lambda leaf, i: leaf[i])

    def apart(self) -> list["Stack"]:
        """The blocks as stacks of one, in order."""
        return [Stack([block], 1, self.first + i) for i, block in enumerate(self._cut(lambda leaf, i: leaf[i : i + 1]))]

    def _cut(self, cut: Callable[[Array, int], Array]) -> list[Block]:
        split = [nnx.split(block) for block in self.blocks]
        return [
            nnx.merge(definition, jax.tree.map(lambda leaf, i=i: cut(leaf, i), state))
            for i in range(self.repeats)
            for definition, state in split
        ]


class DecoderLM(nnx.Module):
    """A decoder language model over `specs`, one per layer (see `models.plan.layer_specs`)."""

    def __init__(
        self,
        setting: Setting,
        specs: Sequence[Spec],
        *,
        vocab_size: int,
        rows: int,
        norm: dict[str, Any],
        tie_embeddings: bool = True,
        embedding_scale: float = 1.0,
        logit_cap: float = 0.0,
        scan_layers: str = "auto",
        remat: str = "none",
        rngs: nnx.Rngs,
    ) -> None:
        """`rows` >= vocab_size are the rows of the tables; those without a token never get probability.

        `scan_layers`: "always" or "never" run equal blocks in one `lax.scan`, which compiles one of them for all;
        "auto" does so but for stacks of up to 16 on a single CPU device, where a scan costs a fifth to a half of a
        training step (it copies what the backward pass needs) and compiling a block less than a second.
        """
        if scan_layers not in ("auto", "always", "never"):
            raise ValueError(f"scan_layers must be auto, always or never, not {scan_layers!r}")
        self.setting, self.vocab_size, self.logit_cap = setting, vocab_size, logit_cap
        self.scan_layers, self.remat = scan_layers, remat
        self.embedding = Embedding(setting, rows, scale=embedding_scale, rngs=rngs)
        key, self.stacks, first = rngs.params(), nnx.List([]), 0
        for pattern, repeats in segments(specs):
            self.stacks.append(Stack.create(setting, pattern, repeats, first, key))
            first += len(pattern) * repeats
        self.norm = Norm(setting, setting.width, **norm)
        self.head = None if tie_embeddings else Linear(setting, setting.width, rows, axes=("embed", "vocab"), rngs=rngs)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(stack.repeats * stack.period for stack in self.stacks)

    def __call__(
        self,
        ids: Int[Array, "B T"],
        tokens: Tokens | None = None,
        caches: Caches | None = None,
        hooks: Hooks | None = None,
    ) -> ModelOutput:
        """Logits for the next token at every position.

        Without `tokens` the ids are one document per row, following what the caches hold. With `hooks`, and with
        caches, layers run one by one instead of in a scan.
        """
        if tokens is None:
            tokens = sequence(ids.shape[1], 0 if caches is None else caches.length)
        hidden, caches, aux = self.backbone(self.embedding(ids), tokens, caches, hooks)
        return ModelOutput(self.unembed(hidden), caches, aux)

    def backbone(
        self, x: Float[Array, "B T D"], tokens: Tokens, caches: Caches | None = None, hooks: Hooks | None = None
    ) -> tuple[Float[Array, "B T D"], Caches | None, dict[str, Array]]:
        """Embeddings in, normalised hidden states out; the way in for inputs that are not token ids."""
        x = logical.constrain(x, _ACTIVATIONS)
        aux: dict[str, Array] = {}
        advanced: list[LayerCache] = []
        for stack in self.stacks:
            if caches is None and hooks is None and self._scans(stack):
                x, returned = stack.scan(x, tokens, self.remat)
                aux.update(returned)
                continue
            for offset, block in enumerate(stack.unrolled()):
                layer = stack.first + offset
                run = _rematerialised(_Call(block, hooks, layer), "none" if caches is not None else self.remat)
                x, cache, returned = run(x, tokens, None if caches is None else caches.layers[layer])
                advanced.append(cache)
                aux.update({f"{key}/{layer}": value for key, value in returned.items()})
        if caches is not None:
            new = tokens.length if tokens.valid is None else jnp.sum(tokens.valid, axis=1, dtype=jnp.int32)
            caches = Caches(tuple(advanced), caches.length + new)
        return self.norm(x), caches, _sum_losses(aux)

    def _scans(self, stack: Stack) -> bool:
        if self.scan_layers == "auto":
            alone_on_cpu = logical.active() is None and default_platform() == "cpu"
            return stack.repeats > (_UNROLLED_ON_CPU if alone_on_cpu else 1)
        return self.scan_layers == "always" and stack.repeats > 1

    def unembed(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of hidden states, float32; rows of the table without a token get the lowest float."""
        logits = self.embedding.logits(hidden) if self.head is None else self.head(hidden)
        logits = logical.constrain(logits, ("batch", "length", "vocab")).astype(jnp.float32)
        if self.logit_cap:
            logits = self.logit_cap * jnp.tanh(logits / self.logit_cap)
        rows = logits.shape[-1]
        if rows == self.vocab_size:
            return logits
        return jnp.where(jnp.arange(rows) < self.vocab_size, logits, jnp.finfo(jnp.float32).min)

    def init_caches(self, batch: int, length: int, dtype: str | None = None) -> Caches:
        """Empty caches for `batch` rows of up to `length` tokens; entries are in the compute dtype by default."""
        dtype = dtype or self.setting.compute_dtype
        layers = tuple(block.attention.init_cache(batch, length, dtype) for block in self.layers())
        return Caches(layers, jnp.zeros((batch,), jnp.int32))

    def unstacked(self) -> "DecoderLM":
        """A copy whose blocks are stored one by one: a loop over decoding steps then cuts no stacked weights."""
        model = nnx.merge(*nnx.split(self))
        model.stacks = nnx.List([single for stack in model.stacks for single in stack.apart()])
        return model

    def layers(self) -> list[Block]:
        """Every block by itself, in order."""
        return [block for stack in self.stacks for block in stack.unrolled()]


class _Call:
    """A block with its static arguments bound, so that `jax.checkpoint` sees arrays only."""

    def __init__(self, block: Block, hooks: Hooks | None, layer: int) -> None:
        self.definition, self.state = nnx.split(block)
        self.hooks, self.layer = hooks, layer

    def __call__(self, x: Array, tokens: Tokens, cache: LayerCache | None) -> tuple:
        return nnx.merge(self.definition, self.state)(x, tokens, cache, self.hooks, self.layer)


def _stacked(setting: Setting, spec: Spec, key: jax.Array, layers: Int[Array, "R"]) -> Block:
    """Equal blocks with their arrays stacked; a layer's draw depends on its number, not on the grouping."""
    definition = None

    def make(layer: Any) -> nnx.State:
        nonlocal definition
        rngs = nnx.Rngs(params=jax.random.fold_in(key, layer))
        definition, state = nnx.split(Block(setting, spec, layer_index=layer, rngs=rngs))
        return state

    state = jax.vmap(make)(layers)

    def with_layers_axis(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata().get("axes", (None,) * (variable[...].ndim - 1))
        return variable.replace(axes=("layers", *axes))

    state = jax.tree.map(with_layers_axis, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.merge(definition, state)


def _rematerialised(function: Callable, remat: str) -> Callable:
    if remat == "none" and logical.active() is None:
        return function
    return jax.checkpoint(function, policy=_REMAT[remat])


def _sum_losses(aux: dict[str, Array]) -> dict[str, Array]:
    """Per-layer "loss/<name>/<layer>" entries, summed into "loss/<name>"; the others as they are."""
    result: dict[str, Array] = {}
    for key, value in aux.items():
        name = key.rsplit("/", 1)[0] if key.startswith("loss/") else key
        result[name] = result[name] + value if name in result else value
    return result
