"""A config put together: network, optimiser, step, and where each of their arrays lives."""

import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from configs import fields
from configs.errors import ConfigError
from sharding import Layout
from training import gradient_rules, objectives, optimizers, profiling, state, step
from training.state import State, Structure


@dataclasses.dataclass(frozen=True)
class Training:
    """Everything the loop calls. `abstract` is the state as shapes with shardings."""

    structure: Structure
    layout: Layout
    abstract: State
    init: Callable[[jax.Array], State]
    step: Callable[[State, dict[str, jax.Array]], tuple[State, step.Report]]
    leaves: list[str]
    flops_per_token: Callable[[], float]

    def utilisation(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation at this rate; None where the peak of a device is unknown."""
        devices = list(self.layout.mesh.devices.flat)
        if any(profiling.peak(device) is None for device in devices):
            return None
        return profiling.utilisation(self.flops_per_token(), tokens_per_second, devices)


def network(config: ml_collections.ConfigDict, tokenizer: Any) -> Structure:
    """The structure of the configured model; ConfigError if its vocabulary cannot hold the tokenizer's."""
    import models

    wanted, needed = config.model.vocab_size, tokenizer.vocab_size
    if wanted and wanted < needed:
        raise ConfigError(
            f"config.model.vocab_size = {wanted} is less than the tokenizer's {needed}: raise it, or set it to 0 to "
            "take the tokenizer's"
        )
    return Structure(lambda rngs: models.build(config.model, vocab_size=needed, rngs=rngs))


def build(config: ml_collections.ConfigDict, structure: Structure, layout: Layout, tokenizer: Any) -> Training:
    """Compiles nothing yet. Raises ConfigError for an unknown objective, rule, optimiser or schedule."""
    options = config.optimizer
    rate = optimizers.schedule(options, config.train.steps)
    optimizer = optimizers.build(options, rate, structure.axes)
    objective = objectives.get(config.objective.name)(_objective(config), layout)
    one = step.build(
        structure,
        objective,
        gradient_rules.get(options.gradient_rule)(options),
        optimizer,
        rate,
        options,
        layout,
    )

    def create(key: jax.Array) -> State:
        return state.create(structure, optimizer, key, average=options.ema_decay > 0)

    shapes = jax.eval_shape(create, jax.random.key(config.seed))
    places = layout.like(shapes, structure.abstract_params)
    abstract = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    compiled = jax.jit(one, donate_argnums=0, out_shardings=(places, layout.replicated()))
    frozen = getattr(objective, "frozen", None)
    return Training(
        structure=structure,
        layout=layout,
        abstract=abstract,
        init=jax.jit(create, out_shardings=places),
        step=compiled if frozen is None else (lambda state, batch: compiled(state, batch, frozen)),
        leaves=step.leaves(shapes.params),
        flops_per_token=functools.cache(lambda: account(config, tokenizer.vocab_size, layout).training_flops_per_token),
    )


def _objective(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`config.objective`, with the run that this one starts from for a reference where none is named."""
    options = config.objective.copy_and_resolve_references()
    with options.unlocked():
        options.reference = options.reference or config.train.init_from
    return options


def account(config: ml_collections.ConfigDict, vocab_size: int, layout: Layout) -> Any:
    """The `models.Account` of a run; nothing is allocated."""
    import models

    return models.account(
        config.model,
        vocab_size,
        length=config.data.length,
        batch=config.data.batch_size,
        optimizer=config.optimizer.name,
        parts=layout.parts(),
    )


def meta(config: ml_collections.ConfigDict, pipeline: Any, elapsed: float) -> dict[str, Any]:
    """What a checkpoint says about itself besides its arrays."""
    return {
        "config": fields.plain(config),
        "corpus": pipeline.corpus.hash,
        "tokenizer": pipeline.tokenizer.fingerprint,
        "elapsed": elapsed,
        "processes": jax.process_count(),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
    }


def bytes_per_device(abstract: State) -> int:
    """Bytes that one device holds of the state between steps."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(abstract))
