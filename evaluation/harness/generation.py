"""Texts continued until a stop string: prefill, then a few cached steps at a time between looks at the text."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from evaluation.completion import cut
from evaluation.harness import plan
from evaluation.harness.forward import Device, whole
from kernels.tokens import Tokens
from layers.cache import Caches
from models.generation import prefill
from models.sampling import Sampling

STEPS = 16  # Tokens between two looks.


class TextGenerator:
    """Continues prompts of ids in batches of few shapes, each row until it ends, its text holds a stop string, or its
    tokens are spent.

    A row's tokens are those of `models.generate` for a prompt at place `numbers[i]` with the same seed, whatever else
    is in its batch.
    """

    def __init__(self, device: Device, tokenizer: Any, *, batch_size: int) -> None:
        self.device, self.tokenizer, self.batch_size = device, tokenizer, batch_size

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        limits: Sequence[int],
        until: Sequence[Sequence[str]],
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, str]]:
        """(which prompt, its text), as they are found: at most `limits[i]` tokens, cut before the earliest of
        `until[i]`; the end-of-text id always ends a text."""
        numbers = range(len(prompts)) if numbers is None else numbers
        longest = self.device.max_length
        shapes = [
            (plan.ladder(len(prompt), longest), STEPS * -(-plan.ladder(limit, longest) // STEPS))
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        for batch in plan.batches(shapes, (1, 1), batch_size=self.batch_size, parts=self.device.parts):
            rows = list(batch.members) + [batch.members[-1]] * (batch.rows - len(batch.members))
            ids = np.zeros((batch.rows, batch.shape[0]), np.int32)
            for row, index in enumerate(rows):
                ids[row, : len(prompts[index])] = prompts[index]
            lengths = np.array([len(prompts[index]) for index in rows], np.int32)
            logits, caches = self.device.run(_start, (batch.shape[1],), ids, lengths)
            texts = [_Text(self.tokenizer, limits[index], until[index]) for index in rows]
            for text in texts[len(batch.members) :]:
                text.ended = True
            own = np.array([numbers[index] for index in rows], np.int32)
            step = 0
            while not all(text.ended for text in texts):
                count = min(STEPS, max(text.limit for text in texts if not text.ended) - step)
                told = tuple(map(np.int32, (seed, step, count, self.tokenizer.eos_id)))
                ended = np.array([text.ended for text in texts])
                new, logits, caches = self.device.run(_advance, (sampling,), caches, logits, ended, own, *told)
                step += count
                for text, tokens in zip(texts, np.asarray(new)[:, :count].tolist(), strict=True):
                    text.add(tokens)
            yield from ((index, text.text) for index, text in zip(batch.members, texts, strict=False))


class _Text:
    """A text that grows until it ends."""

    def __init__(self, tokenizer: Any, limit: int, until: Sequence[str]) -> None:
        self.tokenizer, self.limit, self.until = tokenizer, limit, until
        self.ids: list[int] = []
        self.text, self.ended = "", False

    def add(self, tokens: list[int]) -> None:
        """Goes on with the next tokens, as far as they count."""
        if self.ended:
            return
        tokens = tokens[: self.limit - len(self.ids)]
        end = self.tokenizer.eos_id
        self.ids += tokens[: tokens.index(end)] if end in tokens else tokens
        whole_text = self.tokenizer.decode(self.ids)
        self.text = cut(whole_text, self.until)
        self.ended = end in tokens or self.text != whole_text or len(self.ids) == self.limit


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(
    graph: nnx.GraphDef, mesh: Any, room: int, state: nnx.State, ids: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Array, Caches]:
    """Logits [B, V] after each prompt, and caches with room for more."""
    del mesh
    model = nnx.merge(graph, state).unstacked()
    return prefill(model, ids, lengths, model.init_caches(len(ids), ids.shape[1] + room))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
def _advance(
    graph: nnx.GraphDef, mesh: Any, sampling: Sampling, state: nnx.State, caches: Caches, logits: Array, ended: Array,
    numbers: Int[Array, "B"], seed: Array, first: Array, count: Array, end: Array,
) -> tuple[Int[Array, "B S"], Array, Caches]:  # fmt: skip
    """The next `count` tokens of every row, the first of them number `first`; ended rows stay as they are."""
    model = nnx.merge(graph, state).unstacked()
    key = jax.random.key(seed)
    row_keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)

    def running(carry: tuple) -> Array:
        step, ended, *_ = carry
        return (step < count) & ~jnp.all(ended)

    def advance(carry: tuple) -> tuple:
        step, ended, logits, caches, new = carry
        token = sampling.draw(logits, jax.vmap(lambda row_key: jax.random.fold_in(row_key, first + step))(row_keys))
        ended |= token == end
        out = model(token[:, None], Tokens(index=caches.length[:, None], valid=~ended[:, None]), caches)
        return step + 1, ended, out.logits[:, 0], out.caches, new.at[:, step].set(token)

    start = (jnp.int32(0), ended, logits, caches, jnp.full((len(ended), STEPS), end))
    _, _, logits, caches, new = jax.lax.while_loop(running, advance, start)
    return whole(mesh, new), logits, caches
