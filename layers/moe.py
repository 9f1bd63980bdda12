"""Mixtures of experts: a router sends each token to a few of many MLPs, however many tokens one of them gets."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from kernels.linear import linear
from kernels.ragged import ragged
from kernels.tokens import Tokens
from layers.linear import Linear
from layers.mlp import MLP, hidden_units, is_gated
from layers.norm import widened
from layers.setting import Setting
from layers.variables import Constant
from sharding import logical

_ROUTER = ("embed", None)
_ROWS = ("batch", "length", None)
_X = ("batch", "length", "embed")
_INTO, _OUT_OF = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")


@dataclasses.dataclass(frozen=True)
class Routing:
    """Which experts a token goes to, and with which weights; the fields are those of `configs/base.py:experts`.

    Scores are the softmax or the sigmoid of the logits. Chosen are the `chosen` experts with the highest score +
    correction, out of the `groups_chosen` groups that are worth most by that sum (experts of other groups count as
    -inf, as in DeepSeek's own inference code; 0 in their place would win over a negative sum). Of equals the first
    wins. Weights are the scores themselves, `renormalise`d over the chosen, times `scale`. Mixtral (arXiv 2401.04088):
    softmax, renormalised; DeepSeek-V2 (2405.04434): softmax, groups by "max", scaled; DeepSeek-V3 (2412.19437):
    sigmoid, corrected, groups by "top2", renormalised and scaled.
    """

    count: int
    chosen: int = 2
    router: str = "softmax"
    groups: int = 1
    groups_chosen: int = 1
    group_score: str = "max"
    renormalise: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.router not in ("softmax", "sigmoid"):
            raise ValueError(f"router must be softmax or sigmoid, not {self.router!r}")
        if self.group_score not in ("max", "top2"):
            raise ValueError(f"group_score must be max or top2, not {self.group_score!r}")
        if self.count % self.groups or not 1 <= self.groups_chosen <= self.groups:
            raise ValueError(f"{self.groups_chosen} of {self.groups} groups cannot be made of {self.count} experts")
        if not 1 <= self.chosen <= self.groups_chosen * (self.count // self.groups):
            raise ValueError(f"{self.chosen} experts cannot be chosen out of {self.count} with these groups")

    def scores(self, logits: Float[Array, "... N"]) -> Float[Array, "... N"]:
        """Between 0 and 1."""
        return jax.nn.softmax(logits, axis=-1) if self.router == "softmax" else jax.nn.sigmoid(logits)

    def __call__(
        self, logits: Float[Array, "R N"], correction: Float[Array, " N"] | None = None
    ) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
        """(weights, numbers) of each row's K experts, best first."""
        scores = self.scores(logits)
        worth = jax.lax.stop_gradient(scores if correction is None else scores + correction)
        if self.groups_chosen < self.groups:
            worth = jnp.where(self._in_chosen_groups(worth), worth, -jnp.inf)
        _, experts = jax.lax.top_k(worth, self.chosen)  # Of equals it takes the lowest index.
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.renormalise:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return weights * self.scale, experts

    def _in_chosen_groups(self, worth: Float[Array, "R N"]) -> Bool[Array, "R N"]:
        best, _ = jax.lax.top_k(worth.reshape(-1, self.groups, self.count // self.groups), self.best_of_group)
        _, groups = jax.lax.top_k(jnp.sum(best, axis=-1), self.groups_chosen)
        kept = jnp.any(groups[:, :, None] == jnp.arange(self.groups), axis=1)
        return jnp.repeat(kept, self.count // self.groups, axis=1)

    @property
    def best_of_group(self) -> int:
        """By how many of its best experts a group is judged."""
        return 2 if self.group_score == "top2" else 1


class Router(nnx.Module):
    """Logits x W in float32, W [D, N], and the constant that corrects scores for the choice, [N] in float32."""

    def __init__(self, setting: Setting, count: int, *, correction: bool, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(setting.normal(rngs.params(), (setting.width, count), setting.init_std), axes=_ROUTER)
        self.correction = Constant(jnp.zeros((count,), jnp.float32)) if correction else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N"]:
        weight = logical.gather(self.weight[...], _ROUTER)
        x = widened(x)
        # In full precision on every platform: a rounded logit sends a token elsewhere.
        return jnp.einsum("btd,dn->btn", x, weight.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)


class Experts(nnx.Module):
    """Sum over a token's chosen experts of weight * expert(x), plus the shared experts of x.

    An expert is an MLP of `kind` without biases; matrices are stacked, [N, D, I] and [N, I, D]. The `shared` experts,
    which get every token, are one dense MLP of width shared * I (DeepSeekMoE, arXiv 2401.06066). No token is dropped
    and no expert has a capacity: rows are sorted by expert and go through `kernels.ragged`, whose groups may have any
    size. How experts are chosen: `Routing`.

    On a mesh the experts are divided along the logical axis `experts`: each device computes those of its own, for all
    tokens of its rows, in a buffer that holds the most it can be sent (a token has at most min(K, its experts) of
    them), and one sum puts together the experts and the shared experts. Along `expert_mlp` the hidden units of every
    expert are divided instead.

    `balance` > 0 adds the load-balance loss "loss/expert_balance": balance * N * sum_n f_n P_n, where f_n is the share
    of choices that fell on expert n and P_n the mean of its score, scores summing to 1 over experts; it is `balance`
    if all get the same. `balance_form` "switch": over all tokens of the batch (Switch, arXiv 2101.03961, equation 4,
    with the choices of every rank in f as Mixtral's code has it, divided by K); "sequence": over each row, then the
    mean over rows (DeepSeek-V3, equations 17 to 20, but for f: of the choices made, so with the correction).
    `z_loss` > 0 adds "loss/expert_z": z_loss * mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906, equation 5).
    Padding takes part in neither, and losses add up over layers. The correction is never changed here: DeepSeek-V3's
    rule for it is a step between updates of the weights.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        kind: str = "swiglu",
        width: int = 704,
        bias: bool = False,
        count: int,
        chosen: int = 2,
        shared: int = 0,
        router: str = "softmax",
        correction: bool = False,
        groups: int = 1,
        groups_chosen: int = 1,
        group_score: str = "max",
        renormalise: bool = True,
        scale: float = 1.0,
        balance: float = 0.0,
        balance_form: str = "switch",
        z_loss: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        if bias:
            raise ValueError("experts have no biases: set bias to False")
        if balance_form not in ("switch", "sequence"):
            raise ValueError(f"balance_form must be switch or sequence, not {balance_form!r}")
        gated = is_gated(kind)
        self.setting, self.kind, self.width, self.shared_count = setting, kind, width, shared
        self.balance, self.balance_form, self.z_loss = balance, balance_form, z_loss
        self.routing = Routing(count, chosen, router, groups, groups_chosen, group_score, renormalise, scale)
        self.router = Router(setting, count, correction=correction, rngs=rngs)

        def matrices(shape: tuple[int, ...], std: float, axes: logical.Axes) -> nnx.Param:
            return nnx.Param(setting.normal(rngs.params(), shape, std), axes=axes)

        into = (count, setting.width, width)
        self.gate = matrices(into, setting.init_std, _INTO) if gated else None
        self.up = matrices(into, setting.init_std, _INTO)
        self.down = matrices((count, width, setting.width), setting.residual_std, _OUT_OF)
        self.shared = MLP(setting, kind=kind, width=shared * width, rngs=rngs) if shared else None

    def __call__(
        self, x: Float[Array, "B T D"], tokens: Tokens | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """(out, losses). `tokens` says which are padding: it changes no other token, and no loss."""
        logits = self.router(x)
        correction = None if self.router.correction is None else self.router.correction[...]
        routed = [_in_use(parameter, axes, x) for parameter, axes in self._routed]
        shared = [] if self.shared is None else [_matrix(layer, x) for layer in self._shared]
        routed_axes, shared_axes = logical.mesh_axes("experts", "expert_mlp"), logical.mesh_axes("mlp")
        holders = logical.mesh_axes("experts")

        def local(x, logits, correction, gate, up, down, *shared):
            flat = x.reshape(-1, x.shape[-1])
            first = jax.lax.axis_index(holders) * up.shape[0] if holders else 0
            weights, experts = self.routing(logits.reshape(-1, logits.shape[-1]), correction)
            out = _through_experts(self.kind, flat, weights, experts - first, gate, up, down)
            dense = _dense(self.kind, flat, *shared) if shared else None
            if dense is not None and shared_axes == routed_axes:
                out, dense = out + dense, None
            out = _summed(out, routed_axes)
            out = out if dense is None else out + _summed(dense, shared_axes)
            return out.reshape(x.shape), experts.reshape(*x.shape[:2], -1)

        shared_in = () if self.shared is None else (("embed", "mlp"), ("embed", "mlp"), ("mlp", "embed"))
        run = logical.shard_kernel(local, (_X, _ROWS, (None,), _INTO, _INTO, _OUT_OF, *shared_in), (_X, _ROWS))
        out, experts = run(x, logits, correction, *routed, *shared)
        return out, self._losses(logits, experts, None if tokens is None else tokens.valid)

    @property
    def _routed(self) -> list[tuple[nnx.Param | None, logical.Axes]]:
        return [(self.gate, _INTO), (self.up, _INTO), (self.down, _OUT_OF)]

    @property
    def _shared(self) -> list[Linear | None]:
        return [self.shared.gate, self.shared.up, self.shared.down]

    def _losses(
        self, logits: Float[Array, "B T N"], experts: Int[Array, "B T K"], valid: Bool[Array, "B T"] | None
    ) -> dict[str, Array]:
        losses = {}
        counted = jnp.broadcast_to(True if valid is None else valid, logits.shape[:2]).astype(logits.dtype)
        if self.balance:
            over = (0, 1) if self.balance_form == "switch" else 1
            share = counted / jnp.maximum(jnp.sum(counted, axis=over, keepdims=True), 1)
            scores = self.routing.scores(logits)
            scores = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
            hits = jnp.sum(experts[..., None] == jnp.arange(self.routing.count), axis=2) / self.routing.chosen
            load, mean = (jnp.sum(each * share[..., None], axis=over) for each in (hits, scores))
            value = self.routing.count * jnp.sum(load * mean, axis=-1)
            if self.balance_form == "sequence":
                value = jnp.sum(value) / jnp.maximum(jnp.sum(jnp.any(counted > 0, axis=1)), 1)
            losses["loss/expert_balance"] = self.balance * value
        if self.z_loss:
            squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
            losses["loss/expert_z"] = self.z_loss * jnp.sum(squares * counted) / jnp.maximum(jnp.sum(counted), 1)
        return losses

    def flops(self, length: int) -> float:
        """Floating-point operations of matrix products in one forward pass over a row: those of the experts a token
        goes to, of the shared ones, and the router's."""
        return 2.0 * length * (self.parameter_count() - self.idle_parameter_count())

    def idle_parameter_count(self) -> int:
        """Parameters that a token does not meet."""
        return (self.routing.count - self.routing.chosen) * self._one

    def parameter_count(self) -> int:
        """All parameters."""
        return self.setting.width * self.routing.count + (self.routing.count + self.shared_count) * self._one

    @property
    def _one(self) -> int:
        return MLP.parameter_count(self.setting.width, kind=self.kind, hidden=self.width, bias=False)


def channel_mixer(
    setting: Setting, *, width: int = 704, experts: dict[str, Any] | None = None, rngs: nnx.Rngs, **options: Any
) -> MLP | Experts:
    """What `config.model.mlp` describes: a mixture where `experts.count` is above 0, else a dense MLP."""
    chosen = dict(experts or {"count": 0})
    own = chosen.pop("width", 0)
    if not chosen["count"]:
        return MLP(setting, width=width, rngs=rngs, **options)
    return Experts(setting, width=own or width, rngs=rngs, **options, **chosen)


def _through_experts(
    kind: str,
    x: Float[Array, "R D"],
    weights: Float[Array, "R K"],
    places: Int[Array, "R K"],
    gate: Float[Array, "n D I"] | None,
    up: Float[Array, "n D I"],
    down: Float[Array, "n I D"],
) -> Float[Array, "R D"]:
    """The weighted sum of each row's experts; places outside 0 ... n - 1 are experts that are elsewhere."""
    (rows, count), here = places.shape, up.shape[0]
    places = jnp.where((places >= 0) & (places < here), places, here).reshape(-1)
    order = jnp.argsort(places, stable=True)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    order = order[: rows * min(count, here)]  # A row goes to different experts: behind are only those elsewhere.
    sizes = jnp.sum(places[:, None] == jnp.arange(here), axis=0, dtype=jnp.int32)

    def product(x, w):
        return checkpoint_name(ragged(x, w, sizes), "linear")

    y = _dense(kind, _moved(x, order, back, count), gate, up, down, product)
    y = _moved(y, back, order, 1).reshape(rows, count, -1)
    return jnp.einsum("rk,rkd->rd", weights, y, preferred_element_type=weights.dtype).astype(x.dtype)


def _dense(kind, x, gate, up, down, product=None):
    """An MLP by its matrices."""
    product = product or (lambda x, w: checkpoint_name(linear(x, w), "linear"))
    return product(hidden_units(kind, product(x, up), None if gate is None else product(x, gate)), down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _moved(x: Float[Array, "R D"], to: Int[Array, " S"], back: Int[Array, " Q"], copies: int) -> Float[Array, "S D"]:
    """Row s is x[to[s] // copies], or 0 where there is none; `back` is where each copy of each row went.

    The backward pass gathers too; JAX's would scatter, which is slow on CPU and adds in no fixed order on GPU.
    """
    return x.at[to // copies].get(mode="fill", fill_value=0)


def _moved_forward(x, to, back, copies):
    return _moved(x, to, back, copies), (to, back)


def _moved_backward(copies, saved, dy):
    to, back = saved
    dx = _moved(dy, back, to, 1).reshape(-1, copies, dy.shape[-1])
    return jnp.sum(widened(dx), axis=1).astype(dy.dtype), None, None


_moved.defvjp(_moved_forward, _moved_backward)


def _summed(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def _in_use(parameter: nnx.Param | None, axes: logical.Axes, x: Array) -> Array | None:
    """Matrices laid out for use: on a mesh their narrow copy moves, one device keeps them as they are stored."""
    if parameter is None or logical.active() is None:
        return None if parameter is None else parameter[...]
    return logical.gather(parameter[...].astype(x.dtype), axes)


def _matrix(layer: Linear | None, x: Array) -> Array | None:
    return None if layer is None else _in_use(layer.weight, layer.axes, x)
