"""One mechanism for looking into a network and for changing it while it runs.

A hook names a site inside every attention layer. An edit replaces the value there; a tap returns it through the
auxiliary outputs under "tap/<site>". Sites: `layer_input` [B, T, D]; `query_raw` and `query` [B, T, H, D] before and
after positions; `latent` [B, T, G, d] as it is cached, in layers that have latents; `scores` and `probabilities`
[B, H, T, S]; `gates` [B, T, H], what outputs of heads are multiplied by, in layers that weigh them; `heads`
[B, T, H, Dv] before the output projection.
Without hooks nothing is computed and no bit changes.
"""

import dataclasses
from collections.abc import Callable, Mapping

from jaxtyping import Array

from kernels.tokens import Tokens

SITES = ("layer_input", "query_raw", "query", "latent", "scores", "probabilities", "gates", "heads")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a hook is called: layer number, the tokens of the queries, and of the keys where there are keys."""

    layer: int
    tokens: Tokens
    keys: Tokens | None = None


@dataclasses.dataclass(frozen=True)
class Tap:
    """What to return of a site: only these layers, heads and query rows (None is all of them)."""

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None


Edit = Callable[[Array, Place], Array]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Edits and taps by site; `ValueError` for a site that does not exist."""

    edits: Mapping[str, Edit] = dataclasses.field(default_factory=dict)
    taps: Mapping[str, Tap] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in (*self.edits, *self.taps):
            if site not in SITES:
                raise ValueError(f"unknown hook site {site!r}: sites are {', '.join(SITES)}")

    def tapped(self, site: str, layer: int) -> Tap | None:
        """The tap of this site if it wants this layer."""
        tap = self.taps.get(site)
        return tap if tap is not None and (tap.layers is None or layer in tap.layers) else None


class LayerHooks:
    """The hooks of one layer during one call; collects what its taps return in `taken`."""

    def __init__(self, hooks: Hooks | None, layer: int, tokens: Tokens) -> None:
        self.hooks, self.layer, self.tokens = hooks, layer, tokens
        self.taken: dict[str, Array] = {}

    def edits(self, site: str) -> bool:
        """Whether an edit is set at this site."""
        return self.hooks is not None and site in self.hooks.edits

    def tap(self, site: str) -> Tap | None:
        """The tap set at this site for this layer."""
        return None if self.hooks is None else self.hooks.tapped(site, self.layer)

    def edit(self, site: str, value: Array, keys: Tokens | None = None) -> Array:
        """The value after the edit of this site."""
        return self.hooks.edits[site](value, Place(self.layer, self.tokens, keys)) if self.edits(site) else value

    def __call__(self, site: str, value: Array) -> Array:
        """Edits, then taps, a value laid out [B, T, ...] or [B, T, H, ...]."""
        if self.hooks is None:
            return value
        value = self.edit(site, value)
        if (tap := self.tap(site)) is not None:
            self.taken[f"tap/{site}"] = _select(value, tap)
        return value


def _select(value: Array, tap: Tap) -> Array:
    if tap.rows is not None:
        value = value[:, list(tap.rows)]
    if tap.heads is not None and value.ndim == 4:
        value = value[:, :, list(tap.heads)]
    return value
