"""The weights of the small networks that goldens were recorded with, made from names alone so that none are kept."""

import hashlib

import numpy as np


def weight(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """float32; matrices keep the size of what they multiply, gains lie about 1, biases are small."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    drawn = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little"))).standard_normal(shape)
    if len(shape) == 1:
        drawn = 0.3 * drawn + (1 if name.endswith("norm.weight") else 0)
    else:
        drawn = drawn / np.sqrt(shape[-1])
    return drawn.astype(np.float32)


def tokens(vocab_size: int, rows: int, length: int, seed: int = 0) -> np.ndarray:
    """int32 [rows, length]."""
    return np.random.default_rng(seed).integers(0, vocab_size, (rows, length)).astype(np.int32)
