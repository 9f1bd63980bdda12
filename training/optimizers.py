"""optax optimisers and learning rate schedules out of `config.optimizer`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import optax

from configs.errors import ConfigError, unknown

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]
Axes = Mapping[str, tuple[str | None, ...]]


def schedule(options: ml_collections.ConfigDict, steps: int) -> Schedule:
    """The learning rate of step 0, 1, ..., `steps` - 1.

    A linear warm-up ends at the peak in step `warmup_steps` - 1; after it, the last step has exactly the final rate.
    `wsd` (warm-up, stable, decay: MiniCPM, arXiv 2404.06395) stays at the peak until the last `decay_share` of the
    run, then falls linearly (Hägele et al., arXiv 2405.18392).
    """
    peak, final, warm = options.learning_rate, options.final_share, options.warmup_steps
    after = max(1, steps - warm)
    if options.schedule == "cosine":
        parts, borders = [optax.cosine_decay_schedule(peak, after, alpha=final)], []
    elif options.schedule == "linear":
        parts, borders = [optax.linear_schedule(peak, final * peak, after)], []
    elif options.schedule == "constant":
        parts, borders = [optax.constant_schedule(peak)], []
    elif options.schedule == "wsd":
        decay = min(after, max(1, round(options.decay_share * steps)))
        parts = [optax.constant_schedule(peak), optax.linear_schedule(peak, final * peak, decay)]
        borders = [max(warm, steps - decay)]
    else:
        known = ("cosine", "wsd", "linear", "constant")
        raise ConfigError(unknown("config.optimizer.schedule", options.schedule, known))
    if warm:
        parts, borders = [optax.linear_schedule(0.0, peak, warm), *parts], [warm, *borders]
    joined = optax.join_schedules(parts, borders) if borders else parts[0]
    # optax counts updates done before this one; the rate belongs to the update itself, so the first is never zero.
    return lambda count: joined(count + 1)


def build(options: ml_collections.ConfigDict, rate: Schedule, axes: Axes) -> optax.GradientTransformation:
    """Clip, then the optimiser with its decoupled weight decay, for parameters {name: array} with these logical axes.

    Decay is decoupled everywhere: p <- p - rate * (direction + weight_decay * p) on the parameters of `decay_mask`.
    Muon (Jordan 2024) takes the matrices of the blocks, each layer and head by itself, scaled to AdamW's root mean
    square (arXiv 2502.16982); embeddings, output matrix and vectors go to AdamW at the same rate.
    """
    mask = decayed(options.decay_mask, axes)
    decay = options.weight_decay
    if options.name == "adamw":
        chosen = optax.adamw(
            rate, b1=options.b1, b2=options.b2, eps=options.epsilon, weight_decay=decay, mask=mask
        )  # fmt: skip
    elif options.name == "lion":
        chosen = optax.lion(rate, b1=options.b1, b2=options.b2, weight_decay=decay, mask=mask)
    elif options.name == "sgd":
        chosen = optax.chain(
            optax.trace(options.momentum) if options.momentum else optax.identity(),
            optax.add_decayed_weights(decay, mask),
            optax.scale_by_learning_rate(rate),
        )
    elif options.name == "muon":
        chosen = _muon(options, rate, axes, mask)
    else:
        raise ConfigError(unknown("config.optimizer.name", options.name, ("adamw", "muon", "lion", "sgd")))
    if not options.clip_norm:
        return chosen
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), chosen)


def decayed(rule: str, axes: Axes) -> dict[str, bool]:
    """Which parameters weight decay touches: "matrices" (no vectors, no embedding tables), "all" or "none"."""
    if rule == "matrices":
        return {name: len(_own(names)) >= 2 and _own(names)[0] != "vocab" for name, names in axes.items()}
    if rule in ("all", "none"):
        return dict.fromkeys(axes, rule == "all")
    raise ConfigError(unknown("config.optimizer.decay_mask", rule, ("matrices", "all", "none")))


def _muon(options: ml_collections.ConfigDict, rate: Schedule, axes: Axes, mask: dict[str, bool]) -> Any:
    # The last two axes are a matrix [inputs, outputs]; axes before them (layers, heads) are orthogonalised one by one.
    matrix = optax.contrib.MuonDimensionNumbers(-2, -1)
    inner = {name: len(_own(names)) >= 2 and "vocab" not in names for name, names in axes.items()}
    # optax decays all of AdamW's share or none of it, so decay is added once, outside, for both shares alike.
    direction = optax.contrib.muon(
        1.0,
        beta=options.momentum,
        eps=options.epsilon,
        adam_b1=options.b1,
        adam_b2=options.b2,
        muon_weight_dimension_numbers={name: matrix if taken else None for name, taken in inner.items()},
        consistent_rms=0.2,
    )
    return optax.chain(
        direction,
        optax.add_decayed_weights(-options.weight_decay, mask),  # The direction already has its minus sign.
        optax.scale_by_schedule(rate),
    )


def _own(names: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The axes of one layer's parameter, without the axis that stacks layers."""
    return tuple(name for name in names if name != "layers")
