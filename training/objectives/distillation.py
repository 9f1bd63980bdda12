"""Another network's predictions, matched token by token: knowledge distillation (Hinton et al. 2015)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array

from kernels import tokens
from training.objectives._teacher import Teacher
from training.objectives.next_token import summed


def build(options: ml_collections.ConfigDict, layout: Any = None) -> "Distillation":
    """`options.divergence` times temperature^2 KL(teacher || model), both softened by `options.temperature`, plus
    `options.cross_entropy` times the cross-entropy of the text, plus the model's own losses."""
    return Distillation(options, Teacher.load(options.teacher, layout))


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A loss of (model, batch, rng, frozen), `frozen` being the teacher's arrays."""

    options: ml_collections.ConfigDict
    teacher: Teacher

    @property
    def frozen(self) -> Any:
        """The arrays that the step is given besides the state and the batch."""
        return self.teacher.arrays

    def __call__(self, model: Any, batch: dict[str, Array], rng: Array, frozen: Any) -> tuple[Array, dict[str, Array]]:
        """The weighted mean over tokens, and its parts as metrics."""
        del rng
        context = tokens.packed(batch["segment"], batch["position"].astype(jnp.float32))
        output = model(batch["inputs"], context)
        wanted = self.teacher.model(frozen, model)(batch["inputs"], context).logits[..., : model.vocab_size]
        weight, count = batch["weight"], jnp.sum(batch["weight"])
        share = jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)
        temperature = self.options.temperature
        theirs, ours = (
            jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
            for logits in (wanted, output.logits[..., : model.vocab_size])
        )
        divergence = jnp.sum(weight * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)) * share
        metrics = {name: value for name, value in output.aux.items() if jnp.ndim(value) == 0}
        metrics["divergence"] = divergence
        loss = self.options.divergence * temperature**2 * divergence
        nll = summed(output.logits, batch["targets"], weight, 0.0, 0.0, model.vocab_size)[0] * share
        metrics["cross_entropy"] = nll
        loss = loss + self.options.cross_entropy * nll
        own = sum((value for name, value in output.aux.items() if name.startswith("loss/")), start=jnp.float32(0))
        return loss + own, metrics
