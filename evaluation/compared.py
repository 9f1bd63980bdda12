"""Runs put side by side: what each costs, which are the same but for the seed, and the colour each has on a page."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence

import numpy as np

from configs import fields
from evaluation.runs import Run

PLAIN = ("name", "run_dir", "seed")  # Fields in which runs of one variant may differ.


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run's model costs; None where it cannot be told."""

    parameters: float | None = None
    training_flops: float | None = None
    forward_flops: float | None = None
    cache_bytes: float | None = None
    throughput: float | None = None


@dataclasses.dataclass(frozen=True)
class Variant:
    """Runs of one config but for the seed."""

    name: str
    members: tuple[int, ...]  # Places among the runs.


@dataclasses.dataclass(frozen=True)
class Compared:
    """Runs with what is derived from them; variants are in the order of their first runs."""

    runs: Sequence[Run]

    @functools.cached_property
    def costs(self) -> list[Cost]:
        """One per run; runs of one variant share the account of its model."""
        accounts: dict[str, Cost] = {}
        found = []
        for run in self.runs:
            key = json.dumps([fields.plain(run.config.model), run.config.data.length], sort_keys=True)
            if key not in accounts:
                accounts[key] = cost(run)
            found.append(dataclasses.replace(accounts[key], throughput=throughput(run)))
        return found

    @functools.cached_property
    def variants(self) -> list[Variant]:
        """Runs grouped by their configs without PLAIN."""
        groups: dict[str, list[int]] = {}
        for index, run in enumerate(self.runs):
            flat = {name: value for name, value in fields.flat(run.config).items() if name not in PLAIN}
            groups.setdefault(json.dumps(flat, sort_keys=True, default=str), []).append(index)
        return [Variant(self._name(members), tuple(members)) for members in groups.values()]

    @functools.cached_property
    def series(self) -> list[int]:
        """The number of each run's colour: that of its variant."""
        colours = [0] * len(self.runs)
        for number, variant in enumerate(self.variants):
            for index in variant.members:
                colours[index] = number
        return colours

    @property
    def seeded(self) -> bool:
        """Whether some variant has runs of several seeds."""
        return any(len(variant.members) > 1 for variant in self.variants)

    @property
    def first_of_each(self) -> list[int]:
        """The place of each variant's first run."""
        return [variant.members[0] for variant in self.variants]

    def heldout(self, index: int) -> tuple[float, float | None] | None:
        """Held-out bits per byte of a run, with its error."""
        return self.runs[index].metric("heldout", "bits_per_byte")

    def _name(self, members: Sequence[int]) -> str:
        names = [self.runs[index].name for index in members]
        own = {self.runs[index].config.get("name", "") for index in members}
        if len(names) > 1 and len(own) == 1:
            return own.pop()
        return os.path.commonprefix(names).rstrip(",=-_ 0123456789").removesuffix("seed").rstrip(",-_ ") or names[0]


def cost(run: Run) -> Cost:
    """Parameters, FLOPs and cache by the model's own account, and the measured tokens per second."""
    import models

    vocabulary = _vocabulary(run)
    if vocabulary is None:
        return Cost(parameters=run.described.get("parameters"), throughput=throughput(run))
    account = models.account(run.config.model, vocabulary, length=run.config.data.length)
    return Cost(
        parameters=account.parameters,
        training_flops=account.training_flops_per_token,
        forward_flops=account.forward_flops_per_token,
        cache_bytes=account.cache_bytes_per_token,
        throughput=throughput(run),
    )


def throughput(run: Run) -> float | None:
    """Median tokens per second, without the first fifth of the lines, which holds compilation."""
    speed = run.series("tokens_per_second")[1]
    return float(np.median(speed[len(speed) // 5 :])) if len(speed) else None


def _vocabulary(run: Run) -> int | None:
    if run.config.model.vocab_size:
        return run.config.model.vocab_size
    if run.described.get("vocab_size"):
        return run.described["vocab_size"]
    if (run.folder / "tokenizer").exists():
        import data

        return data.load_tokenizer(str(run.folder / "tokenizer")).vocab_size
    return None
