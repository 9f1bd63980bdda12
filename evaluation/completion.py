"""Texts continued by a model: prompts to ids, batches of one size, stop strings, answers scored as RULER does."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from evaluation.contract import EvalContext, EvaluationError

# lm-evaluation-harness's names for what the generator calls otherwise.
_RENAMED = {"max_gen_toks": "max_new_tokens"}
_KNOWN = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "do_sample", "until")


def complete(context: EvalContext, prompts: Sequence[str], *, max_new_tokens: int, **options: Any) -> list[str]:
    """One continuation per prompt, in order; greedy unless `options` or `context.generation` (which wins) says other.

    A prompt is BOS, the system text, the prompt; from the left of what is too long for the model, tokens are left out.
    `until` lists strings before which a text ends; the end-of-document token always ends it.
    """
    settings = {"max_new_tokens": max_new_tokens, **options, **generation_options(context.generation)}
    until = settings.pop("until", ())
    until = (until,) if isinstance(until, str) else tuple(until)
    if not settings.pop("do_sample", True):
        settings["temperature"] = 0.0
    new, tokenizer = int(settings["max_new_tokens"]), context.tokenizer
    room = context.longest - new
    if room < 2:
        raise EvaluationError(
            f"{new} new tokens leave no room for a prompt in a model of {context.longest}: ask for fewer"
        )
    encoded = []
    for prompt in prompts:
        ids = tokenizer.encode(context.system + prompt)
        encoded.append([tokenizer.bos_id, *ids[max(0, len(ids) - room + 1) :]])
    local = _local(context)
    generate = context.generate
    if generate is None:
        from models import generate  # type: ignore[assignment]
    parts = 1 if local.layout is None else batch_parts(local.layout)
    size = -(-min(context.batch_size, max(1, len(prompts))) // parts) * parts
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    texts = [""] * len(prompts)
    with local.layout.activate() if local.layout is not None else contextlib.nullcontext():
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = [encoded[index] for index in rows]
            batch += [batch[-1]] * (size - len(batch))  # One number of rows, so that few programs are compiled.
            seed = int(np.random.SeedSequence([context.seed, start]).generate_state(1)[0])
            found = generate(local.model, batch, stop_ids=(tokenizer.eos_id,), seed=seed, **settings)
            for index, ids in zip(rows, found, strict=False):
                texts[index] = cut(tokenizer.decode(ids), until)
            context.report("generating", min(start + size, len(order)), len(order))
    return texts


def generation_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the generator's names; EvaluationError for one it does not have."""
    options = {_RENAMED.get(name, name): value for name, value in given.items()}
    for name in options:
        if name not in _KNOWN:
            raise EvaluationError(f"unknown generation option {name!r}: known: {', '.join(_KNOWN)}, max_gen_toks")
    return options


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the earliest of the strings in `until`."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text


def clean(text: str) -> str:
    """Characters that are not printable become line ends, and ends are stripped (RULER's clean-up of predictions)."""
    return "".join(character if character.isprintable() else "\n" for character in text).strip()


def string_match_all(text: str, references: Sequence[str]) -> float:
    """The share of references that occur in `text`, letter case aside (RULER, all tasks but question answering)."""
    found = clean(text).lower()
    return sum(reference.lower() in found for reference in references) / len(references)


def batch_parts(layout: Any) -> int:
    """Over how many devices the rows of a batch are spread."""
    return layout.mesh.size // layout.batch_sharding().shard_shape((layout.mesh.size,))[0]


def _local(context: EvalContext) -> EvalContext:
    """With several processes, the model whole on a device of each: a generator returns rows of ids on one host."""
    if context.layout is None or jax.process_count() == 1:
        return context
    from flax import nnx

    graph, state = nnx.split(context.model)
    whole = jax.jit(lambda x: x, out_shardings=context.layout.replicated())(state)
    model = nnx.merge(graph, jax.tree.map(lambda x: x.addressable_data(0), whole))
    return dataclasses.replace(context, model=model, layout=None)
