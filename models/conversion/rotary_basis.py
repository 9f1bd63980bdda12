"""Bases of the keys of all heads together that rotary positions do not notice, or hardly (TransMLA, arXiv 2502.07864).

The keys of g heads of d channels, side by side, are one key of g d channels; its pair (head, j) turns with frequency j.
An orthogonal matrix that mixes pairs of one frequency over the heads, the same for both channels of a pair, commutes
with the positions: RoRoPE. FreqFold treats a few adjacent frequencies as one.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from models.conversion.latent import ConversionError


def pairs(head_dim: int, layout: str) -> Int[np.ndarray, "2 j"]:
    """The two channels of a head that turn with each frequency."""
    half = np.arange(head_dim // 2)
    return np.stack([half, half + head_dim // 2] if layout == "half" else [2 * half, 2 * half + 1])


def pair_energy(keys: Float[np.ndarray, "N L"], heads: int, layout: str) -> Float[np.ndarray, "P P"]:
    """Sum over tokens of re^T re + im^T im, where pair (head, j) is number head d/2 + j."""
    split = keys.reshape(len(keys), heads, -1)[:, :, pairs(keys.shape[1] // heads, layout)]  # [N, heads, 2, d/2]
    re, im = (split[:, :, part].reshape(len(keys), -1) for part in (0, 1))
    return re.T @ re + im.T @ im


@dataclasses.dataclass(frozen=True)
class Fold:
    """How pairs are grouped, mixed and ordered.

    Group i holds frequencies i F .. (i+1) F - 1 of every head: F g pairs, in the order (c, head, a) with frequency
    i F + a C + c. After mixing, the strongest first, pair number p of a group takes the place and the frequency of the
    p-th of that order; and pairs are laid out as (c, head, i, a), their two channels adjacent. So the first d / C
    channels hold the F / C strongest pairs of every group, whose frequencies are every C-th of the original ones: those
    of a rotary width d / C with the same theta.

    Attributes:
        heads, head_dim: g, d.
        layout: of the pairs in the keys as they are: "half" or "interleaved".
        freqfold, collapse: F, C. Exact for F = 1.
    """

    heads: int
    head_dim: int
    layout: str = "half"
    freqfold: int = 1
    collapse: int = 1

    def __post_init__(self) -> None:
        half = self.head_dim // 2
        if self.freqfold < 1 or self.collapse < 1 or half % self.freqfold:
            raise ConversionError(f"freqfold {self.freqfold} does not divide the {half} frequencies of a head")
        if self.freqfold % self.collapse:
            raise ConversionError(f"freqfold {self.freqfold} is no multiple of collapse {self.collapse}")

    @property
    def order(self) -> Int[np.ndarray, "G n 3"]:
        """For each group its pairs as (c, head, a)."""
        shape = (self.collapse, self.heads, self.freqfold // self.collapse)
        return np.moveaxis(np.indices(shape).reshape(3, -1), 0, -1)

    def members(self) -> Int[np.ndarray, "G n"]:
        """The numbers (head d/2 + j) of each group's pairs."""
        c, head, a = self.order.T
        group = np.arange(self.head_dim // 2 // self.freqfold)[:, None]
        return head * (self.head_dim // 2) + group * self.freqfold + a * self.collapse + c

    def places(self) -> Int[np.ndarray, "G n"]:
        """Where each of them goes, counted in pairs."""
        c, head, a = self.order.T
        groups, each = self.head_dim // 2 // self.freqfold, self.freqfold // self.collapse
        return ((c * self.heads + head) * groups + np.arange(groups)[:, None]) * each + a

    def frequencies(self, of_head: Float[np.ndarray, " j"]) -> Float[np.ndarray, " P"]:
        """Of the pairs in their new order, from those of one head."""
        found = np.empty(self.heads * self.head_dim // 2)
        found[self.places()] = of_head[self.members() % (self.head_dim // 2)]
        return found

    def mixing(self, energy: Float[np.ndarray, "P P"]) -> Float[np.ndarray, "G n n"]:
        """The principal directions of each group as columns, the strongest first, from `pair_energy`. (The published
        code adds a hundredth of the mean to the diagonal, which changes no eigenvector.)"""
        members = self.members()
        return np.linalg.eigh(energy[members[:, :, None], members[:, None, :]])[1][..., ::-1]

    def basis(self, mixing: Float[np.ndarray, "G n n"] | None = None) -> Float[np.ndarray, "L L"]:
        """The orthogonal matrix that makes new keys of old ones, as rows times it; None: only reorders."""
        width = self.heads * self.head_dim
        channels = pairs(self.head_dim, self.layout)
        result = np.zeros((width, width))
        for i, (old, new) in enumerate(zip(self.members(), self.places(), strict=True)):
            matrix = np.eye(len(old)) if mixing is None else mixing[i]
            head, j = np.divmod(old, self.head_dim // 2)
            for part in (0, 1):
                result[np.ix_(head * self.head_dim + channels[part][j], 2 * new + part)] = matrix
        return result


def strongest_first(
    strength: Float[np.ndarray, " P"], heads: int, kept: int, *, each_head: bool
) -> Int[np.ndarray, " P"]:
    """An order of pairs that puts the `kept` strongest first; with `each_head` equally many of every head."""
    if not each_head:
        return np.argsort(-strength, kind="stable")
    if kept % heads:
        raise ConversionError(f"{kept} pairs are not the same number of each of {heads} heads")
    ranked = np.argsort(-strength.reshape(heads, -1), axis=1, kind="stable")
    numbers = ranked + np.arange(heads)[:, None] * ranked.shape[1]
    return np.concatenate([numbers[:, : kept // heads].ravel(), numbers[:, kept // heads :].ravel()])
