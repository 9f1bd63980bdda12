"""Fair comparisons: one field of a config set so that a budget comes out the same as elsewhere."""

from typing import Any

import ml_collections

from configs import fields
from configs.errors import ConfigError, unknown
from models.accounting import account

BUDGETS = {
    "parameters": "parameters",
    "training_flops": "training_flops_per_token",
    "cache_bytes": "cache_bytes_per_token",
}


def spent(config: ml_collections.ConfigDict, vocab_size: int, budget: str) -> float:
    """What a run's config spends: parameters, training FLOPs per token, or cache bytes per token at its row length."""
    if budget not in BUDGETS:
        raise ConfigError(unknown("budget", budget, BUDGETS))
    return getattr(account(config.model, vocab_size, length=config.data.length), BUDGETS[budget])


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

    The budget must grow with the field; it is found by halving, so nothing is assumed of how. Raises ConfigError if
    even the smallest value spends more than the target by half, or if the field does not move the budget.
    """

    def at(steps: int) -> float:
        return spent(fields.apply(config, {field: steps * multiple}), vocab_size, budget)

    low, high = 1, 2
    if at(low) > 1.5 * target:
        raise ConfigError(f"{budget}: {at(low):,.0f} at config.{field} = {multiple} already exceed {target:,.0f}")
    while at(high) < target:
        if at(high) == at(low):
            raise ConfigError(f"config.{field} does not change {budget}: choose a field that does")
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < target else (low, middle)
    nearest = min((low, high), key=lambda steps: abs(at(steps) - target))
    return {field: nearest * multiple}
