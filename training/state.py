"""What is trained: a plain pytree of arrays, and the structure that turns it back into a network."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Int

from sharding.layout import name_of

Arrays = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """Everything that a step changes. Parameters are flat dicts from dotted names to arrays.

    Attributes:
        step: optimiser steps done.
        halted: a step met a number that is not finite; from then on steps change nothing (see `training.step`).
        params: what is trained.
        rest: the network's other variables (running statistics, counters, constants).
        opt_state: optax's.
        ema: the running average of the parameters in float32, or nothing.
        rng: the key of the run; the key of a step is this one folded with `step`.
    """

    step: Int[Array, ""]
    halted: Bool[Array, ""]
    params: Arrays
    rest: Arrays
    opt_state: Any
    ema: Arrays
    rng: Array


class Structure:
    """The network without its numbers: made once from a constructor, without allocating anything."""

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]) -> None:
        self._build = build
        abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        self.graphdef, self.abstract_params, self.abstract_rest = nnx.split(abstract, nnx.Param, ...)
        self.axes = {
            name: tuple(variable.get_metadata().get("axes") or (None,) * variable.get_value().ndim)
            for name, variable in _variables(self.abstract_params).items()
        }

    def init(self, key: Array) -> tuple[Arrays, Arrays]:
        """(params, rest) of a network freshly drawn from `key`."""
        _, params, rest = nnx.split(self._build(nnx.Rngs(key)), nnx.Param, ...)
        return _flat(params), _flat(rest)

    def split(self, model: nnx.Module) -> tuple[Arrays, Arrays]:
        """(params, rest) of `model`, which must have this structure."""
        _, params, rest = nnx.split(model, nnx.Param, ...)
        return _flat(params), _flat(rest)

    def merge(self, params: Arrays, rest: Arrays) -> nnx.Module:
        """The network with these arrays in it."""
        return nnx.merge(self.graphdef, _like(self.abstract_params, params), _like(self.abstract_rest, rest))

    def abstract(self) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
        """(params, rest) as shapes."""
        return _flat(self.abstract_params), _flat(self.abstract_rest)


def create(structure: Structure, optimizer: optax.GradientTransformation, key: Array, *, average: bool) -> State:
    """The state before the first step; traceable, so that `jax.jit` can place it and `jax.eval_shape` describe it."""
    init_key, run_key = jax.random.split(key)
    params, rest = structure.init(init_key)
    return State(
        step=jnp.zeros((), jnp.int32),
        halted=jnp.zeros((), bool),
        params=params,
        rest=rest,
        opt_state=optimizer.init(params),
        ema={name: value.astype(jnp.float32) for name, value in params.items()} if average else {},
        rng=run_key,
    )


def evaluated(state: State) -> Arrays:
    """The parameters that evaluation and generation use: the average where there is one, in the stored dtype."""
    if not state.ema:
        return state.params
    return {name: value.astype(state.params[name].dtype) for name, value in state.ema.items()}


def _variables(state: nnx.State) -> dict[str, nnx.Variable]:
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {name_of(path): variable for path, variable in leaves}


def _flat(state: nnx.State) -> dict[str, Any]:
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _like(abstract: nnx.State, arrays: Arrays) -> nnx.State:
    """`abstract` with the arrays of those names for leaves."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    return jax.tree_util.tree_unflatten(treedef, [arrays[name_of(path)] for path, _ in paths])
