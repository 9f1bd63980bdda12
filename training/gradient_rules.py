"""What becomes of gradients before the optimiser sees them, by the name in `config.optimizer.gradient_rule`.

A rule is `rule(value_and_grad, params, batch, rng) -> ((loss, aux), gradients)`. It may call `value_and_grad`, which
takes the other three arguments and gives the same result, as often as it likes and at other parameters; `aux` it passes
on as it came. Accumulation over micro-batches happens inside `value_and_grad`, clipping after the rule.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from configs.errors import ConfigError, unknown

Result = tuple[tuple[jax.Array, Any], Any]
ValueAndGrad = Callable[[Any, Any, jax.Array], Result]
Rule = Callable[[ValueAndGrad, Any, Any, jax.Array], Result]


def mean(options: ml_collections.ConfigDict) -> Rule:
    """The plain gradient of the batch's loss, which is a mean over its tokens."""
    del options

    def rule(value_and_grad: ValueAndGrad, params: Any, batch: Any, rng: jax.Array) -> Result:
        return value_and_grad(params, batch, rng)

    return rule


def sam(options: ml_collections.ConfigDict) -> Rule:
    """Sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412, equation 2 and algorithm 1).

    The gradient at params + radius * g / |g|, g being the gradient at params and radius `options.sam_radius`; loss and
    aux are those at params. Two backward passes a step.
    """
    radius = options.sam_radius

    def rule(value_and_grad: ValueAndGrad, params: Any, batch: Any, rng: jax.Array) -> Result:
        here, gradients = value_and_grad(params, batch, rng)
        norm = optax.tree.norm(gradients)
        # At a stationary point there is no direction to climb, and 0 / 0 would be one of NaN.
        scale = jnp.where(norm > 0, radius / jnp.where(norm > 0, norm, 1.0), 0.0)
        climbed = jax.tree.map(lambda p, g: (p + scale * g).astype(p.dtype), params, gradients)
        _, gradients = value_and_grad(climbed, batch, rng)
        return here, gradients

    return rule


RULES: dict[str, Callable[[ml_collections.ConfigDict], Rule]] = {"mean": mean, "sam": sam}


def get(name: str) -> Callable[[ml_collections.ConfigDict], Rule]:
    """The maker of the rule of that name, called with `config.optimizer`; ConfigError naming the nearest if none."""
    if name not in RULES:
        raise ConfigError(unknown("config.optimizer.gradient_rule", name, RULES))
    return RULES[name]
