"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature, then top-k, top-p and min-p, each on what the one before left.

    Attributes:
        temperature: 0 takes the most likely token (the first of ties) and ignores the rest.
        top_k: keep this many; 0 keeps all. Ties with the last one kept stay.
        top_p: keep the fewest tokens whose probabilities sum to at least this (Holtzman et al. 2020).
        min_p: keep tokens with at least this share of the highest probability (Nguyen et al. 2024).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number and not negative, but is {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, but is {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, but is {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, but is {self.min_p}")

    def filtered(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Tempered logits, -inf for tokens that may not be drawn."""
        logits = logits / self.temperature
        if self.top_k and self.top_k < logits.shape[-1]:
            smallest = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits >= smallest, logits, -jnp.inf)
        if self.top_p < 1:
            descending = -jnp.sort(-logits, axis=-1)
            before = jnp.cumsum(jax.nn.softmax(descending), axis=-1) - jax.nn.softmax(descending)
            smallest = jnp.min(jnp.where(before < self.top_p, descending, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits >= smallest, logits, -jnp.inf)
        if self.min_p:
            floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(self.min_p)
            logits = jnp.where(logits >= floor, logits, -jnp.inf)
        return logits

    def draw(self, logits: Float[Array, "B V"], keys: jax.Array) -> Int[Array, "B"]:
        """One token per row, with a key per row: a row's draw does not depend on its neighbours."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, self.filtered(logits)).astype(jnp.int32)
