"""Mixture of heads: each token takes a few of its heads, and weighs them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from kernels.attention import cost
from kernels.tokens import Tokens
from layers.attention.contract import Setting, register
from layers.attention.mha import Gates, MultiHeadAttention
from layers.moe import Router
from sharding import logical

ROUTERS = ("learned", "query_norm")
SCORES = ("released", "paper")
STRAIGHT_THROUGH = ("all", "active", "none")
_TINY = 1e-12  # Under roots: queries of zero, or all of one size, have gradients, too.


@register("moh")
class MixtureOfHeads(MultiHeadAttention):
    """`mha` whose heads are weighed, token by token: out_t = W_O concat_h(g_th H_th) (MoH, arXiv 2410.11842).

    The first `shared_heads` heads serve every token; of the others, the routed ones, token t takes the `routed_active`
    whose a_t = softmax(x_t W_r) is largest (of equals the first). Weights, with s_t = softmax(x_t W_s) over the shared
    heads and (p_t, r_t) = softmax(x_t W_h) the shares of both groups (section 3.2):

    - `score` "paper": g = p s for shared and r a for chosen routed heads;
    - "released" (the authors' code): g = 2 p hs s and 2 r K a / sum(a over the chosen), on average 1.

    `two_stage` False leaves p and r out (1, and no factor 2), as without shared heads; with a single shared head s is
    1. `routed_active` 0 means that all heads are shared. `router` "query_norm" has no parameters: a is the softmax of
    the norms of the routed heads' queries before positions, divided by their standard deviation (unbiased), and g is 1
    for shared and chosen heads (section 3.4, to go on from a pretrained model). There the gradient of g is that of a
    (`straight_through` "all": for all routed heads, whose outputs are then all computed [inferred]; "active": for the
    chosen ones; "none": no gradient, as in the released inference code).

    `balance` > 0 adds "loss/head_balance": balance * hr * sum_i P_i f_i over the hr routed heads, with P_i the mean of
    a_i and f_i the share of tokens that chose i, over the tokens that are no padding; it is balance * K if all are
    chosen alike. Losses add up over layers: for the paper's mean divide 0.01 by their number.

    A head that a token leaves out is skipped in passes without a cache over 512 tokens or more, but for
    `straight_through` "all". Its keys and values are needed by others, so the cache is that of `mha`; with a cache all
    heads are computed. Other options are those of `mha`.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        layer_index: int,
        rngs: nnx.Rngs,
        heads: int = 8,
        shared_heads: int = 2,
        routed_active: int = 2,
        router: str = "learned",
        score: str = "released",
        two_stage: bool = True,
        straight_through: str = "all",
        balance: float = 0.01,
        **options: Any,
    ) -> None:
        for name, value, known in (
            ("router", router, ROUTERS), ("score", score, SCORES),
            ("straight_through", straight_through, STRAIGHT_THROUGH),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
        routed = heads - shared_heads
        if not 0 <= routed_active <= routed or (routed > 0) != (routed_active > 0):
            raise ValueError(
                f"routed_active {routed_active} must be 1 to the {routed} heads that are not shared (0 if all are)"
            )
        super().__init__(setting, layer_index=layer_index, rngs=rngs, heads=heads, **options)
        self.shared_heads, self.routed_heads, self.routed_active = shared_heads, routed, routed_active
        self.score, self.straight_through, self.balance = score, straight_through, balance
        learned = router == "learned"
        made: dict[str, Any] = dict(correction=False, rngs=rngs)
        self.routed_router = Router(setting, routed, **made) if learned and routed else None
        self.shared_router = Router(setting, shared_heads, **made) if learned and shared_heads > 1 else None
        both = learned and two_stage and shared_heads > 0 and routed > 0
        self.group_router = Router(setting, 2, **made) if both else None
        self.by_norm = not learned

    def gates(self, x: Float[Array, "B T D"], q: Float[Array, "B T H d"], tokens: Tokens) -> Gates:
        routed = _whole(self._scores(x, q)) if self.routed_heads else None
        chosen = None if routed is None else self._chosen(routed)
        weight = _whole(self._weights(x, routed, chosen))
        losses = {}
        if self.balance and routed is not None:
            losses["loss/head_balance"] = self.balance * _balance(routed, chosen, tokens)
        active = None
        everything = self.by_norm and self.straight_through == "all"
        if chosen is not None and self.routed_active < self.routed_heads and not everything:
            active = jnp.concatenate([jnp.ones((*x.shape[:2], self.shared_heads), bool), chosen], axis=-1)
        return Gates(weight, active, losses)

    def _scores(self, x: Float[Array, "B T D"], q: Float[Array, "B T H d"]) -> Float[Array, "B T R"]:
        """a: of the routed heads, summing to 1."""
        if not self.by_norm:
            return jax.nn.softmax(self.routed_router(x), axis=-1)
        routed = q[:, :, self.shared_heads :].astype(jnp.float32)
        norms = _whole(jnp.sqrt(jnp.sum(routed**2, axis=-1) + _TINY))
        if self.routed_heads == 1:
            return jnp.ones_like(norms)
        spread = jnp.sqrt(jnp.var(norms, axis=-1, keepdims=True, ddof=1) + _TINY)
        return jax.nn.softmax(norms / spread, axis=-1)

    def _chosen(self, routed: Float[Array, "B T R"]) -> Bool[Array, "B T R"]:
        _, best = jax.lax.top_k(jax.lax.stop_gradient(routed), self.routed_active)
        return jnp.any(best[..., None] == jnp.arange(self.routed_heads), axis=-2)

    def _weights(
        self, x: Float[Array, "B T D"], routed: Float[Array, "B T R"] | None, chosen: Bool[Array, "B T R"] | None
    ) -> Float[Array, "B T H"]:
        parts = []
        released = self.score == "released"
        groups = None if self.group_router is None else jax.nn.softmax(self.group_router(x), axis=-1)
        groups = groups if groups is None or not released else 2 * groups
        if self.shared_heads:
            one = jnp.ones((*x.shape[:2], self.shared_heads), jnp.float32)
            if not self.by_norm:
                one = one if self.shared_router is None else jax.nn.softmax(self.shared_router(x), axis=-1)
                one = one * self.shared_heads if released else one
                one = one if groups is None else one * groups[..., :1]
            parts.append(one)
        if routed is not None:
            own = jnp.where(chosen, routed, 0)
            if self.by_norm:
                hard = chosen.astype(routed.dtype)
                soft = {"all": routed, "active": own, "none": jnp.zeros_like(own)}[self.straight_through]
                own = jax.lax.stop_gradient(hard - soft) + soft
            else:
                if released:
                    total = jnp.sum(own, axis=-1, keepdims=True)
                    own = self.routed_active * own / jnp.maximum(total, jnp.finfo(own.dtype).eps)
                own = own if groups is None else own * groups[..., 1:]
            parts.append(own)
        return jnp.concatenate(parts, axis=-1)

    @property
    def _routers(self) -> int:
        """Numbers in the routers' matrices."""
        routers = (self.routed_router, self.shared_router, self.group_router)
        return sum(router.weight.shape[0] * router.weight.shape[1] for router in routers if router is not None)

    def parameter_count(self) -> int:
        return super().parameter_count() + self._routers

    def flops(self, length: int) -> float:
        left_out = (self.routed_heads - self.routed_active) * (self.head_dim + self.value_dim)
        return super().flops(length) + 2 * length * self._routers - 2 * cost.pairs(self.mask, length) * left_out


def _whole(x: Float[Array, "B T N"]) -> Float[Array, "B T N"]:
    """On every device for all heads: routing is little work, and the choice is among all of them."""
    return logical.constrain(x, ("batch", "length", None))


def _balance(routed: Float[Array, "B T R"], chosen: Bool[Array, "B T R"], tokens: Tokens) -> Float[Array, ""]:
    counted = jnp.ones((1, 1)) if tokens.valid is None else tokens.valid.astype(jnp.float32)
    counted = jnp.broadcast_to(counted, routed.shape[:2])[..., None]
    total = jnp.maximum(jnp.sum(counted), 1)
    share, mean = (jnp.sum(counted * each, axis=(0, 1)) / total for each in (chosen, routed))
    return routed.shape[-1] * jnp.sum(share * mean)
