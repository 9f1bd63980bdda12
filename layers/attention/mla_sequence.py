"""Multi-head latent attention whose cache is spread over devices by tokens: exact, and no latent is held twice."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels import decode
from kernels.attention import attention
from kernels.tokens import Tokens
from layers.attention.contract import NOWHERE, Setting, register, visible
from layers.attention.mla import MultiHeadLatentAttention
from layers.cache import SlotCache, View
from layers.hooks import LayerHooks
from layers.linear import contracted
from sharding import logical

_STORED = ("batch", None, "slices", None)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("entries", "tokens", "length"),
    meta_fields=("pinned", "window", "fresh", "axes", "parts"),
)
@dataclasses.dataclass(frozen=True)
class SpreadCache(SlotCache):
    """Slots dealt out like cards: place s is number s // parts of part s % parts, so that every part is as full as the
    others whatever the length. Entries are [B, S / parts, parts, C]."""

    parts: int = 1

    def _write(self, entries: dict[str, Array], tokens: Tokens, order: Array, length: Array) -> "SpreadCache":
        slot = jnp.where(tokens.valid, order, self.slots)
        rows = jnp.arange(slot.shape[0])[:, None]

        def put(old: Array, late: Array, slot: Array, part: Array) -> Array:
            rows = jnp.arange(slot.shape[0])[:, None]

            def put_part(old: Array, part: Array) -> Array:
                place = jnp.where(slot % self.parts == part, slot // self.parts, old.shape[1])  # Else dropped.
                return old.at[rows, place].set(late.astype(old.dtype), mode="drop")

            return jax.vmap(put_part, in_axes=(2, 0), out_axes=2)(old, part)

        axes = (_STORED, ("batch", None, None), ("batch", None), ("slices",))
        spread = logical.shard_kernel(put, axes, _STORED)
        part = jnp.arange(self.parts)
        return dataclasses.replace(
            self,
            entries={name: spread(old, entries[name][:, :, 0], slot, part) for name, old in self.entries.items()},
            tokens=jax.tree.map(lambda old, late: old.at[rows, slot].set(late, mode="drop"), self.tokens, tokens),
            length=length,
            fresh=False,
        )


@register("mla_sequence")
class SequenceSplitLatentAttention(MultiHeadLatentAttention):
    """MLA with its cache in `parts` by tokens, each read by a device of its own (decode context parallelism, Helix).

    A step gathers the absorbed queries of all heads, attends to each part of the cache, and puts the parts together
    by their log-sum-exps; then each device goes on with its own heads. The function is MLA, exactly. Parts lie where
    the mesh cuts `slices`; all tokens are kept, those outside a window too. Options:
    `configs/attention/mla_sequence.py`.
    """

    head_axis = "slice_head_parts"
    fixed = ("latents",)

    def __init__(
        self,
        setting: Setting,
        *,
        layer_index: int,
        rngs: nnx.Rngs,
        parts: int = 2,
        **latent: Any,
    ) -> None:
        self.parts = parts
        super().__init__(setting, layer_index=layer_index, rngs=rngs, latents=1, **latent)

    def _mix(
        self, q: Array, rows: Float[Array, "B S G C"], view: View, started: bool, tokens: Tokens, site: LayerHooks
    ) -> Float[Array, "B T D"]:
        if not started:
            return super()._mix(q, rows, view, started, tokens, site)
        if any(site.edits(name) or site.tap(name) for name in ("scores", "probabilities")):
            raise NotImplementedError("a cache in parts has no scores in one place: use the layer mla to hook them")
        key_up = self.key_up.matrix(q.dtype).reshape(self.rank, self.heads, self.nope)
        value_up = self.value_up.matrix(q.dtype).reshape(self.rank, self.heads, self.value)
        q_nope, q_rope = jnp.split(q, [self.nope], axis=-1)
        q = jnp.concatenate([contracted("bthn,chn->bthc", q_nope, key_up), q_rope], axis=-1)
        read = self._read(q, rows, view, tokens)
        heads = site("heads", contracted("bthc,chv->bthv", read, value_up))
        return self.out(heads.reshape(*q.shape[:2], -1))

    def _read(
        self, q: Float[Array, "B T H C"], rows: Float[Array, "B s parts C"], view: View, tokens: Tokens
    ) -> Float[Array, "B T H d"]:
        across = logical.mesh_axes("slices")
        dealt = view.tokens.map(lambda column: column.reshape(*rows.shape[:3]))
        alone = q.shape[1] == 1 and not self.window and self.setting.implementation in (None, "xla", "reference")

        def local(q, rows, lengths, tokens, keys, part):
            pieces, lses = [], []
            for i in range(rows.shape[2]):
                if alone:
                    seen = jnp.maximum(lengths - part[i] + self.parts - 1, 0) // self.parts
                    piece, lse = self._one_query(q, rows[:, :, i : i + 1], seen)
                else:
                    piece, lse = self._queries(q, rows[:, :, i : i + 1], tokens, keys.map(lambda x, i=i: x[:, :, i]))
                pieces.append(piece)
                lses.append(lse)
            return _together(jnp.stack(pieces), jnp.stack(lses), across).astype(q.dtype)

        few = ("batch", "length", "slice_heads", None)
        axes = (few, _STORED, ("batch",), ("batch", "length"), ("batch", None, "slices"), ("slices",))
        shared = logical.shard_kernel(local, axes, ("batch", "length", "slice_head_parts", None))
        return shared(q, rows, view.lengths, tokens, dealt, jnp.arange(self.parts))

    def _one_query(self, q: Array, rows: Array, lengths: Int[Array, "B"]) -> tuple[Array, Array]:
        return decode.decode_attention(q, rows, None, lengths, value_width=self.rank, **self._options)

    def _queries(self, q: Array, rows: Array, tokens: Tokens, keys: Tokens) -> tuple[Array, Array]:
        mask = visible(self.mask, keys)
        out, lse = attention(
            q, rows, rows[..., : self.rank], mask=mask, q_tokens=tokens, k_tokens=keys, **self._options
        )
        return out, lse

    @property
    def _options(self) -> dict[str, Any]:
        return dict(scale=self.scale, soft_cap=self.soft_cap, implementation=self.setting.implementation)

    @property
    def _copies(self) -> int:
        return 1

    def init_cache(self, batch: int, length: int, dtype: str) -> SpreadCache:
        slots = -(-length // self.parts)
        flat = SlotCache.create(batch, slots * self.parts, {}, dtype)
        rows = logical.constrain(jnp.zeros((batch, slots, self.parts, self.rank + self.rotary), dtype), _STORED)
        return SpreadCache({"latent": rows}, flat.tokens, flat.length, parts=self.parts)

    def cache_bytes(self, length: int, itemsize: int, parts: Mapping[str, int] = NOWHERE) -> int:
        held = -(-length // self.parts) * self.parts // parts.get("slices", 1)
        return held * (self.rank + self.rotary) * itemsize


def _together(pieces: Float[Array, "p B T H d"], lses: Float[Array, "p B T H"], across: tuple[str, ...]) -> Any:
    """Attention to all parts from that to each, by their log-sum-exps; spread over heads where devices take part."""
    highest = jnp.max(lses, axis=0)
    highest = jax.lax.pmax(highest, across) if across else highest
    highest = jnp.where(jnp.isneginf(highest), 0, highest)
    shares = jnp.exp(lses - highest)
    total, whole = jnp.sum(shares[..., None] * pieces, axis=0), jnp.sum(shares, axis=0)
    if across:
        total = jax.lax.psum_scatter(total, across, scatter_dimension=2, tiled=True)
        whole = jax.lax.psum_scatter(whole, across, scatter_dimension=2, tiled=True)
    return total / jnp.where(whole > 0, whole, 1)[..., None]
