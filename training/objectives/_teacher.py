"""The network that another one is compared with: the weights of a finished run, which stay as they are."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array

from configs.errors import ConfigError
from kernels import tokens


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network. Its arrays go into the step as an argument, not as constants of the compiled program.

    `field` of `config.objective` names it.
    """

    definition: Any
    arrays: Any
    field: str = "teacher"

    @classmethod
    def load(cls, run_dir: str, layout: Any, field: str = "teacher") -> "Teacher":
        """The network of a run folder, placed by `layout`. Raises ConfigError where none is named, and what
        `training.load_run` raises."""
        from training.loading import load_run  # Which needs the objectives itself.

        if not run_dir:
            raise ConfigError(
                f"this objective learns from another network: set config.objective.{field} to a run folder"
            )
        return cls(*nnx.split(load_run(run_dir, layout=layout).model), field)

    def model(self, arrays: Any, student: Any) -> Any:
        """The network with its arrays in it. Raises ConfigError if its vocabulary is not the student's."""
        model = nnx.merge(self.definition, jax.lax.stop_gradient(arrays))
        if model.vocab_size != student.vocab_size:
            raise ConfigError(
                f"config.objective.{self.field} has a vocabulary of {model.vocab_size} tokens, the model one of "
                f"{student.vocab_size}: both must be trained with one tokenizer"
            )
        return model


@dataclasses.dataclass(frozen=True)
class Taught:
    """An objective with a teacher: a loss of (model, batch, rng, frozen), `frozen` being the teacher's arrays."""

    options: ml_collections.ConfigDict
    teacher: Teacher

    @property
    def frozen(self) -> Any:
        """The arrays that the step is given besides the state and the batch."""
        return self.teacher.arrays

    @staticmethod
    def context(batch: dict[str, Array]) -> tokens.Tokens:
        """What is known of the batch's tokens."""
        return tokens.packed(batch["segment"], batch["position"].astype(jnp.float32))

    @staticmethod
    def weights(batch: dict[str, Array]) -> Array:
        """The share of each token in a mean; all 0 in a batch of nothing but padding."""
        count = jnp.sum(batch["weight"])
        return batch["weight"] * jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)
