"""The fixed decay of each head and layer: two rules, as published and as released."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

RULES = ("alibi", "paper", "minimax", "none")


def decay_rates(
    heads: int, layer_index: int | Int[Array, ""], depth: int, rule: str = "alibi", layer_factor: bool = True
) -> Float[Array, "H"]:
    """The rates s >= 0 of one layer, float32: a head forgets by exp(-s) per token.

    `layer_index` runs from 0 to depth - 1 and may be traced. Rules:

    - "alibi" (released TransNormerLLM code, the default): ALiBi slopes 2^(-8h/H), h = 1..H; where H is not a power of
      two, the slopes of the power below it followed by every other slope of the power above. Times 1 - l/(L-1) + 1e-5
      with `layer_factor`; a single layer counts as the lowest.
    - "paper" (arXiv 2405.17381): 8h/H, h = 0..H-1, so that head 0 never forgets. Times 1 - l/L with `layer_factor`.
    - "minimax" (MiniMax-01, arXiv 2501.08313, as released): 2^(-8h/H), h = 1..H, whatever H is. Times
      1 - l/(L - 1 + 1e-5) + 1e-5 with `layer_factor`.
    - "none": all 0, plain causal linear attention.

    Raises: `ValueError` for an unknown rule or heads or depth below 1.
    """
    if rule not in RULES:
        raise ValueError(f"unknown decay rule {rule!r}: known: {', '.join(RULES)}")
    if heads < 1 or depth < 1:
        raise ValueError(f"decay_rates: heads ({heads}) and depth ({depth}) must be at least 1")
    layer = jnp.asarray(layer_index, jnp.float32)
    if rule == "none":
        return jnp.zeros(heads, jnp.float32)
    if rule == "paper":
        slopes, factor = 8.0 * np.arange(heads) / heads, 1.0 - layer / depth
    elif rule == "minimax":
        slopes = 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)
        # One layer's factor by the difference: 1 - l/(...) would lose all digits at the top.
        factor = (depth - 1 - layer + 1e-5) / (depth - 1 + 1e-5) + 1e-5
    else:
        slopes, factor = alibi_slopes(heads), (max(depth - 1, 1) - layer) / max(depth - 1, 1) + 1e-5
    return jnp.asarray(slopes, jnp.float32) * (factor if layer_factor else 1.0)


def alibi_slopes(heads: int) -> np.ndarray:
    """Slopes of ALiBi (arXiv 2108.12409), float64, for any number of heads."""
    power = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8.0 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, between[: heads - power]])
