"""A network small enough for tests of the loop: the contract of `models.DecoderLM`, two matrices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels.tokens import Tokens
from training.state import Structure

VOCABULARY = 11


class Output(NamedTuple):
    logits: jax.Array
    caches: Any
    aux: dict[str, jax.Array]


class Standin(nnx.Module):
    """Logits from an embedding and a gated gain, with a counter among its other variables."""

    def __init__(self, rngs: nnx.Rngs, *, width: int = 6, auxiliary: float = 0.0) -> None:
        self.vocab_size, self.auxiliary = VOCABULARY, auxiliary
        self.table = nnx.Param(scattered((VOCABULARY, width), 1.1), axes=("vocab", "embed"))
        self.inner = nnx.Param(scattered((2, width, width), 1.7), axes=("layers", "embed", "mlp"))
        self.gain = nnx.Param(jnp.ones((2, width)), axes=("layers", None))
        self.head = nnx.Param(scattered((width, VOCABULARY), 2.3), axes=("embed", "vocab"))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, ids: jax.Array, tokens: Tokens | None = None, caches: Any = None, hooks: Any = None) -> Output:
        x = self.table[...][ids]
        for matrix, gain in zip(self.inner[...], self.gain[...], strict=True):
            x = x + gain * jnp.tanh(x @ matrix)
        self.calls[...] += 1
        aux = {"loss/balance": self.auxiliary * jnp.mean(jnp.square(x)), "tap/0": x} if self.auxiliary else {}
        return Output(x @ self.head[...], None, aux)


def scattered(shape: tuple[int, ...], stride: float) -> jax.Array:
    """Numbers as good as drawn, without the second that it takes to compile a generator."""
    return 0.7 * jnp.cos(stride * stride * jnp.arange(np.prod(shape))).reshape(shape)


def structure(**options: Any) -> Structure:
    return Structure(lambda rngs: Standin(rngs, **options))


def batch(rows: int = 4, length: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    """Random ids; the rows have different numbers of weighted tokens, as padding makes them."""
    rng = np.random.default_rng(seed)
    weight = (rng.random((rows, length)) < np.linspace(0.3, 1.0, rows)[:, None]).astype(np.float32)
    weight[:, 0] = 1
    return {
        "inputs": rng.integers(0, VOCABULARY, (rows, length)).astype(np.int32),
        "targets": rng.integers(0, VOCABULARY, (rows, length)).astype(np.int32),
        "segment": np.ones((rows, length), np.int32),
        "position": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "weight": weight,
    }
