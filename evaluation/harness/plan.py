"""Which requests share a forward pass, and in which shapes they run: plain Python, before anything is compiled."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from evaluation.contract import EvaluationError

SHORTEST = 16  # Smallest padded length.
TOKENS = 16_384  # Padded tokens of a batch whose number of rows is "auto".
COMPILING = 65_536  # Padded tokens that are worth a compilation: shapes that differ by less become one.
MOST = 8  # Programs of one kind that are compiled at most.
WORTH = 0.7  # A context is shared where that leaves at most this share of the tokens: benchmarks/harness_throughput.py

Ids = tuple[int, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """Continuations of one context; `asked[i]` are the requests that ask for `continuations[i]`."""

    context: Ids
    continuations: tuple[Ids, ...]
    asked: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest continuation."""
        return max(map(len, self.continuations))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Members (groups, prompts: by index) that run together: `rows` rows of `shape`, the last ones perhaps empty."""

    shape: Shape
    rows: int
    members: tuple[int, ...]


def groups(requests: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int) -> list[Group]:
    """The requests (context, continuation) by context, each cut from the left to what the model takes.

    The input of a request is `(context + continuation)[-(max_length + 1):][:-1]`, as in lm-evaluation-harness.
    Continuations of one context stay together where sharing it is worth it, as many as most contexts have; equal
    requests are computed once.

    Raises:
        EvaluationError: an empty context or continuation, or a continuation longer than the model takes.
    """
    by_context: dict[Ids, dict[Ids, list[int]]] = {}
    for number, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise EvaluationError(f"request {number} has an empty {'continuation' if context else 'context'}")
        if len(continuation) > max_length:
            raise EvaluationError(
                f"request {number} has a continuation of {len(continuation)} tokens, the model takes {max_length}"
            )
        kept = tuple(context[-(max_length + 1 - len(continuation)) :])
        by_context.setdefault(kept, {}).setdefault(tuple(continuation), []).append(number)
    alone, shared = [], []
    for context, asked in by_context.items():
        whole = Group(context, tuple(asked), tuple(map(tuple, asked.values())))
        if _shares(whole):
            shared.append(whole)
        else:
            alone += _parts(whole, 1)
    sizes = collections.Counter(len(group.continuations) for group in shared)
    usual = sizes.most_common(1)[0][0] if sizes else 1
    return alone + [part for group in shared for part in _parts(group, usual)]


def _shares(group: Group) -> bool:
    rest = sum(len(ids) - 1 for ids in group.continuations)
    apart = len(group.context) * len(group.continuations) + rest
    return len(group.continuations) > 1 and (group.longest == 1 or len(group.context) + rest <= WORTH * apart)


def _parts(group: Group, most: int) -> list[Group]:
    """The group in parts of at most `most` continuations."""
    cuts = [slice(start, start + most) for start in range(0, len(group.continuations), most)]
    return [Group(group.context, group.continuations[cut], group.asked[cut]) for cut in cuts]


def ladder(length: int, longest: int) -> int:
    """The padded length of `length`: a power of two or one and a half of one, from 16 up to `longest`."""
    size = SHORTEST
    while size < length:
        step = size * 3 // 2
        size = step if step >= length else size * 2
    return min(size, max(longest, length))


def batches(
    shapes: Sequence[Shape], costs: Sequence[int], *, batch_size: int, parts: int = 1, copies: int = 1
) -> list[Batch]:
    """Batches of members of the given shapes, the long ones first, in at most MOST shapes.

    The tokens of a row are the sum of its shape, each number times its `costs`. Two shapes become their elementwise
    maximum while there are more than MOST, or where the padding this adds is less than a compilation is worth.
    Every batch of a shape has the same number of rows, a multiple of `parts`: `batch_size`, or with 0 as many as make
    TOKENS where each is held `copies` times, and never more than there are members.
    """
    members: dict[Shape, list[int]] = {}
    for index, shape in enumerate(shapes):
        members.setdefault(shape, []).append(index)

    def tokens(shape: Shape) -> int:
        return sum(size * cost for size, cost in zip(shape, costs, strict=True))

    while len(members) > 1:
        known = list(members)
        sizes, counts = np.array(known), np.array([len(members[shape]) for shape in known])
        joined = np.maximum(sizes[:, None], sizes) @ np.array(costs)
        added = (joined - (sizes @ np.array(costs))[:, None]) * counts[:, None]
        added = added + added.T + np.diag([np.iinfo(np.int64).max // 4] * len(known))
        a, b = np.unravel_index(np.argmin(added), added.shape)
        if added[a, b] > COMPILING and len(members) <= MOST:
            break
        shape = tuple(map(max, known[a], known[b]))
        both = members.pop(known[a]) + members.pop(known[b])
        members[shape] = sorted(members.get(shape, []) + both)
    made = []
    for shape in sorted(members, key=tokens, reverse=True):
        rows = min(batch_size or max(1, TOKENS // (copies * sum(shape))), len(members[shape]))
        rows = -(-rows // parts) * parts
        for start in range(0, len(members[shape]), rows):
            made.append(Batch(shape, rows, tuple(members[shape][start : start + rows])))
    return made
