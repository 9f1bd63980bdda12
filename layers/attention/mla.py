"""Multi-head latent attention: keys and values of all heads come from one cached latent per token, or a few."""

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
from layers.linear import Linear, contracted
from layers.norm import Norm, rms_normalise
from layers.rope import Rope
from sharding import logical


@register("mla")
class MultiHeadLatentAttention(Attention):
    """MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3). Options: `configs/attention/mla.py`.

    With d_n, d_r, d_v the unrotated, rotated and value widths of a head and d_c the latent's: the latent
    c = RMSNorm(x W_DKV) and one rotated key k_r per token are all that is cached, as one row [c, k_r]. Training and
    prefill expand c to keys and values per head; decoding absorbs W_UK in the query and W_UV in the output, and attends
    to the rows themselves as multi-query attention of key width d_c + d_r. Both are the same function.

    With `latents` > 1 this is GLA (Zadouri, Strauss and Dao, arXiv 2505.21487): so many latents of width d_c, each
    with a norm of its own and serving its own group of heads; the rotated key is shared by all. Tensor parallelism then
    gives each device its latents, where it gives each all of the single latent of MLA.
    """

    #: Logical axes: of a head, and of the latent's channels in W_UK and W_UV.
    head_axis = "heads"
    channel_axis: Any = "latent"

    def __init__(
        self,
        setting: Setting,
        *,
        layer_index: int,
        rngs: nnx.Rngs,
        heads: int = 8,
        latents: int = 1,
        q_lora_rank: int = 0,
        kv_lora_rank: int = 64,
        qk_nope_head_dim: int = 32,
        qk_rope_head_dim: int = 16,
        v_head_dim: int = 32,
        latent_norm: str = "rms",
        norm_epsilon: float = 1e-6,
        window: int = 0,
        soft_cap: float = 0.0,
        scale: float = 0.0,
        query_down_bias: bool = False,
        query_bias: bool = False,
        latent_bias: bool = False,
        out_bias: bool = False,
        rope: Rope = Rope(),  # noqa: B008 (frozen)
    ) -> None:
        if heads % latents:
            raise ValueError(f"{latents} latents do not divide {heads} heads")
        if latent_norm not in ("rms", "none"):
            raise ValueError(f"latent_norm must be rms or none, not {latent_norm!r}")
        self.setting, self.rope = setting, rope
        self.heads, self.latents, self.q_rank, self.rank = heads, latents, q_lora_rank, kv_lora_rank
        self.window, self.soft_cap = window, soft_cap
        self.nope, self.rotary, self.value = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.scale = (scale or (self.nope + self.rotary) ** -0.5) * rope.logit_factor
        width, query_width, by_head = setting.width, heads * (self.nope + self.rotary), (self.head_axis, heads)
        rms, made = latent_norm == "rms", latents * kv_lora_rank
        if q_lora_rank:
            self.query_down = Linear(setting, width, q_lora_rank, axes=("embed", None), bias=query_down_bias, rngs=rngs)
            self.query_norm = Norm(setting, q_lora_rank, epsilon=norm_epsilon) if rms else None
        self.query = Linear(
            setting,
            q_lora_rank or width,
            query_width,
            axes=(None if q_lora_rank else "embed", by_head),
            bias=query_bias,
            rngs=rngs,
        )
        into: dict[str, Any] = dict(bias=latent_bias, rngs=rngs)
        self.latent = Linear(setting, width, made, axes=("embed", self.latent_axis), **into)
        self.rope_key = Linear(setting, width, self.rotary, axes=("embed", None), **into)
        self.latent_norm = Norm(setting, made, epsilon=norm_epsilon, axis=self.latent_axis) if rms else None
        channels = self.channel_axis
        self.key_up = Linear(setting, kv_lora_rank, heads * self.nope, axes=(channels, by_head), rngs=rngs)
        self.value_up = Linear(setting, kv_lora_rank, heads * self.value, axes=(channels, by_head), rngs=rngs)
        self.out = Linear(
            setting,
            heads * self.value,
            width,
            axes=(self.out_axis, "embed"),
            bias=out_bias,
            std=setting.residual_std,
            rngs=rngs,
        )

    @property
    def latent_axis(self) -> Any:
        """The logical axis of the columns of W_DKV."""
        return ("kv_heads", self.latents)

    @property
    def out_axis(self) -> Any:
        """The logical axis of the rows of W_O."""
        return (self.head_axis, self.heads)

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
        started = cache is not None and not cache.fresh
        q, rows = self._query(x, tokens, site), self._rows(x, tokens, site, started)
        view = View({"latent": rows}, tokens)
        if cache is not None:
            view, cache = cache.append({"latent": jnp.repeat(rows, self._copies, axis=2)}, tokens)
        out = self._mix(q, view.entries["latent"].astype(q.dtype) if started else rows, view, started, tokens, site)
        return AttentionOutput(out, cache, site.taken)

    def _query(self, x: Float[Array, "B T D"], tokens: Tokens, site: LayerHooks) -> Float[Array, "B T H K"]:
        """[q_n, q_r] of every head, q_r rotated."""
        if self.q_rank:
            low = self.query_down(x)
            q = self.query(low if self.query_norm is None else self.query_norm(low))
        else:
            q = self.query(x)
        q = site("query_raw", q.reshape(*x.shape[:2], self.heads, -1))
        q_nope, q_rope = jnp.split(q, [self.nope], axis=-1)
        return site("query", jnp.concatenate([q_nope, self.rope.rotate(q_rope, tokens.positions())], axis=-1))

    def _rows(
        self, x: Float[Array, "B T D"], tokens: Tokens, site: LayerHooks, started: bool
    ) -> Float[Array, "B T G C"]:
        """What is cached of each token, a row [c, k_r] per latent; `started`: there are tokens before these."""
        del started
        # With an axis of latents from the start: to give the cache one later, XLA copies it.
        latent = self.latent(x).reshape(*x.shape[:2], self.latents, self.rank)
        if self.latent_norm is not None:
            latent = rms_normalise(latent, self.latent_norm.epsilon) * self._gain(latent)
        return self._joined(site("latent", latent), x, tokens)

    def _gain(self, latent: Float[Array, "B T G d"]) -> Float[Array, "G d"]:
        """The gain of the latent's norm, laid out for use."""
        gain = logical.gather(self.latent_norm.gain[...].astype(latent.dtype), (self.latent_axis,))
        return gain.reshape(latent.shape[2:])

    def _joined(
        self, latent: Float[Array, "B T G d"], x: Float[Array, "B T D"], tokens: Tokens
    ) -> Float[Array, "B T G C"]:
        """The latents, each with the rotated key behind it."""
        rope_key = self.rope.rotate(self.rope_key(x)[:, :, None], tokens.positions())
        return jnp.concatenate([latent, jnp.broadcast_to(rope_key, (*latent.shape[:3], self.rotary))], axis=-1)

    def _mix(
        self, q: Array, rows: Float[Array, "B S G C"], view: View, started: bool, tokens: Tokens, site: LayerHooks
    ) -> Float[Array, "B T D"]:
        """Attention of the queries to the rows, through the output projection."""
        keys = view.tokens
        read = self._from_latent if started else self._from_heads
        shared: dict[str, Any] = dict(mask=visible(self.mask, keys), tokens=tokens, keys=keys, lengths=view.lengths)
        shared |= dict(table=view.table, hooks=site, scale=self.scale, soft_cap=self.soft_cap)
        shared |= dict(implementation=self.setting.implementation, head_axis=self.head_axis)
        heads = read(q, rows, **shared)
        return self.out(site("heads", heads).reshape(*q.shape[:2], -1))

    def _from_heads(
        self, q: Float[Array, "B T H K"], rows: Float[Array, "B S G C"], **shared: Any
    ) -> Float[Array, "B T H Dv"]:
        latent, rope_key = jnp.split(rows, [self.rank], axis=-1)
        k, v = (self._up(linear, latent) for linear in (self.key_up, self.value_up))
        rope_key = jnp.broadcast_to(rope_key[:, :, :1], (*k.shape[:3], self.rotary))
        return attend(q, jnp.concatenate([k, rope_key], axis=-1), v, **shared)

    def _up(self, linear: Linear, latent: Float[Array, "B S G d"]) -> Float[Array, "B S H N"]:
        """Each head's keys or values from its own latent."""
        if self.latents == 1:
            return linear(latent[:, :, 0]).reshape(*latent.shape[:2], self.heads, -1)
        up = linear.matrix(latent.dtype).reshape(self.rank, self.latents, self.heads // self.latents, -1)
        return contracted("bsgc,cghn->bsghn", latent, up).reshape(*latent.shape[:2], self.heads, -1)

    def _from_latent(
        self, q: Float[Array, "B T H K"], rows: Float[Array, "B S G C"], **shared: Any
    ) -> Float[Array, "B T H Dv"]:
        key_up = self.key_up.matrix(q.dtype).reshape(self.rank, self.heads, self.nope)
        value_up = self.value_up.matrix(q.dtype).reshape(self.rank, self.heads, self.value)
        q_nope, q_rope = jnp.split(q, [self.nope], axis=-1)
        q = jnp.concatenate([contracted("bthn,chn->bthc", q_nope, key_up), q_rope], axis=-1)
        read = attend(q, rows, None, value_width=self.rank, **shared)
        return contracted("bthc,chv->bthv", read, value_up)

    @property
    def mask(self) -> masks.Mask:
        """Causal; within the window where there is one."""
        return masks.causal() & masks.sliding_window(self.window) if self.window else masks.causal()

    @property
    def _copies(self) -> int:
        """How often each latent is cached, so that every device of a mesh finds that of its heads."""
        return logical.kv_repeat(self.heads, self.latents)

    def init_cache(self, batch: int, length: int, dtype: str) -> SlotCache:
        shape = (self.latents * self._copies, self.rank + self.rotary)
        return SlotCache.create(
            batch, length, {"latent": shape}, dtype, axes={"latent": ("heads", None)}, window=self.window
        )

    def parameter_count(self) -> int:
        made, query_width = self.latents * self.rank, self.heads * (self.nope + self.rotary)
        gains = 0 if self.latent_norm is None else self.q_rank + made
        sizes = [(self.query, query_width), (self.latent, made), (self.rope_key, self.rotary)]
        sizes += [(self.out, self.setting.width), *([(self.query_down, self.q_rank)] if self.q_rank else [])]
        return self._matrices() + gains + sum(size for linear, size in sizes if linear.bias is not None)

    def _matrices(self) -> int:
        """Numbers in matrices, each of which multiplies each token once."""
        width, query_width = self.setting.width, self.heads * (self.nope + self.rotary)
        query = self.q_rank * (width + query_width) if self.q_rank else width * query_width
        down = width * (self.latents * self.rank + self.rotary)
        return query + down + self.heads * (self.rank * (self.nope + self.value) + self.value * width)

    def flops(self, length: int) -> float:
        scores = self.nope + self.rotary + self.value
        return 2 * length * self._matrices() + 2 * cost.pairs(self.mask, length) * self.heads * scores

    def cache_bytes(self, length: int, itemsize: int, parts: Mapping[str, int] = NOWHERE) -> int:
        devices = parts.get("heads", 1)
        rows = self.latents * logical.repeats(self.heads, self.latents, devices) // devices
        return self._slots(length) * rows * (self.rank + self.rotary) * itemsize

    def _slots(self, length: int) -> int:
        """Places of a cache for `length` tokens."""
        return min(length, self.window) if self.window else length
