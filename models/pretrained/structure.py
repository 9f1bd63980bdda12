"""A network without its numbers, and where in it each tensor of a checkpoint goes."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from models.plan import layer_specs, segments
from models.pretrained.errors import PretrainedError
from models.pretrained.mapping import Mapped
from models.pretrained.reader import Entry

READABLE = tuple(map(np.dtype, (np.float64, np.float32, np.float16))) + (np.dtype(jax.numpy.bfloat16),)


class Place(NamedTuple):
    """Where one array of a `Mapped` is: a variable's dotted name, and the place inside it."""

    name: str
    at: tuple[int, ...]


class Structure:
    """The network of a `config.model`, and its tensors in a checkpoint.

    Attributes:
        definition, abstract: `nnx.split` of the network, with shapes for arrays.
        variables: abstract variables by dotted name.
        mapped: what the family's mapping says.
        shapes: of every tensor that it names.
    """

    def __init__(self, config: Mapping[str, Any], mapped: Sequence[Mapped]) -> None:
        import models

        self.definition, self.abstract = models.abstract(config, config["vocab_size"])
        flat = nnx.to_flat_state(self.abstract)
        self.variables = {".".join(map(str, path)): variable for path, variable in flat}
        self.vocab_size, self.mapped = config["vocab_size"], list(mapped)
        self._blocks = _blocks(config)
        self._known: dict[tuple[Callable, tuple[tuple[int, ...], ...]], tuple[tuple[int, ...], ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for one in self.mapped:
            self.shapes |= zip(one.theirs, self._theirs(one), strict=True)
        self._check_complete()

    def places(self, one: Mapped) -> list[Place]:
        """Where each of `one.ours` is."""
        if one.layer is None:
            return [Place(name, one.at) for name in one.ours]
        prefix, round_ = self._blocks[one.layer]
        return [Place(f"{prefix}.{name}", (round_, *one.at)) for name in one.ours]

    def shape(self, place: Place) -> tuple[int, ...]:
        """Of the array at a place, without the rows of tables that stand for no token."""
        variable = self.variables[place.name]
        shape = variable.get_value().shape
        axes = variable.get_metadata().get("axes") or (None,) * len(shape)
        cut = [self.vocab_size if axis == "vocab" else size for axis, size in zip(axes, shape, strict=True)]
        return tuple(cut[len(place.at) :])

    def dtype(self, place: Place) -> np.dtype:
        """Of the array at a place."""
        return np.dtype(self.variables[place.name].get_value().dtype)

    def check(self, entries: Mapping[str, Entry], ignored: Iterable[str], folder: Any) -> None:
        """PretrainedError, naming file and tensor, unless these are this network's tensors, all and no others."""
        unread = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
        for name, shape in self.shapes.items():
            if name not in entries:
                raise PretrainedError(f"{folder}: tensor {name} is missing, which config.json wants as {list(shape)}")
            entry = entries[name]
            if entry.shape != shape:
                raise PretrainedError(
                    f"{folder}/{entry.file}: tensor {name} is {list(entry.shape)}, but config.json wants {list(shape)}"
                )
            if entry.dtype not in READABLE:
                raise PretrainedError(f"{folder}/{entry.file}: tensor {name} is of type {entry.dtype}: not floating")
        for name in entries.keys() - self.shapes.keys():
            if not unread.fullmatch(name):
                file = entries[name].file
                raise PretrainedError(f"{folder}/{file}: tensor {name} is no part of the network of config.json")

    def _theirs(self, one: Mapped) -> tuple[tuple[int, ...], ...]:
        """The shapes of `one.theirs`: what `write` makes of arrays of our shapes that take no memory."""
        shapes = tuple(self.shape(place) for place in self.places(one))
        if (one.write, shapes) not in self._known:
            made = one.write(*(np.broadcast_to(np.zeros((), np.int8), shape) for shape in shapes))
            self._known[one.write, shapes] = tuple(array.shape for array in made)
        return self._known[one.write, shapes]

    def _check_complete(self) -> None:
        """A mapping must fill every parameter once; that it does not is a defect of the family."""
        filled: dict[str, int] = {}
        seen: set[Place] = set()
        for one in self.mapped:
            for place in self.places(one):
                if place.name not in self.variables or place in seen:
                    raise ValueError(f"the mapping fills {place} twice, or there is no such parameter")
                seen.add(place)
                filled[place.name] = filled.get(place.name, 0) + math.prod(self.shape(place))
        for name, variable in self.variables.items():
            needed = math.prod(self.shape(Place(name, ())))
            if isinstance(variable, nnx.Param) and filled.get(name, 0) != needed:
                raise ValueError(f"the mapping fills {filled.get(name, 0)} of the {needed} numbers of {name}")


def _blocks(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """For each layer, the dotted name of its block, and its row in the arrays there."""
    found = []
    for stack, (pattern, repeats) in enumerate(segments(layer_specs(config))):
        found += [(f"stacks.{stack}.blocks.{place}", row) for row in range(repeats) for place in range(len(pattern))]
    return found
