"""Fair comparisons: one field of a config set so that a budget comes out the same as elsewhere."""

import functools
from collections.abc import Mapping
from typing import Any

import ml_collections

from configs import fields
from configs.errors import ConfigError, unknown
from models.accounting import account

BUDGETS = {
    "parameters": "parameters",
    "training_flops": "training_flops_per_token",
    "cache_bytes": "cache_bytes_per_token",
    "run_flops": "training_flops_per_token",
}


def spent(config: ml_collections.ConfigDict, vocab_size: int, budget: str) -> float:
    """What a run's config spends: parameters, training FLOPs per token, cache bytes per token at its row length, or
    training FLOPs of the whole run ("run_flops", which grows with train.steps).
    """
    if budget not in BUDGETS:
        raise ConfigError(unknown("budget", budget, BUDGETS))
    amount = getattr(account(config.model, vocab_size, length=config.data.length), BUDGETS[budget])
    return (
        amount * config.train.steps * config.data.batch_size * config.data.length if budget == "run_flops" else amount
    )


def match(
    config: ml_collections.ConfigDict,
    vocab_size: int,
    target: float,
    *,
    budget: str = "parameters",
    field: str = "model.mlp.width",
    multiple: int = 1,
) -> dict[str, Any]:
    """The override `{field: value}` with which `config` spends as nearly `target` as a whole `multiple` can.

    The budget must grow with the field; nothing is assumed of how. Raises ConfigError if
    even the smallest value spends more than the target by half, or if the field does not move the budget.
    """

    @functools.cache
    def at(steps: int) -> float:
        return spent(fields.apply(config, {field: steps * multiple}), vocab_size, budget)

    low, high = 1, 2
    if at(low) > 1.5 * target:
        raise ConfigError(f"{budget}: {at(low):,.0f} at config.{field} = {multiple} already exceed {target:,.0f}")
    while at(high) < target:
        if at(high) == at(low):
            raise ConfigError(f"config.{field} does not change {budget}: choose a field that does")
        low, high = high, 16 * high
    straight = True  # Budgets are nearly straight lines, so a chord finds the place; halving in between makes sure.
    while high - low > 1:
        share = (target - at(low)) / max(at(high) - at(low), 1e-9) if straight else 0.5
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if at(middle) < target else (low, middle)
        straight = not straight
    nearest = min((low, high), key=lambda steps: abs(at(steps) - target))
    return {field: nearest * multiple}


def equal(
    variants: Mapping[str, ml_collections.ConfigDict],
    vocab_size: int,
    *,
    budget: str = "parameters",
    target: float | None = None,
    field: str | Mapping[str, str] = "model.mlp.width",
    multiple: int = 1,
    tolerance: float = 0.01,
) -> dict[str, dict[str, Any]]:
    """By variant, the override that brings its budget to `target` (None: what the first variant spends).

    `field` may differ by variant, as caches have to be matched by `model.attention.kv_lora_rank` here and by
    `model.attention.head_dim` there. Raises ConfigError, naming the variant and what it came to, where no whole
    `multiple` comes within `tolerance` of the target.
    """
    if not variants:
        raise ConfigError("there are no variants to make equal")
    if target is None:
        target = spent(next(iter(variants.values())), vocab_size, budget)
    overrides = {}
    for name, config in variants.items():
        if abs(spent(config, vocab_size, budget) - target) <= tolerance * target:
            overrides[name] = {}
            continue
        own = field if isinstance(field, str) else field[name]
        overrides[name] = match(config, vocab_size, target, budget=budget, field=own, multiple=multiple)
        reached = spent(fields.apply(config, overrides[name]), vocab_size, budget)
        if abs(reached - target) > tolerance * target:
            raise ConfigError(
                f"variant {name}: {budget} come to {reached:,.0f} at {overrides[name]}, not within {tolerance:.0%} of "
                f"{target:,.0f}: choose a finer field or a larger tolerance"
            )
    return overrides
