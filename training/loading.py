"""A run folder as a network that can be used: for evaluation, notebooks, and runs that start from another's weights."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

import data
import sharding
from configs.errors import nearest
from training import checkpoints, manifest, run_folder, setup, state
from training.checkpoints import CheckpointError
from training.state import State, Structure


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """What a run folder holds at one step; `model` has the averaged weights where the run keeps an average."""

    config: ml_collections.ConfigDict
    model: Any
    tokenizer: Any
    step: int
    layout: sharding.Layout


def load_run(
    run_dir: str | os.PathLike[str], step: int | None = None, *, layout: sharding.Layout | None = None
) -> LoadedRun:
    """The run in `run_dir` at `step`, or at its newest sound checkpoint; placed by `layout`, else as its config says.

    Nothing is written. Raises RunFolderError if it is no run folder, CheckpointError if the step is missing or damaged.
    """
    folder = pathlib.Path(run_dir)
    config = run_folder.read_config(folder)
    tokenizer = data.load_tokenizer(folder / "tokenizer")
    layout = layout or sharding.build(config.sharding)
    structure = setup.network(config, tokenizer)
    found = weights(folder, step, structure, layout, average=config.optimizer.ema_decay > 0)
    model = structure.merge(state.evaluated(found), found.rest)
    return LoadedRun(config, model, tokenizer, int(found.step), layout)


def weights(
    folder: pathlib.Path, step: int | None, structure: Structure, layout: sharding.Layout, *, average: bool
) -> State:
    """The state of the run in `folder` without its optimiser's part."""
    found = folder / "checkpoints" / str(sound_step(folder, step))
    params, rest = structure.abstract()
    ema = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in params.items()} if average else {}
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes: Any = State(_scalar(jnp.int32), _scalar(bool), params, rest, None, ema, key)  # type: ignore[arg-type]
    places = layout.like(shapes, structure.abstract_params)
    abstract = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    return checkpoints.read(found, abstract).state


def sound_step(folder: pathlib.Path, step: int | None = None) -> int:
    """`step` if its checkpoint holds, or the newest step whose checkpoint does; CheckpointError if there is none."""
    place = folder / "checkpoints"
    steps = checkpoints.steps(place)
    if not steps:
        raise CheckpointError(f"{folder} has no checkpoint: its run saved none yet")
    if step is not None and step not in steps:
        near = nearest(str(step), map(str, steps)) or [str(steps[-1])]
        raise CheckpointError(f"{folder} has no checkpoint of step {step}: did you mean {' or '.join(near)}?")
    problems = []
    for candidate in reversed(steps) if step is None else [step]:
        problem = manifest.problem(place / str(candidate))
        if problem is None:
            return candidate
        problems.append(f"checkpoint {candidate}: {problem}")
    raise CheckpointError(f"{folder} has no sound checkpoint ({'; '.join(problems)})")


def start_from(run_dir: str, own: State, structure: Structure, layout: sharding.Layout) -> State:
    """`own`, a fresh state, with the weights (the average, where there is one) of the run in `run_dir`."""
    folder = pathlib.Path(run_dir)
    average = run_folder.read_config(folder).optimizer.ema_decay > 0
    found = weights(folder, None, structure, layout, average=average)
    params: Mapping[str, jax.Array] = state.evaluated(found)
    # Copies, because a step gives its state's buffers away and no two of its parts may share one.
    ema = {name: jnp.array(params[name], jnp.float32, copy=True) for name in own.ema}
    return dataclasses.replace(own, params=dict(params), rest=found.rest, ema=ema)


def _scalar(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype)
