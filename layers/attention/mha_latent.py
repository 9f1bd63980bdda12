"""Attention whose keys and values of every head are made anew from one latent of each per token, positions last."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels.attention import cost, masks
from kernels.tokens import Tokens
from layers.attention.contract import NOWHERE, Attention, AttentionOutput, Setting, register, visible
from layers.attention.softmax import attend
from layers.cache import SlotCache, View
from layers.hooks import Hooks, LayerHooks
from layers.linear import Linear
from layers.norm import Norm
from layers.paged import gathered
from layers.rope import Rope
from sharding import logical


@register("mha_latent")
class LatentMultiHeadAttention(Attention):
    """GQA with up-projections: k = rope(c_K W_UK), v = c_V W_UV (TransMLA, arXiv 2502.07864, first version).

    [c_K, c_V] = x W_DKV are all that is cached, `key_rank` + `value_rank` numbers per token. Where these are the widths
    of GQA's keys and values, GQA is the special case whose W_UK and W_UV copy. Positions come after W_UK, so that
    nothing can be absorbed: each step of decoding makes the keys of all tokens again, and with a cache a token's
    position is its index. Options: `configs/attention/mha_latent.py`.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        layer_index: int,
        rngs: nnx.Rngs,
        heads: int = 8,
        key_rank: int = 64,
        value_rank: int = 64,
        head_dim: int = 32,
        value_dim: int = 0,
        window: int = 0,
        qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        soft_cap: float = 0.0,
        scale: float = 0.0,
        qkv_bias: bool = False,
        out_bias: bool = False,
        rope: Rope = Rope(),  # noqa: B008 (frozen)
    ) -> None:
        self.setting, self.rope = setting, rope
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim or head_dim
        self.key_rank, self.value_rank, self.window = key_rank, value_rank, window
        self.scale, self.soft_cap = scale or head_dim**-0.5, soft_cap
        width, made = setting.width, key_rank + value_rank
        into: dict[str, Any] = dict(bias=qkv_bias, rngs=rngs)
        self.query = Linear(setting, width, heads * head_dim, axes=("embed", "heads"), **into)
        self.latent = Linear(setting, width, made, axes=("embed", None), **into)
        self.key_up = Linear(setting, key_rank, heads * head_dim, axes=("latent", "heads"), rngs=rngs)
        self.value_up = Linear(setting, value_rank, heads * self.value_dim, axes=("latent", "heads"), rngs=rngs)
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

    @property
    def mask(self) -> masks.Mask:
        """Causal; within the window where there is one."""
        return masks.causal() & masks.sliding_window(self.window) if self.window else masks.causal()

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
        q = self.query(x).reshape(*x.shape[:2], self.heads, -1)
        q = site("query_raw", q if self.query_norm is None else self.query_norm(q))
        q = site("query", self.rope.rotate(q, tokens.positions()))
        latent = site("latent", self.latent(x)[:, :, None])
        view = View({"latent": latent}, tokens)
        if cache is not None:
            if tokens.position is not None:
                raise NotImplementedError("mha_latent turns cached keys by their index: it takes no other positions")
            view, cache = cache.append({"latent": jnp.repeat(latent, self._copies, axis=2)}, tokens)
        rows = view.entries["latent"]
        rows = (rows if view.table is None else gathered(rows, view.table))[:, :, 0].astype(q.dtype)
        k, v = self._expanded(rows, view.tokens)
        heads = attend(
            q,
            k,
            v,
            mask=visible(self.mask, view.tokens),
            tokens=tokens,
            keys=view.tokens,
            lengths=view.lengths,
            scale=self.scale,
            soft_cap=self.soft_cap,
            hooks=site,
            implementation=self.setting.implementation,
        )
        out = self.out(site("heads", heads).reshape(*x.shape[:2], -1))
        return AttentionOutput(out, cache, site.taken)

    def _expanded(
        self, latent: Float[Array, "B S c"], tokens: Tokens
    ) -> tuple[Float[Array, "B S H D"], Float[Array, "B S H Dv"]]:
        """Keys, turned, and values of every head."""
        keys, values = jnp.split(latent, [self.key_rank], axis=-1)
        k, v = (
            up(part).reshape(*part.shape[:2], self.heads, -1)
            for up, part in ((self.key_up, keys), (self.value_up, values))
        )
        k = k if self.key_norm is None else self.key_norm(k)
        return self.rope.rotate(k, tokens.positions()), v

    @property
    def _copies(self) -> int:
        """How often the latents are cached, so that every device of a mesh has them."""
        return logical.kv_repeat(self.heads, 1)

    def init_cache(self, batch: int, length: int, dtype: str) -> SlotCache:
        shape = (self._copies, self.key_rank + self.value_rank)
        return SlotCache.create(
            batch, length, {"latent": shape}, dtype, axes={"latent": ("heads", None)}, window=self.window
        )

    def parameter_count(self) -> int:
        made = self.key_rank + self.value_rank
        count = self._matrices()
        if self.query.bias is not None:
            count += self.heads * self.head_dim + made
        if self.out.bias is not None:
            count += self.setting.width
        return count + (0 if self.query_norm is None else 2 * self.head_dim)

    def _matrices(self) -> int:
        """Numbers in matrices, each of which multiplies each token once."""
        width, by_head = self.setting.width, self.heads * (self.head_dim + self.value_dim)
        ups = self.heads * (self.key_rank * self.head_dim + self.value_rank * self.value_dim)
        return width * (by_head + self.key_rank + self.value_rank) + ups

    def flops(self, length: int) -> float:
        both = self.head_dim + self.value_dim
        return 2 * length * self._matrices() + 2 * cost.pairs(self.mask, length) * self.heads * both

    def cache_bytes(self, length: int, itemsize: int, parts: Mapping[str, int] = NOWHERE) -> int:
        slots = min(length, self.window) if self.window else length
        devices = parts.get("heads", 1)
        return slots * logical.repeats(self.heads, 1, devices) // devices * (self.key_rank + self.value_rank) * itemsize
