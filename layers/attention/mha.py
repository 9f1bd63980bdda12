"""Multi-head, grouped-query and multi-query attention, with windows, sink tokens and learned sinks."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from kernels.attention import cost, masks
from kernels.tokens import Tokens
from layers.attention.contract import NOWHERE, Attention, AttentionOutput, Setting, register, visible
from layers.attention.softmax import attend
from layers.cache import SlotCache, View
from layers.hooks import Hooks, LayerHooks
from layers.linear import Linear
from layers.norm import Norm
from layers.rope import Rope
from sharding import logical


class Gates(NamedTuple):
    """Weights of heads, which of them are above zero, and losses; None for no weights, and for all of them."""

    weight: Float[Array, "B T H"] | None = None
    active: Bool[Array, "B T H"] | None = None
    losses: Mapping[str, Array] = MappingProxyType({})


NO_GATES = Gates()


@register("mha")
class MultiHeadAttention(Attention):
    """Softmax attention of `heads` query heads on `kv_heads` key/value heads (Vaswani et al. 2017; Shazeer 2019;
    Ainslie et al. 2023), rotary positions on both, optional sliding window with sink tokens (StreamingLLM, Xiao et
    al. 2023) and learned sink logits. Options: `configs/attention/mha.py`.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        layer_index: int,
        rngs: nnx.Rngs,
        heads: int = 8,
        kv_heads: int = 8,
        head_dim: int = 32,
        value_dim: int = 0,
        window: int = 0,
        sink_tokens: int = 0,
        learned_sinks: bool = False,
        qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        soft_cap: float = 0.0,
        scale: float = 0.0,
        qkv_bias: bool = False,
        out_bias: bool = False,
        rope: Rope = Rope(),  # noqa: B008 (frozen)
    ) -> None:
        if heads % kv_heads:
            raise ValueError(f"kv_heads {kv_heads} must divide heads {heads}")
        self.setting = setting
        self.heads, self.kv_heads, self.head_dim, self.value_dim = heads, kv_heads, head_dim, value_dim or head_dim
        self.window, self.sink_tokens, self.soft_cap = window, sink_tokens, soft_cap
        self.scale = scale or head_dim**-0.5
        self.rope = rope
        width = setting.width
        into: dict[str, Any] = dict(bias=qkv_bias, rngs=rngs)
        self.query = Linear(setting, width, heads * head_dim, axes=("embed", "heads"), **into)
        self.key = Linear(setting, width, kv_heads * head_dim, axes=("embed", ("kv_heads", kv_heads)), **into)
        self.value = Linear(setting, width, kv_heads * self.value_dim, axes=("embed", ("kv_heads", kv_heads)), **into)
        self.out = Linear(
            setting,
            heads * self.value_dim,
            width,
            axes=("heads", "embed"),
            bias=out_bias,
            std=setting.residual_std,
            rngs=rngs,
        )
        self.query_norm = Norm(setting, head_dim, epsilon=norm_epsilon) if qk_norm else None
        self.key_norm = Norm(setting, head_dim, epsilon=norm_epsilon) if qk_norm else None
        self.sinks = nnx.Param(jnp.zeros((heads,), setting.param_dtype), axes=("heads",)) if learned_sinks else None

    @property
    def mask(self) -> masks.Mask:
        """Causal; within the window or among the sink tokens where there is a window."""
        mask = masks.causal()
        if self.window:
            near = masks.sliding_window(self.window)
            mask = mask & (near | masks.sink_tokens(self.sink_tokens) if self.sink_tokens else near)
        return mask

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        cache: SlotCache | None = None,
        hooks: Hooks | None = None,
        layer: int = 0,
    ) -> AttentionOutput:
        site = LayerHooks(hooks, layer, tokens)
        x = site("layer_input", x)
        q, k, v = (
            project(x).reshape(*x.shape[:2], heads, -1)
            for project, heads in ((self.query, self.heads), (self.key, self.kv_heads), (self.value, self.kv_heads))
        )
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        position = tokens.positions()
        q = site("query_raw", q)
        gates = self.gates(x, q, tokens)
        q = site("query", self.rope.rotate(q, position))
        k = self.rope.rotate(k, position)
        view = View({"k": k, "v": v}, tokens)
        if cache is not None:
            entries = {name: jnp.repeat(x, self._copies, axis=2) for name, x in view.entries.items()}
            view, cache = cache.append(entries, tokens)
        heads = attend(
            q,
            view.entries["k"].astype(q.dtype),
            view.entries["v"].astype(q.dtype),
            mask=visible(self.mask, view.tokens),
            tokens=tokens,
            keys=view.tokens,
            lengths=view.lengths,
            table=view.table,
            scale=self.scale,
            soft_cap=self.soft_cap,
            sinks=None if self.sinks is None else self.sinks[...].astype(jnp.float32),
            hooks=site,
            implementation=self.setting.implementation,
            active=None if cache is not None or site.edits("gates") else gates.active,
        )
        if gates.weight is not None:
            heads = heads * site("gates", gates.weight)[..., None].astype(heads.dtype)
        out = self.out(site("heads", heads).reshape(*x.shape[:2], -1))
        return AttentionOutput(out, cache, site.taken | dict(gates.losses))

    def gates(self, x: Float[Array, "B T D"], q: Float[Array, "B T H D"], tokens: Tokens) -> Gates:
        """What each head's output is multiplied by, from the layer's input and the queries before positions."""
        return NO_GATES

    def init_cache(self, batch: int, length: int, dtype: str) -> SlotCache:
        heads = self.kv_heads * self._copies
        shapes = {"k": (heads, self.head_dim), "v": (heads, self.value_dim)}
        axes = {"k": ("heads", None), "v": ("heads", None)}
        pinned = self.sink_tokens if self.window else 0
        return SlotCache.create(batch, length, shapes, dtype, axes=axes, pinned=pinned, window=self.window)

    @property
    def _copies(self) -> int:
        """How often each key/value head is cached, so that every device of a mesh finds that of its query heads."""
        return logical.kv_repeat(self.heads, self.kv_heads)

    def parameter_count(self) -> int:
        width, both = self.setting.width, self.head_dim + self.value_dim
        count = width * (self.heads + self.kv_heads) * both
        if self.query.bias is not None:
            count += self.heads * self.head_dim + self.kv_heads * both
        if self.out.bias is not None:
            count += width
        if self.query_norm is not None:
            count += 2 * self.head_dim
        return count + (0 if self.sinks is None else self.heads)

    def flops(self, length: int) -> float:
        both = self.head_dim + self.value_dim
        projections = 2 * length * self.setting.width * (self.heads + self.kv_heads) * both
        return projections + 2 * cost.pairs(self.mask, length) * self.heads * both

    def cache_bytes(self, length: int, itemsize: int, parts: Mapping[str, int] = NOWHERE) -> int:
        slots = min(length, self.window + self.sink_tokens) if self.window else length
        devices = parts.get("heads", 1)
        heads = self.kv_heads * logical.repeats(self.heads, self.kv_heads, devices) // devices
        return slots * heads * (self.head_dim + self.value_dim) * itemsize
