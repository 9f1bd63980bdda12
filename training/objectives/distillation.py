"""Another network's predictions, matched token by token: knowledge distillation (Hinton et al. 2015)."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array

from training.objectives._teacher import Taught, Teacher
from training.objectives.next_token import summed


def build(options: ml_collections.ConfigDict, layout: Any = None) -> "Distillation":
    """`options.divergence` times temperature^2 KL(teacher || model), both softened by `options.temperature`, plus
    `options.cross_entropy` times the cross-entropy of the text, plus the model's own losses.

    The divergence is a mean per token; with `options.reduction` "row" it is that times the tokens of a row, which of
    full rows is the sum over positions divided by rows, as X-EcoMLA's code has it (arXiv 2503.11132).
    """
    return Distillation(options, Teacher.load(options.teacher, layout))


class Distillation(Taught):
    """The weighted mean over tokens, with its parts as metrics."""

    def __call__(self, model: Any, batch: dict[str, Array], rng: Array, frozen: Any) -> tuple[Array, dict[str, Array]]:
        del rng
        context, weights, temperature = self.context(batch), self.weights(batch), self.options.temperature
        output = model(batch["inputs"], context)
        wanted = self.teacher.model(frozen, model)(batch["inputs"], context).logits
        theirs, ours = (
            jax.nn.log_softmax(logits[..., : model.vocab_size].astype(jnp.float32) / temperature)
            for logits in (wanted, output.logits)
        )
        divergence = jnp.sum(weights * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))
        nll = summed(output.logits, batch["targets"], weights, 0.0, 0.0, model.vocab_size)[0]
        metrics = {name: value for name, value in output.aux.items() if jnp.ndim(value) == 0}
        metrics |= {"divergence": divergence, "cross_entropy": nll}
        own = sum((value for name, value in output.aux.items() if name.startswith("loss/")), start=jnp.float32(0))
        if self.options.reduction == "row":
            divergence = divergence * weights.shape[1]
        loss = self.options.divergence * temperature**2 * divergence + self.options.cross_entropy * nll
        return loss + own, metrics
