"""What a token sees through each kind of layer of a model: its mask or, where there is none, its measured influence."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Float

from kernels.tokens import sequence

LONGEST = 256  # Side of a picture of a mask, tokens.
MEASURED = 64  # Side of a picture of measured influence.


@dataclasses.dataclass(frozen=True)
class View:
    """Strength [T, S] from 0 to 1 with which query row t sees key column s, for some layers of a model."""

    layers: tuple[int, ...]
    strength: Float[np.ndarray, "T S"]
    measured: bool  # False: the layer's declared mask; True: see `influence`.


def views(model: ml_collections.ConfigDict, length: int) -> list[View]:
    """One view per distinct attention of `config.model`, in the order of layers, over `length` tokens at most."""
    from layers.setting import Setting
    from models.decoder import Block
    from models.plan import layer_specs

    setting = Setting(width=model.width, depth=model.depth, max_length=model.max_length)
    specs = layer_specs(model)
    kinds: list[tuple[dict, list[int]]] = []
    for index, spec in enumerate(specs):
        for known, members in kinds:
            if known["attention"] == spec["attention"]:
                members.append(index)
                break
        else:
            kinds.append((spec, [index]))
    found = []
    for spec, members in kinds:

        def build(spec: dict = spec, index: int = members[0]) -> nnx.Module:
            return Block(setting, spec, layer_index=index, rngs=nnx.Rngs(0)).attention

        mask = getattr(nnx.eval_shape(build), "mask", None)
        if mask is None:
            strength = influence(build(), setting.width, min(length, MEASURED))
        else:
            tokens = sequence(min(length, LONGEST))
            allowed = np.asarray(mask.allowed(tokens, tokens))[0].mean(axis=0)  # A share, where heads differ.
            strength = np.broadcast_to(allowed, (tokens.length, tokens.length)).astype(np.float64)
        found.append(View(tuple(members), strength, mask is None))
    return found


def influence(
    layer: nnx.Module, width: int, length: int, *, inputs: int = 4, seed: int = 0
) -> Float[np.ndarray, "T T"]:
    """How far out_t moves when x_s is exchanged for another token, [T, S]; rows over their maximum.

    The root mean square over `inputs` random sequences. Forward passes only: compiling a gradient would take seconds.
    """
    key_x, key_other = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(key_x, (inputs, 1, length, width))
    other = jax.random.normal(key_other, (inputs, 1, length, width))
    exchanged = jnp.where(jnp.eye(length, dtype=bool)[None, :, :, None], other, x)  # [inputs, S, T, D]
    run = jax.jit(
        lambda x: layer(x.reshape(-1, length, width), sequence(length)).out.reshape(inputs, -1, length, width)
    )
    moved = np.asarray(run(exchanged), np.float64) - np.asarray(run(jnp.broadcast_to(x, exchanged.shape)), np.float64)
    strength = np.sqrt(np.square(moved).mean(axis=(0, -1))).T
    return strength / np.maximum(strength.max(axis=1, keepdims=True), 1e-30)
