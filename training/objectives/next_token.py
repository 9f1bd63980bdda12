"""Each token predicted from those before it in its document: the language modelling loss."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, Int

from kernels import tokens
from training.objectives import Loss


def build(options: ml_collections.ConfigDict, layout: Any = None) -> Loss:
    """Weighted cross-entropy, with `options.z_loss` and `options.label_smoothing`, plus the model's own losses.

    Every key "loss/..." in the model's aux is added to the objective; all of aux that is scalar becomes a metric.
    """
    del layout  # Nothing but the model's own arrays.
    z_loss, smoothing = options.z_loss, options.label_smoothing

    def loss(model: Any, batch: dict[str, Array], rng: Array) -> tuple[Array, dict[str, Array]]:
        del rng  # Nothing in this objective is drawn.
        context = tokens.packed(batch["segment"], batch["position"].astype(jnp.float32))
        output = model(batch["inputs"], context)
        # Rows of the table without a token have probability 0, and no share of the smoothing.
        tokens_known = getattr(model, "vocab_size", output.logits.shape[-1])
        total, cross_entropy, square = summed(
            output.logits, batch["targets"], batch["weight"], z_loss, smoothing, tokens_known
        )
        count = jnp.sum(batch["weight"])
        # A batch of nothing but padding has no loss, and must not be 0 / 0.
        share = jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)
        metrics = {name: value for name, value in output.aux.items() if jnp.ndim(value) == 0}
        own = sum((value for name, value in output.aux.items() if name.startswith("loss/")), start=jnp.float32(0))
        metrics["cross_entropy"] = cross_entropy * share
        if z_loss:
            metrics["z"] = square * share
        return total * share + own, metrics

    return loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def summed(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    weight: Float[Array, "B T"],
    z_loss: float,
    smoothing: float,
    vocab_size: int,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Sums over tokens, each times its weight: (objective, cross-entropy, squared log-partition).

    The objective of a token with log-partition lse is (1 - smoothing) (lse - logit[target]) + smoothing (lse - mean
    logit) + z_loss lse^2 (label smoothing: Szegedy et al. 2016; z-loss: PaLM, Chowdhery et al. 2022, section 5), the
    mean being over the first `vocab_size` logits. Only the first result is differentiated, and only by `logits`. The
    gradient is written out because automatic differentiation keeps a second float32 [B, T, V] from the forward pass.
    """
    return _forward(logits, targets, weight, z_loss, smoothing, vocab_size)[0]


def _forward(
    logits: Array, targets: Array, weight: Array, z_loss: float, smoothing: float, vocab_size: int
) -> tuple[Any, Any]:
    wide, columns = logits.astype(jnp.float32), jnp.arange(logits.shape[-1])
    lse = jax.nn.logsumexp(wide, axis=-1)
    # A masked sum and not a gather: it stays where it is when the vocabulary is spread over devices.
    hit = jnp.sum(jnp.where(targets[..., None] == columns, wide, 0), axis=-1)
    objective = nll = lse - hit
    if smoothing:
        mean = jnp.sum(jnp.where(columns < vocab_size, wide, 0), axis=-1) / vocab_size
        objective = (1 - smoothing) * nll + smoothing * (lse - mean)
    if z_loss:
        objective = objective + z_loss * lse * lse
    sums = (jnp.sum(weight * objective), jnp.sum(weight * nll), jnp.sum(weight * lse * lse))
    return sums, (logits, targets, weight, lse)


def _backward(z_loss: float, smoothing: float, vocab_size: int, saved: Any, gradient: Any) -> tuple[Array, None, None]:
    logits, targets, weight, lse = saved
    columns = jnp.arange(logits.shape[-1])
    slope = jnp.exp(logits.astype(jnp.float32) - lse[..., None])
    if z_loss:
        slope = slope * (1 + 2 * z_loss * lse[..., None])
    slope = slope - jnp.where(targets[..., None] == columns, 1 - smoothing, 0.0)
    if smoothing:
        slope = slope - jnp.where(columns < vocab_size, smoothing / vocab_size, 0.0)
    return ((weight * gradient[0])[..., None] * slope).astype(logits.dtype), None, None


summed.defvjp(_forward, _backward)
