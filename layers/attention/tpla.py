"""Tensor-parallel latent attention: the latent in slices, one per device, and every head on every slice."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels.attention import cost
from kernels.tokens import Tokens
from layers.attention.contract import NOWHERE, Setting, register, visible
from layers.attention.mla import MultiHeadLatentAttention
from layers.attention.softmax import attend
from layers.cache import SlotCache, View
from layers.hooks import LayerHooks
from layers.linear import contracted
from layers.norm import widened
from layers.paged import gathered
from layers.variables import Constant
from sharding import logical

#: The modes of the paper and its ablations, as values of `norm`, `softmax` and `prefill`.
MODES: Mapping[str, Mapping[str, str]] = {
    "tpla": dict(norm="slice", softmax="slice", prefill="slice"),
    "tpla_norm_only": dict(norm="slice", softmax="whole", prefill="slice"),
    "tpla_softmax_only": dict(norm="whole", softmax="slice", prefill="slice"),
    "tpla_pd": dict(norm="slice", softmax="slice", prefill="whole"),
    "score_sum": dict(norm="whole", softmax="whole", prefill="slice"),
}
_Q = ("batch", "length", "slice_heads", None)
_ROWS = ("batch", None, "slices", None)
_PAGES = (None, None, "slices", None)
_UP = ("slices", None, "slice_heads", None)


@register("tpla")
class TensorParallelLatentAttention(MultiHeadLatentAttention):
    """TPLA (arXiv 2508.15881, sections 3 and 4): MLA whose latent is cut into g slices with a softmax each.

    Slice j of a token caches [c_j, k_r]: its d_c / g channels, normalised by the slice's own mean square times the
    constant alpha_j (`norm_factor`), and the whole rotated key. Its scores are scale (mu_j q~_j c_j + q_r k_r) with
    the constant mu_j (`logit_factor`), for all heads; outputs are summed over slices, which is the layer's one
    all-reduce. It is GLA with g times the heads. On the mesh of the preset `tpla` each device holds one slice (or
    g / size of "latent" of them); anywhere else the slices are computed side by side, which is the same function.

    `norm`, `softmax`: "slice", or "whole" for the statistic, or the scores, summed over slices (with both it is MLA,
    computed in slices). `prefill`: "whole" computes tokens before which nothing is cached as MLA does, norm and all,
    and makes TPLA of those that follow (the paper's prefill/decode separation). `out_mode`: "allreduce" sums outputs
    [B, T, D], with W_O of all heads of a slice on every device; "scatter_heads" sums values [B, T, H, d_v] first and
    spreads heads over slices, so that W_O is not held twice. Options: `configs/attention/tpla.py`; parameters are
    those of `mla`, so that weights fit either. Where the paper leaves alpha and mu open, so do we: `models.conversion`
    sets them, and trained from scratch they stay at g (a plain norm of each slice) and 1. Options besides: MLA's.
    """

    head_axis = "slice_heads"
    fixed = ("latents",)

    def __init__(
        self,
        setting: Setting,
        *,
        layer_index: int,
        rngs: nnx.Rngs,
        slices: int = 2,
        norm: str = "slice",
        softmax: str = "slice",
        prefill: str = "slice",
        out_mode: str = "allreduce",
        kv_lora_rank: int = 64,
        **latent: Any,
    ) -> None:
        if kv_lora_rank % slices:
            raise ValueError(f"{slices} slices do not divide a latent of {kv_lora_rank} channels")
        for name, value in dict(norm=norm, softmax=softmax, prefill=prefill).items():
            if value not in ("slice", "whole"):
                raise ValueError(f"{name} must be slice or whole, not {value!r}")
        if out_mode not in ("allreduce", "scatter_heads"):
            raise ValueError(f"out_mode must be allreduce or scatter_heads, not {out_mode!r}")
        self.slices, self.norm, self.softmax, self.prefill, self.out_mode = slices, norm, softmax, prefill, out_mode
        self.channel_axis = ("slices", slices)
        super().__init__(setting, layer_index=layer_index, rngs=rngs, latents=1, kv_lora_rank=kv_lora_rank, **latent)
        self.norm_factor = Constant(jnp.full((slices,), slices, setting.param_dtype))
        self.logit_factor = Constant(jnp.ones((slices,), setting.param_dtype))

    @property
    def latent_axis(self) -> Any:
        return ("slices", self.slices)

    @property
    def out_axis(self) -> Any:
        return ("slice_heads" if self.out_mode == "allreduce" else "slice_head_parts", self.heads)

    @property
    def slice_width(self) -> int:
        """Channels of a slice."""
        return self.rank // self.slices

    def _rows(
        self, x: Float[Array, "B T D"], tokens: Tokens, site: LayerHooks, started: bool
    ) -> Float[Array, "B T g C"]:
        latent = self.latent(x).reshape(*x.shape[:2], self.slices, self.slice_width)
        latent = logical.constrain(latent, ("batch", "length", "slices", None))
        if self.latent_norm is not None:
            latent = self._normalised(latent, started)
        rows = self._joined(site("latent", latent), x, tokens)
        return logical.constrain(rows, ("batch", "length", "slices", None))

    def _normalised(self, latent: Float[Array, "B T g c"], started: bool) -> Float[Array, "B T g c"]:
        """The slices over the root of their own mean square times alpha, or over that of the whole latent."""
        wide = widened(latent)
        squares = jnp.sum(wide * wide, axis=-1, keepdims=True) / self.rank
        if self.norm == "whole" or (self.prefill == "whole" and not started):
            square = jnp.sum(squares, axis=2, keepdims=True)
        else:
            square = squares * self.norm_factor[...].astype(wide.dtype)[:, None]
        normalised = (wide * jax.lax.rsqrt(square + self.latent_norm.epsilon)).astype(latent.dtype)
        return normalised * self._gain(latent)

    def _mix(
        self, q: Array, rows: Float[Array, "B S g C"], view: View, started: bool, tokens: Tokens, site: LayerHooks
    ) -> Float[Array, "B T D"]:
        whole = self.softmax == "whole" or (self.prefill == "whole" and not started)
        up = [
            linear.matrix(q.dtype).reshape(self.slices, self.slice_width, self.heads, -1)
            for linear in (self.key_up, self.value_up)
        ]
        out = self.out.matrix(q.dtype).reshape(self.heads, self.value, -1)
        factor = self.logit_factor[...].astype(q.dtype)
        form = _FORMS[whole, started]
        watched = site.hooks is not None
        # With hooks the partitioner does the layout: they see whole arrays.
        across = () if watched else logical.mesh_axes("slices")
        everywhere = () if watched else logical.mesh_axes("slices", "slice_heads")
        scattered = bool(across) and self.out_mode == "scatter_heads"
        if across and whole and not started and self.heads % logical.parts("slice_head_parts"):
            raise logical.ShardingError(
                f"{self.heads} heads do not divide over the devices, as prefill of whole latents needs: change "
                "config.model.attention.heads or config.sharding.model"
            )

        def local(q, rows, key_up, value_up, out, factor, tokens, keys, lengths, table):
            mask = visible(self.mask, keys)
            if whole and table is not None:
                rows, table = gathered(rows, table), None
            shared = dict(mask=mask, tokens=tokens, keys=keys, lengths=lengths, hooks=site, scale=self.scale)
            shared |= dict(table=table, soft_cap=self.soft_cap, implementation=self.setting.implementation)
            heads, parted = form(q, rows, key_up, value_up, factor, across, shared)
            if scattered and not parted:
                heads = jax.lax.psum_scatter(heads, across, scatter_dimension=2, tiled=True)
            elif parted and not scattered:  # W_O of all heads is here: take the rows of those that are.
                out = _own_part(out, across, heads.shape[2])
            heads = site("heads", heads)
            y = contracted("bthv,hvd->btd", heads, out)
            return jax.lax.psum(y, everywhere) if everywhere else y

        if not watched:
            out_axes = ("slice_head_parts" if self.out_mode == "scatter_heads" else "slice_heads", None, None)
            stored, table_axes = (_ROWS, None) if view.table is None else (_PAGES, ("batch", None))
            lengths_axes = None if view.lengths is None else ("batch",)
            told = (("batch", "length"), ("batch", None), lengths_axes, table_axes)
            axes = (_Q, stored, _UP, _UP, out_axes, ("slices",), *told)
            local = logical.shard_kernel(local, axes, ("batch", "length", None))
        y = local(q, rows, *up, out, factor, tokens, view.tokens, view.lengths, view.table)
        return y if self.out.bias is None else y + self.out.bias[...].astype(y.dtype)

    @property
    def _copies(self) -> int:
        return 1

    def init_cache(self, batch: int, length: int, dtype: str) -> SlotCache:
        shape = (self.slices, self.slice_width + self.rotary)
        return SlotCache.create(
            batch, length, {"latent": shape}, dtype, axes={"latent": ("slices", None)}, window=self.window
        )

    def flops(self, length: int) -> float:
        times = 1 if self.softmax == "whole" or self.prefill == "whole" else self.slices
        scores = self.nope + self.rotary + self.value
        return 2 * length * self._matrices() + 2 * cost.pairs(self.mask, length) * self.heads * scores * times

    def cache_bytes(self, length: int, itemsize: int, parts: Mapping[str, int] = NOWHERE) -> int:
        return self._slots(length) * self.slices // parts.get("slices", 1) * (self.slice_width + self.rotary) * itemsize


def _per_slice(q, rows, key_up, value_up, factor, across, shared):
    """A softmax per slice, keys and values expanded per head: for many queries."""
    latent, rope_key = jnp.split(rows, [key_up.shape[1]], axis=-1)
    (batch, keys, slices, _), heads = rows.shape, q.shape[2]
    k = contracted("bsgc,gchn->bsghn", latent, key_up * factor[:, None, None, None])
    v = contracted("bsgc,gchv->bsghv", latent, value_up)
    rope_key = jnp.broadcast_to(rope_key[:, :, :, None], (*k.shape[:4], rope_key.shape[-1]))
    k = jnp.concatenate([k, rope_key], axis=-1).reshape(batch, keys, slices * heads, -1)
    read = attend(jnp.tile(q, (1, 1, slices, 1)), k, v.reshape(batch, keys, slices * heads, -1), **shared)
    return jnp.sum(read.reshape(*q.shape[:2], slices, heads, -1), axis=2), False


def _per_slice_absorbed(q, rows, key_up, value_up, factor, across, shared):
    """A softmax per slice, attending to the cached rows themselves: for few queries and many keys."""
    width, slices = key_up.shape[1], rows.shape[2]
    q_nope, q_rope = jnp.split(q, [key_up.shape[-1]], axis=-1)
    absorbed = contracted("bthn,gchn->btghc", q_nope, key_up * factor[:, None, None, None])
    q_rope = jnp.broadcast_to(q_rope[:, :, None], (*absorbed.shape[:4], q_rope.shape[-1]))
    q = jnp.concatenate([absorbed, q_rope], axis=-1).reshape(*q.shape[:2], -1, rows.shape[-1])
    read = attend(q, rows, None, value_width=width, **shared)
    return contracted("btghc,gchv->bthv", read.reshape(*q.shape[:2], slices, -1, width), value_up), False


def _whole(q, rows, key_up, value_up, factor, across, shared):
    """MLA: keys and values of each head, summed over slices; a device goes on with its part of the heads."""
    latent, rope_key = jnp.split(rows, [key_up.shape[1]], axis=-1)
    k, v = contracted("bsgc,gchn->bshn", latent, key_up), contracted("bsgc,gchv->bshv", latent, value_up)
    if across:
        k, v = (jax.lax.psum_scatter(x, across, scatter_dimension=2, tiled=True) for x in (k, v))
        q = _own_part(q, across, k.shape[2], axis=2)
    rope_key = jnp.broadcast_to(rope_key[:, :, :1], (*k.shape[:3], rope_key.shape[-1]))
    return attend(q, jnp.concatenate([k, rope_key], axis=-1), v, **shared), bool(across)


def _whole_absorbed(q, rows, key_up, value_up, factor, across, shared):
    """One softmax of the scores summed over slices: an exact form of MLA that sends [B, H, T, S] numbers, to compare
    with. It forms the whole map."""
    width, slices = key_up.shape[1], rows.shape[2]
    q_nope, q_rope = jnp.split(q, [key_up.shape[-1]], axis=-1)
    absorbed = contracted("bthn,gchn->btghc", q_nope, key_up)
    if not across:
        joined = jnp.concatenate([*(absorbed[:, :, j] for j in range(slices)), q_rope], axis=-1)
        latent = rows[..., :width].reshape(*rows.shape[:2], 1, -1)
        row = jnp.concatenate([latent, rows[:, :, :1, width:]], axis=-1)
        read = attend(joined, row, None, value_width=latent.shape[-1], **shared)
        return contracted("bthc,chv->bthv", read, value_up.reshape(-1, *value_up.shape[2:])), False
    scores = jax.lax.psum(contracted("btghc,bsgc->bhts", widened(absorbed), widened(rows[..., :width])), across)
    scores = (scores + contracted("bthr,bsr->bhts", widened(q_rope), widened(rows[:, :, 0, width:]))) * shared["scale"]
    if cap := shared["soft_cap"]:
        scores = cap * jnp.tanh(scores / cap)
    allowed = shared["mask"].allowed(shared["tokens"], shared["keys"])
    weights = jnp.where(allowed, jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)), 0)
    values = rows[..., :width]
    if shared["keys"].valid is not None:  # 0 times whatever padding holds must be 0.
        values = jnp.where(shared["keys"].valid[..., None, None], values, 0)
    read = contracted("bhts,bsgc->btghc", weights.astype(q.dtype), values)
    return contracted("btghc,gchv->bthv", read, value_up), False


_FORMS = {
    (False, False): _per_slice,
    (False, True): _per_slice_absorbed,
    (True, False): _whole,
    (True, True): _whole_absorbed,
}


def _own_part(x: Array, across: tuple[str, ...], size: int, axis: int = 0) -> Array:
    """The part of an axis that belongs to this device among those that share its heads."""
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(across) * size, size, axis)
