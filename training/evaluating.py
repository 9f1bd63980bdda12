"""What the loop shows of a model between steps: the configured tasks, and a few texts."""

import contextlib
from typing import Any

import jax
import ml_collections

from sharding import Layout
from training import state
from training.progress import Bar
from training.setup import Training
from training.state import State

TEMPERATURE = 0.8  # Greedy text of a small model repeats itself.


def evaluate(
    config: ml_collections.ConfigDict, training: Training, pipeline: Any, now: State, bar: Bar, show: bool
) -> tuple[Any, list[dict[str, Any]]]:
    """(results, samples) of the model as it is evaluated: with its average weights, where the run keeps an average.

    `results` is an `evaluation.Results`, or None without tasks; a sample is {"prompt": ..., "text": ...}. `show` prints
    both.
    """
    structure, layout = training.structure, training.layout
    step, params = int(now.step), state.evaluated(now)
    model = structure.merge(params, now.rest)
    results = None
    if config.eval.tasks:
        import evaluation  # Its plots and tables are not wanted before the first evaluation.

        results = evaluation.evaluate(
            model,
            pipeline.tokenizer,
            pipeline,
            config.eval.tasks,
            config=config,
            limit=config.eval.limit,
            batch_size=config.eval.batch_size,
            seed=config.seed,
            layout=layout,
            step=step,
            progress=lambda what, done, total: bar.doing(f"{what} {done}/{total}"),
        )
    bar.doing("sampling")
    if jax.process_count() > 1:
        # Every process draws the same texts on a device of its own: the sampler's rows must all lie within reach.
        whole = jax.jit(lambda x: x, out_shardings=layout.replicated())((params, now.rest))
        model = structure.merge(*jax.tree.map(lambda x: x.addressable_data(0), whole))
        layout = None
    texts = samples(config, model, pipeline.tokenizer, layout)
    if show and results is not None:
        bar.show(results.table())
    if show:
        for sample in texts:
            bar.say(f"{sample['prompt']}{sample['text']}".rstrip() + "\n")
    return results, texts


def samples(
    config: ml_collections.ConfigDict, model: Any, tokenizer: Any, layout: Layout | None
) -> list[dict[str, Any]]:
    """One drawn continuation for each of `config.eval.sample_prompts`."""
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in config.eval.sample_prompts]
    room = config.model.max_length - max(map(len, prompts), default=0)
    new = min(config.eval.sample_tokens, room)
    if not prompts or new <= 0:
        return []
    from models import generate

    # Rows must divide over the devices; those added only fill up.
    parts = 1 if layout is None else layout.mesh.size // layout.batch_sharding().shard_shape((layout.mesh.size,))[0]
    filled = prompts + [prompts[-1]] * (-len(prompts) % parts)
    with layout.activate() if layout is not None else contextlib.nullcontext():
        texts = generate(
            model, filled, max_new_tokens=new, temperature=TEMPERATURE, seed=config.seed, stop_ids=(tokenizer.eos_id,)
        )
    return [
        {"prompt": prompt, "text": tokenizer.decode(ids)}
        for prompt, ids in zip(config.eval.sample_prompts, texts, strict=False)
    ]
