"""Mixtures of experts in checkpoints: one tensor per expert and matrix, or all experts of a layer in one."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models.pretrained.errors import PretrainedError
from models.pretrained.mapping import Mapped, matrix
from models.pretrained.reader import Entry, Source
from models.pretrained.settings import Settings

OURS = ("mlp.gate", "mlp.up", "mlp.down")  # [E, D, I], [E, D, I], [E, I, D].
_MOST = 1 << 20


def bounded(hf: Settings, name: str, count: int, depth: int) -> int:
    """`count`, if that many experts in each layer can be meant: a config.json is no reason to count for hours."""
    if count * depth > _MOST:
        hf.refuse(name, f"= {count} in {depth} layers are more than {_MOST} experts")
    return count


def mapping(layer: int, count: int, theirs: str, names: Sequence[str]) -> list[Mapped]:
    """The experts of one layer; `names` are what gate, up and down are called behind "<theirs>.<expert>."."""
    return [
        matrix(ours, f"{theirs}.{expert}.{name}.weight", layer, (expert,))
        for expert in range(count)
        for ours, name in zip(OURS, names, strict=True)
    ]


class Unfused:
    """A `Source` in which the experts of a layer, where they are stored as one tensor, are stored one by one.

    transformers keeps them so in memory, and in files if asked for its own format: `<block>.experts.gate_up_proj`
    [E, 2 I, D] (gate before up) and `<block>.experts.down_proj` [E, D, I]. Raises PretrainedError for an expert that is
    there in both forms.
    """

    def __init__(self, source: Source, names: Sequence[str]) -> None:
        self.source = source
        self.entries: dict[str, Entry] = {}
        self._places: dict[str, tuple[str, int, slice]] = {}
        gate, up, down = names
        for name, entry in source.entries.items():
            found = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
            experts, rows, _ = entry.shape if len(entry.shape) == 3 else (0, 0, 0)
            if found is None or not 0 < experts <= _MOST or (found[2] == "gate_up_proj" and rows % 2):
                self.entries[name] = entry  # Either no such tensor, or one that the network will have no place for.
                continue
            half = rows // 2
            cuts = {gate: slice(half), up: slice(half, rows)} if found[2] == "gate_up_proj" else {down: slice(rows)}
            for expert in range(experts):
                for part, cut in cuts.items():
                    single = f"{found[1]}.{expert}.{part}.weight"
                    if single in source.entries:
                        raise PretrainedError(f"{entry.file}: tensor {single} is there twice, once inside {name}")
                    self.entries[single] = entry._replace(shape=(cut.stop - (cut.start or 0), entry.shape[2]))
                    self._places[single] = name, expert, cut

    def read(self, name: str) -> np.ndarray:
        """A view of the tensor."""
        if name not in self._places:
            return self.source.read(name)
        whole, expert, cut = self._places[name]
        return self.source.read(whole)[expert, cut]

    def release(self, file: str) -> None:
        """Lets a file go."""
        self.source.release(file)


def unfused(source: Source, names: Sequence[str]) -> Source:
    """The tensors with every expert by itself."""
    whole = any(name.endswith((".experts.gate_up_proj", ".experts.down_proj")) for name in source.entries)
    return Unfused(source, names) if whole else source


def counts(specs: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many experts each layer has; 0 is a dense one."""
    return [spec["mlp"]["experts"]["count"] for spec in specs]
