"""What each stage of a conversion cost: the distance of its logits from the original's, and its perplexity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from kernels.tokens import sequence
from models.decoder import DecoderLM

_ROWS_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a conversion, on the text it was measured on.

    Attributes:
        name: of the stage.
        logit_distance: root mean square of the difference of log-probabilities from the original's.
        divergence: mean over tokens of KL(original || stage), nats.
        perplexity: exp of the mean negative log-likelihood per token.
    """

    name: str
    logit_distance: float
    divergence: float
    perplexity: float


@dataclasses.dataclass(frozen=True)
class Report:
    """A conversion stage by stage.

    Attributes:
        options: what was asked for.
        stages: the original first.
        spectra: share of the latent's energy in each channel after the rotation, per layer; () for layers without.
        energies: share of each slice, per layer.
        norm_factors, logit_factors: alpha and mu of each slice, per layer.
        found: what the conversion chose itself, by name.
    """

    options: dict[str, object]
    stages: tuple[Stage, ...]
    spectra: tuple[tuple[float, ...], ...] = ()
    energies: tuple[tuple[float, ...], ...] = ()
    norm_factors: tuple[tuple[float, ...], ...] = ()
    logit_factors: tuple[tuple[float, ...], ...] = ()
    found: dict[str, object] = dataclasses.field(default_factory=dict)

    def table(self) -> str:
        """The stages as lines of text."""
        lines = [f"{'stage':24}{'logit distance':>16}{'KL, nats':>12}{'perplexity':>12}"]
        lines += [
            f"{stage.name:24}{stage.logit_distance:16.3e}{stage.divergence:12.3e}{stage.perplexity:12.4f}"
            for stage in self.stages
        ]
        return "\n".join(lines)


def log_probabilities(model: DecoderLM, ids: Int[np.ndarray, "N T"], *, split: int = 0) -> Float[np.ndarray, "N T-1 V"]:
    """Log-probabilities of what follows each token but the last, float32; float64 where the model computes in it.

    `split`: so many first tokens are a prompt that fills caches, and the others attend to these; 0 is one full pass.
    """
    definition, state = nnx.split(model)
    rows = [jnp.asarray(ids[i : i + _ROWS_AT_ONCE]) for i in range(0, len(ids), _ROWS_AT_ONCE)]
    return np.concatenate([np.asarray(_log_probabilities(definition, split, state, some)) for some in rows])


@functools.partial(jax.jit, static_argnums=(0, 1))  # Networks of one structure share what is compiled.
def _log_probabilities(definition: nnx.GraphDef, split: int, state: nnx.State, ids: jax.Array) -> jax.Array:
    model = nnx.merge(definition, state)
    if not split:
        return jax.nn.log_softmax(model(ids).logits[:, :-1, : model.vocab_size])
    prompt, caches, _ = model(ids[:, :split], sequence(split), model.init_caches(*ids.shape))
    rest, _, _ = model(ids[:, split:], None, caches)
    return jax.nn.log_softmax(jnp.concatenate([prompt, rest], axis=1)[:, :-1, : model.vocab_size])


def measured(
    name: str,
    found: Float[np.ndarray, "N T V"],
    original: Float[np.ndarray, "N T V"],
    ids: Int[np.ndarray, "N T"],
    first: int = 0,
) -> Stage:
    """A stage by its log-probabilities; tokens before place `first` are not counted."""
    found, original, targets = found[:, first:], original[:, first:], ids[:, first + 1 :]
    distance = float(np.sqrt(np.mean((found - original).astype(np.float64) ** 2)))
    divergence = float(np.mean(np.sum(np.exp(original) * (original - found), axis=-1, dtype=np.float64)))
    chosen = np.take_along_axis(found, targets[..., None], axis=-1)[..., 0]
    return Stage(name, distance, divergence, float(np.exp(-np.mean(chosen, dtype=np.float64))))


def plain(report: Report) -> dict[str, object]:
    """The report as JSON holds it."""
    return dataclasses.asdict(report)
