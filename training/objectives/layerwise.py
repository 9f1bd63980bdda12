"""Another network's hidden states, matched layer by layer (the first stage of TPLA's alignment, arXiv 2508.15881)."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array

from configs.errors import ConfigError
from training.objectives._teacher import Taught, Teacher


def build(options: ml_collections.ConfigDict, layout: Any = None) -> "Layerwise":
    """The mean square difference of what each block gives, in the model and in its teacher.

    `options.layer_inputs`: "teacher" gives each block of the model what the teacher's block was given, so that layers
    are fitted by themselves; "own" what the model's blocks before it gave. The paper says inputs and outputs of layers
    are aligned, not which of these it means [inferred].
    """
    return Layerwise(options, Teacher.load(options.teacher, layout))


class Layerwise(Taught):
    """The mean over layers, weighted tokens and channels; each layer's part is a metric."""

    def __call__(self, model: Any, batch: dict[str, Array], rng: Array, frozen: Any) -> tuple[Array, dict[str, Array]]:
        del rng
        context, weights, teacher = self.context(batch), self.weights(batch), self.teacher.model(frozen, model)
        if (teacher.depth, teacher.setting.width) != (model.depth, model.setting.width):
            raise ConfigError(
                f"config.objective.teacher has {teacher.depth} layers of width {teacher.setting.width}, the model "
                f"{model.depth} of {model.setting.width}: layers can only be matched one to one"
            )
        theirs, ours = teacher.embedding(batch["inputs"]), model.embedding(batch["inputs"])
        metrics, loss = {}, jnp.float32(0)
        for layer, (own, taught) in enumerate(zip(model.layers(), teacher.layers(), strict=True)):
            given = theirs if self.options.layer_inputs == "teacher" else ours
            ours, _, aux = own(given, context, None, None, layer)
            theirs = jax.lax.stop_gradient(taught(theirs, context, None, None, layer)[0])
            square = jnp.mean(jnp.square((ours - theirs).astype(jnp.float32)), axis=-1)
            metrics[f"layer {layer}"] = jnp.sum(weights * square)
            loss = loss + metrics[f"layer {layer}"] / model.depth
            loss = loss + sum(value for name, value in aux.items() if name.startswith("loss/"))
        return loss, metrics
