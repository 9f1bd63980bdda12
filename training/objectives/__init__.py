"""What a step minimises, by the name in `config.objective.name`: one file here per objective.

A file's `build(config.objective, layout)` gives `loss(model, batch, rng) -> (scalar, metrics)`. The scalar is a mean
over the tokens, or pairs, that `batch["weight"]` weighs, so that micro-batches can be put together; metrics are scalars
of the same kind. An objective with arrays of its own, which are not trained, has them in its attribute `frozen` and is
called `loss(model, batch, rng, frozen)`.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from configs.errors import ConfigError, unknown

Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def names() -> tuple[str, ...]:
    """The objectives there are, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def get(name: str) -> Callable[[ml_collections.ConfigDict, Any], Loss]:
    """The maker of the objective of that name; ConfigError naming the nearest if there is none."""
    if name not in names():
        raise ConfigError(unknown("config.objective.name", name, names()))
    return importlib.import_module(f"training.objectives.{name}").build
