"""What a network's latents are like on some text: their second moments, and how well slices of them predict logits."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from layers.hooks import Hooks, Tap
from models.conversion.latent import LatentWeights
from models.decoder import DecoderLM

_ROWS_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over tokens of one layer's latent as it is cached."""

    count: int
    total: Float[np.ndarray, " d"]
    squares: Float[np.ndarray, "d d"]

    def second(self, center: bool) -> Float[np.ndarray, "d d"]:
        """The mean of c^T c, about the mean of c if `center`."""
        mean = self.total / self.count
        return self.squares / self.count - (np.outer(mean, mean) if center else 0)


def tapped(
    model: DecoderLM, ids: Int[np.ndarray, "N T"], sites: Sequence[str], progress: Callable[[int, int], None] | None
) -> Iterator[dict[str, np.ndarray]]:
    """What layers return at `sites` for a few rows at a time: "tap/<site>/<layer>" -> [rows, T, ...]."""
    definition, state = nnx.split(model)
    for first in range(0, len(ids), _ROWS_AT_ONCE):
        aux = _taps(definition, tuple(sites), state, jnp.asarray(ids[first : first + _ROWS_AT_ONCE]))
        yield {key: np.asarray(value) for key, value in aux.items() if key.startswith("tap/")}
        if progress is not None:
            progress(min(first + _ROWS_AT_ONCE, len(ids)), len(ids))


@functools.partial(jax.jit, static_argnums=(0, 1))  # Networks of one structure share what is compiled.
def _taps(definition: nnx.GraphDef, sites: tuple[str, ...], state: nnx.State, ids: jax.Array) -> dict[str, jax.Array]:
    hooks = Hooks(taps={site: Tap() for site in sites})
    return nnx.merge(definition, state)(ids, None, None, hooks).aux


def moments(
    model: DecoderLM,
    ids: Int[np.ndarray, "N T"],
    layers: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, Moments]:
    """The moments of the cached latents of these layers over all tokens of `ids`."""
    sums: dict[int, Moments] = {}
    for taps in tapped(model, ids, ("latent",), progress):
        for layer in layers:
            latent = taps[f"tap/latent/{layer}"].astype(np.float64)
            latent = latent.reshape(-1, latent.shape[-2] * latent.shape[-1])
            own = Moments(len(latent), latent.sum(0), latent.T @ latent)
            before = sums.get(layer)
            if before is not None:
                own = Moments(before.count + own.count, before.total + own.total, before.squares + own.squares)
            sums[layer] = own
    return sums


def normalised_slices(
    latent: Float[np.ndarray, "T d"], factors: Float[np.ndarray, " g"], epsilon: float
) -> Float[np.ndarray, "T d"]:
    """Latents that the whole norm has normalised, as the norm of each slice would have them.

    `epsilon` of the norm is inside the root beside the mean square m of the raw latent, which is gone here; but the
    mean square of what is left is m / (m + epsilon), so that epsilon / (m + epsilon) is 1 less that.
    """
    width = latent.shape[-1]
    share = np.maximum(1 - np.mean(latent**2, axis=-1, keepdims=True), epsilon * 1e-3)

    def normalised(part: np.ndarray, factor: float) -> np.ndarray:
        return part / np.sqrt(factor / width * np.sum(part**2, axis=-1, keepdims=True) + share)

    slices = np.split(latent, len(factors), axis=-1)
    return np.concatenate([normalised(*each) for each in zip(slices, factors, strict=True)], axis=-1)


def least_squares_factors(
    content: Float[np.ndarray, "T h n"],
    latent: Float[np.ndarray, "T d"],
    local: Float[np.ndarray, "T d"],
    weights: LatentWeights,
    slices: int,
) -> tuple[Float[np.ndarray, " g"], Float[np.ndarray, " g"]]:
    """Over one row of text: for each slice, the sums of (whole logit x slice's logit) and of (slice's logit)^2.

    Whole logits are those of `content` queries with the `latent`, a slice's those with its channels of `local`; both
    less their mean over the keys that a query sees, which a softmax does not notice. The quotient of the sums over
    all rows is the factor of the slice (our reading of the paper's mu; "lsq" in `convert_to_tpla`).
    """
    absorbed = np.einsum("thn,dhn->htd", content, weights.key_up)
    seen = np.tril(np.ones((len(latent), len(latent))))
    counts = seen.sum(1, keepdims=True)

    def logits(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        scores = (queries @ keys.T) * seen
        return (scores - scores.sum(-1, keepdims=True) / counts) * seen

    whole = logits(absorbed, latent)
    both, own = np.zeros(slices), np.zeros(slices)
    for j, (queries, keys) in enumerate(
        zip(np.split(absorbed, slices, axis=-1), np.split(local, slices, axis=-1), strict=True)
    ):
        part = logits(queries, keys)
        both[j], own[j] = np.sum(whole * part), np.sum(part * part)
    return both, own
