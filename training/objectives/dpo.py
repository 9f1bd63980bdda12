"""Preferred answers made likelier than others: direct preference optimisation (Rafailov et al., arXiv 2305.18290)."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, Int

from kernels import tokens
from training.objectives._teacher import Teacher


def build(options: ml_collections.ConfigDict, layout: Any = None) -> "DPO":
    """-(1 - s) log sigmoid(margin) - s log sigmoid(-margin), plus the model's own losses, for pairs of answers.

    The margin of a pair is the reward of the chosen answer less that of the rejected one; a reward is `options.beta`
    times the log-probability of the answer after its prompt, less the same of the frozen `options.reference` (equations
    5 and 7). s = `options.label_smoothing` is the share of pairs that are the wrong way round (Mitchell 2023). Batches
    are those of `data.preferences.PairRows`.
    """
    return DPO(options, Teacher.load(options.reference, layout, "reference"))


class DPO:
    """The mean over pairs that `weight` weighs, with rewards and log-probabilities as metrics."""

    def __init__(self, options: ml_collections.ConfigDict, reference: Teacher) -> None:
        self.options, self.reference, self.frozen = options, reference, reference.arrays

    def __call__(self, model: Any, batch: dict[str, Array], rng: Array, frozen: Any) -> tuple[Array, dict[str, Array]]:
        del rng
        output_of = lambda network: network(*_rows(batch))  # noqa: E731
        output, reference = output_of(model), output_of(self.reference.model(frozen, model))
        ours, theirs = (
            answers(each.logits, batch["targets"], batch["completion"]) for each in (output, reference)
        )  # [B, 2]
        count = jnp.sum(batch["weight"])
        # A batch of nothing but filling has no loss, and must not be 0 / 0.
        share = batch["weight"] * jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)
        rewards = self.options.beta * (ours - theirs)
        margin, smoothing = rewards[:, 0] - rewards[:, 1], self.options.label_smoothing
        loss = -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)
        metrics = {name: value for name, value in output.aux.items() if jnp.ndim(value) == 0}
        metrics |= {
            "preference": jnp.sum(share * loss),
            "rewards/accuracy": jnp.sum(share * (margin > 0)),
            "rewards/margin": jnp.sum(share * margin),
        }
        for side, name in enumerate(("chosen", "rejected")):
            metrics |= {f"rewards/{name}": jnp.sum(share * rewards[:, side]), f"logps/{name}": share @ ours[:, side]}
        own = sum((value for name, value in output.aux.items() if name.startswith("loss/")), start=jnp.float32(0))
        return metrics["preference"] + own, metrics


def answers(
    logits: Float[Array, "R T V"], targets: Int[Array, "B 2 T"], completion: Float[Array, "B 2 T"]
) -> Float[Array, "B 2"]:
    """The log-probability of each answer, summed over its tokens; R = 2 B rows, those of a pair next to each other."""
    wide, columns = logits.astype(jnp.float32), jnp.arange(logits.shape[-1])
    wanted = targets.reshape(-1, targets.shape[-1], 1)
    # A masked sum and not a gather: it stays where it is when the vocabulary is spread over devices.
    hit = jnp.sum(jnp.where(wanted == columns, wide, 0), axis=-1)
    each = (hit - jax.nn.logsumexp(wide, axis=-1)).reshape(targets.shape)
    return jnp.sum(completion * each, axis=-1)


def _rows(batch: dict[str, Array]) -> tuple[Int[Array, "R T"], tokens.Tokens]:
    """Ids and what is known of them, a row per answer."""
    flat = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in ("inputs", "segment", "position")}
    return flat["inputs"], tokens.packed(flat["segment"], flat["position"].astype(jnp.float32))
