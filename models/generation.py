"""Continuing prompts, batched and through the caches."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from kernels.tokens import Tokens, sequence
from layers.cache import Caches
from models.decoder import DecoderLM
from models.sampling import Sampling


def generate(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """New token ids for every prompt: prefill, then one cached step per token until all rows stopped.

    Prompts may differ in length. A row ends before the first id of `stop_ids`. `temperature` 0 is greedy; the other
    parameters are those of `models.sampling.Sampling`. A row's tokens depend on its prompt, its place in the batch and
    the seed only. Lengths are rounded up to powers of two inside, so that few programs are compiled.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, or more tokens than the model's max_length.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    longest = max((len(prompt) for prompt in prompts), default=0)
    _check(model, prompts, longest, max_new_tokens)
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    padded, steps = _bucket(longest), _bucket(max_new_tokens)
    ids = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    definition, state = nnx.split(model)
    stops = np.asarray(sorted(set(stop_ids)), np.int32)
    new = _generate(definition, sampling, steps, state, ids, lengths, stops, jax.random.key(seed), max_new_tokens)
    return [_until(row[:max_new_tokens], stops) for row in np.asarray(new).tolist()]


def prefill(model: DecoderLM, ids: Int[Array, "B T"], lengths: Int[Array, "B"], caches: Caches) -> tuple[Array, Caches]:
    """Logits [B, V] after the last token of each right-padded prompt, and the caches that hold the prompts."""
    index = sequence(ids.shape[1]).index
    tokens = Tokens(index=index, valid=jnp.asarray(index) < lengths[:, None])
    hidden, caches, _ = model.backbone(model.embedding(ids), tokens, caches)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return model.unembed(last)[:, 0], caches


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(definition, sampling: Sampling, steps: int, state, ids, lengths, stops, key, limit) -> Array:
    model = nnx.merge(definition, state).unstacked()
    batch = ids.shape[0]
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    logits, caches = prefill(model, ids, lengths, model.init_caches(batch, ids.shape[1] + steps))

    def choose(logits: Array, step: Array) -> Array:
        return sampling.draw(logits, jax.vmap(lambda row_key: jax.random.fold_in(row_key, step))(row_keys))

    def running(carry: tuple) -> Array:
        step, done, *_ = carry
        return (step < limit) & ~jnp.all(done)

    def advance(carry: tuple) -> tuple:
        step, done, logits, caches, new = carry
        token = choose(logits, step)
        done = done | jnp.isin(token, stops)
        new = new.at[:, step].set(token)
        tokens = Tokens(index=caches.length[:, None], valid=~done[:, None])
        out = model(token[:, None], tokens, caches)
        return step + 1, done, out.logits[:, 0], out.caches, new

    start = (jnp.int32(0), jnp.zeros((batch,), bool), logits, caches, jnp.zeros((batch, steps), jnp.int32))
    return jax.lax.while_loop(running, advance, start)[-1]


def _bucket(length: int, smallest: int = 16) -> int:
    return max(smallest, 1 << (length - 1).bit_length())


def _until(row: list[int], stops: np.ndarray) -> list[int]:
    ends = [place for place, token in enumerate(row) if token in stops]
    return row[: ends[0]] if ends else row


def _check(model: DecoderLM, prompts: Sequence[Sequence[int]], longest: int, new: int) -> None:
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: begin it with the tokenizer's bos id")
        if min(prompt) < 0 or max(prompt) >= model.vocab_size:
            raise ValueError(f"prompt {row} has an id outside the vocabulary of {model.vocab_size}")
    if new < 0:
        raise ValueError(f"max_new_tokens must be at least 0, but is {new}")
    if longest + new > model.setting.max_length:
        raise ValueError(
            f"{longest} prompt tokens and {new} new ones exceed the model's max_length {model.setting.max_length}"
        )
