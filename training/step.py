"""One step of training: a pure function from (state, batch) to (state, report)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Bool, Float

from sharding import Layout
from training.gradient_rules import Result, Rule, ValueAndGrad
from training.objectives import Loss
from training.optimizers import Schedule
from training.state import Arrays, State, Structure

Batch = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Report:
    """What a step says about itself, on the device until somebody reads it.

    Attributes:
        metrics: scalars by name.
        halted: the state stands still, since this step or an earlier one.
        broken: for the loss and each gradient, in the order of `leaves(params)`: is it not finite?
    """

    metrics: dict[str, Float[Array, ""]]
    halted: Bool[Array, ""]
    broken: Bool[Array, "leaves"]


def leaves(params: Arrays) -> list[str]:
    """The names that `Report.broken` speaks of."""
    return ["loss", *sorted(params)]


def build(
    structure: Structure,
    objective: Loss,
    rule: Rule,
    optimizer: optax.GradientTransformation,
    rate: Schedule,
    options: ml_collections.ConfigDict,
    layout: Layout,
) -> Callable[..., tuple[State, Report]]:
    """The step, not yet compiled; `options` is `config.optimizer`. It takes a state, a batch and, where the objective
    has them, its `frozen` arrays.

    A loss or gradient that is not finite leaves the state as it was, and raises `halted` in it so that the steps
    already under way do no harm either: the loop reads reports one step late.
    """

    def step(state: State, batch: Batch, frozen: Any = None) -> tuple[State, Report]:
        compared = objective if frozen is None else functools.partial(objective, frozen=frozen)
        with layout.activate():
            value_and_grad = accumulated(differentiated(structure, compared), state.rest, options.accumulate)
            rng = jax.random.fold_in(state.rng, state.step)
            (loss, (metrics, rest)), gradients = rule(value_and_grad, state.params, batch, rng)
        squares = {name: jnp.sum(jnp.square(g.astype(jnp.float32))) for name, g in gradients.items()}
        broken = ~jnp.isfinite(jnp.stack([loss, *(squares[name] for name in sorted(squares))]))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        moved = State(
            step=state.step + 1,
            halted=state.halted,
            params=params,
            rest=rest,
            opt_state=opt_state,
            ema=averaged(state.ema, params, options.ema_decay) if state.ema else {},
            rng=state.rng,
        )
        halted = state.halted | jnp.any(broken)
        after = jax.tree.map(lambda old, new: jnp.where(halted, old, new), state, moved)
        metrics = {
            "loss": loss,
            **metrics,
            "gradient_norm": jnp.sqrt(sum(squares.values())),
            "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
        }
        return dataclasses.replace(after, halted=halted), Report(metrics, halted, broken)

    return step


def differentiated(structure: Structure, objective: Loss) -> Callable[[Arrays, Arrays, Batch, Array], Result]:
    """(params, rest, batch, rng) -> ((loss, (metrics, rest after the forward pass)), gradients)."""

    def loss(params: Arrays, rest: Arrays, batch: Batch, rng: Array) -> tuple[Array, tuple[dict[str, Array], Arrays]]:
        model = structure.merge(params, rest)
        value, metrics = objective(model, batch, rng)
        return value, (metrics, structure.split(model)[1])

    return jax.value_and_grad(loss, has_aux=True)


def accumulated(function: Callable[[Arrays, Arrays, Batch, Array], Result], rest: Arrays, parts: int) -> ValueAndGrad:
    """`function` over `parts` micro-batches in turn, put together by their token weights: the big batch's result.

    Loss, metrics and gradients of a micro-batch count in proportion to the sum of its `weight` (its rows, where a batch
    has none). The rows of a micro-batch lie `parts` apart, so that a batch spread over devices stays where it is.
    """
    if parts == 1:
        return lambda params, batch, rng: function(params, rest, batch, rng)

    def value_and_grad(params: Arrays, batch: Batch, rng: Array) -> Result:
        pieces = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)

        def one(rest: Arrays, piece: Batch, key: Array) -> tuple[Arrays, tuple[Any, Array]]:
            (loss, (metrics, rest)), gradients = function(params, rest, piece, key)
            weight = jnp.sum(piece["weight"]) if "weight" in piece else jnp.float32(len(jax.tree.leaves(piece)[0]))
            return rest, (jax.tree.map(lambda x: x * weight, (loss, metrics, gradients)), weight)

        def add(carry: tuple[Arrays, Any], now: tuple[Batch, Array]) -> tuple[tuple[Arrays, Any], None]:
            rest, sums = carry
            rest, more = one(rest, *now)
            return (rest, jax.tree.map(jnp.add, sums, more)), None

        keys = jax.random.split(rng, parts)
        first = jax.tree.map(lambda x: x[0], pieces)
        _, shapes = jax.eval_shape(one, rest, first, keys[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (after, (sums, total)), _ = jax.lax.scan(add, (rest, zeros), (pieces, keys))
        share = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
        loss, metrics, gradients = jax.tree.map(lambda x: (x * share).astype(x.dtype), sums)
        return (loss, (metrics, after)), gradients

    return value_and_grad


def averaged(average: Arrays, params: Arrays, decay: float) -> Arrays:
    """decay * average + (1 - decay) * params, kept in float32."""
    return {name: decay * average[name] + (1 - decay) * params[name].astype(jnp.float32) for name in average}
