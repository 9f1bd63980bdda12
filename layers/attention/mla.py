"""Multi-head latent attention: keys and values of all heads come from one cached latent per token."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels.attention import cost, masks
from kernels.tokens import Tokens
from layers.attention.contract import Attention, AttentionOutput, Setting, register, visible
from layers.attention.softmax import attend
from layers.cache import SlotCache
from layers.hooks import Hooks, LayerHooks
from layers.linear import Linear
from layers.norm import Norm
from layers.rope import Rope


@register("mla")
class MultiHeadLatentAttention(Attention):
    """MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3). Options: `configs/attention/mla.py`.

    With d_n, d_r, d_v the unrotated, rotated and value widths of a head and d_c the latent's: the latent
    c = RMSNorm(x W_DKV) and one rotated key k_r per token are all that is cached, as one row [c, k_r]. Training and
    prefill expand c to keys and values per head; decoding absorbs W_UK in the query and W_UV in the output, and attends
    to the rows themselves as multi-query attention of key width d_c + d_r. Both are the same function.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        layer_index: int,
        rngs: nnx.Rngs,
        heads: int = 8,
        q_lora_rank: int = 0,
        kv_lora_rank: int = 64,
        qk_nope_head_dim: int = 32,
        qk_rope_head_dim: int = 16,
        v_head_dim: int = 32,
        norm_epsilon: float = 1e-6,
        scale: float = 0.0,
        rope: Rope = Rope(),  # noqa: B008 (frozen)
    ) -> None:
        self.setting, self.rope = setting, rope
        self.heads, self.q_rank, self.rank = heads, q_lora_rank, kv_lora_rank
        self.nope, self.rotary, self.value = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.scale = (scale or (self.nope + self.rotary) ** -0.5) * rope.logit_factor
        width, query_width = setting.width, heads * (self.nope + self.rotary)
        if q_lora_rank:
            self.query_down = Linear(setting, width, q_lora_rank, axes=("embed", None), rngs=rngs)
            self.query_norm = Norm(setting, q_lora_rank, epsilon=norm_epsilon)
        self.query = Linear(
            setting, q_lora_rank or width, query_width, axes=(None if q_lora_rank else "embed", "heads"), rngs=rngs
        )
        self.latent = Linear(setting, width, kv_lora_rank, axes=("embed", None), rngs=rngs)
        self.rope_key = Linear(setting, width, self.rotary, axes=("embed", None), rngs=rngs)
        self.latent_norm = Norm(setting, kv_lora_rank, epsilon=norm_epsilon)
        self.key_up = Linear(setting, kv_lora_rank, heads * self.nope, axes=("latent", "heads"), rngs=rngs)
        self.value_up = Linear(setting, kv_lora_rank, heads * self.value, axes=("latent", "heads"), rngs=rngs)
        self.out = Linear(
            setting, heads * self.value, width, axes=("heads", "embed"), std=setting.residual_std, rngs=rngs
        )

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
        position = tokens.positions()
        q = self.query(self.query_norm(self.query_down(x)) if self.q_rank else x)
        q = site("query_raw", q.reshape(*x.shape[:2], self.heads, -1))
        q_nope, q_rope = jnp.split(q, [self.nope], axis=-1)
        q = site("query", jnp.concatenate([q_nope, self.rope.rotate(q_rope, position)], axis=-1))
        # With an axis of one head from the start: to give the cache one later, XLA copies it.
        latent, rope_key = self.latent_norm(self.latent(x))[:, :, None], self.rope_key(x)[:, :, None]
        cached = jnp.concatenate([latent, self.rope.rotate(rope_key, position)], axis=-1)
        keys, lengths, absorbed = tokens, None, False
        if cache is not None:
            absorbed = not cache.fresh
            (entries, keys, lengths), cache = cache.append({"latent": cached}, tokens)
            cached = entries["latent"].astype(q.dtype)
        read = self._from_latent if absorbed else self._from_heads
        shared = dict(mask=visible(self.mask, keys), tokens=tokens, keys=keys, lengths=lengths, hooks=site)
        heads = read(q, cached, scale=self.scale, implementation=self.setting.implementation, **shared)
        out = self.out(site("heads", heads).reshape(*x.shape[:2], -1))
        return AttentionOutput(out, cache, site.taken)

    def _from_heads(
        self, q: Float[Array, "B T H D"], cached: Float[Array, "B S 1 C"], **shared: Any
    ) -> Float[Array, "B T H Dv"]:
        latent, rope_key = cached[:, :, 0, : self.rank], cached[..., self.rank :]
        shape = (*latent.shape[:2], self.heads, -1)
        rope_key = jnp.broadcast_to(rope_key, (*latent.shape[:2], self.heads, self.rotary))
        k = jnp.concatenate([self.key_up(latent).reshape(shape), rope_key], axis=-1)
        return attend(q, k, self.value_up(latent).reshape(shape), **shared)

    def _from_latent(
        self, q: Float[Array, "B T H D"], cached: Float[Array, "B S 1 C"], **shared: Any
    ) -> Float[Array, "B T H Dv"]:
        key_up = self.key_up.matrix(q.dtype).reshape(self.rank, self.heads, self.nope)
        value_up = self.value_up.matrix(q.dtype).reshape(self.rank, self.heads, self.value)
        q_nope, q_rope = jnp.split(q, [self.nope], axis=-1)
        q = jnp.concatenate([jnp.einsum("bthn,chn->bthc", q_nope, key_up), q_rope], axis=-1)
        read = attend(q, cached, None, value_width=self.rank, **shared)
        return jnp.einsum("bthc,chv->bthv", read, value_up)

    @property
    def mask(self) -> masks.Mask:
        """Causal."""
        return masks.causal()

    def init_cache(self, batch: int, length: int, dtype: str) -> SlotCache:
        return SlotCache.create(batch, length, {"latent": (1, self.rank + self.rotary)}, dtype)

    def parameter_count(self) -> int:
        width, query_width = self.setting.width, self.heads * (self.nope + self.rotary)
        query = width * self.q_rank + self.q_rank + self.q_rank * query_width if self.q_rank else width * query_width
        down = width * (self.rank + self.rotary) + self.rank
        return query + down + self.heads * (self.rank * (self.nope + self.value) + self.value * width)

    def flops(self, length: int) -> float:
        norms = self.rank + self.q_rank
        projections = 2 * length * (self.parameter_count() - norms)
        scores = self.nope + self.rotary + self.value
        return projections + 2 * cost.pairs(self.mask, length) * self.heads * scores

    def cache_bytes(self, length: int, itemsize: int, tensor_parallel: int = 1) -> int:
        return length * (self.rank + self.rotary) * itemsize  # One latent for all heads: every device holds it whole.
