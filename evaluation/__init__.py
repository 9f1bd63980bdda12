"""Evaluation: tasks by name, their statistics, and reports.

results = evaluate(model, tokenizer, pipeline, ["heldout", "needle"], limit=64)
print(results.found["heldout"].metrics["bits_per_byte"])
"""

import dataclasses
import datetime
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from evaluation import tasks as registry
from evaluation.cache import Cache
from evaluation.contract import EvalContext, EvaluationError, Generate, Grid, Metric, Task, TaskResult, Units
from evaluation.results import Results, environment

__all__ = [
    "EvalContext",
    "EvaluationError",
    "Grid",
    "Metric",
    "Results",
    "Task",
    "TaskResult",
    "Units",
    "evaluate",
]


def evaluate(
    model: nnx.Module,
    tokenizer: Any,
    pipeline: Any | None = None,
    tasks: Sequence[str] = ("heldout",),
    *,
    config: ml_collections.ConfigDict | None = None,
    name: str = "",
    limit: float = 0.0,
    batch_size: int = 16,
    length: int = 0,
    seed: int = 0,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    bootstrap_iterations: int = 0,
    generation: Mapping[str, Any] | None = None,
    generate: Generate | None = None,
    system: str = "",
    picked: Mapping[str, Sequence[int]] | None = None,
    predict_only: bool = False,
    layout: Any | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    step: int | None = None,
    fingerprint: bool = False,
    cache: str = "",
    harness: Any | None = None,
    template_folder: str = "",
) -> Results:
    """Runs the tasks that `tasks` (names, groups, wildcards) stand for and returns what they found.

    `params` gives a task's own parameters by task name; what it leaves out comes from `config.eval`, then from the
    task. `length` 0 takes the length the model was trained at (`config.data.length`) or, without a config, 256.
    `fingerprint` hashes the weights into the `run` block. `cache` is a folder that keeps the results of tasks; it is
    read where nothing that a result depends on has changed, and implies `fingerprint`. `harness` are tasks of
    lm-evaluation-harness (`evaluation.harness.program.prepare`), run after those of `tasks`, which may then be empty;
    `template_folder` is where their chat template is looked for.

    In a run of several processes all of them must call this with the same arguments; all get the same results, and
    process 0 should write them. Raises EvaluationError before any work for unknown tasks or parameters.
    """
    chosen = registry.match(tasks) if tasks or harness is None else []
    params, picked = {task: dict(given) for task, given in (params or {}).items()}, dict(picked or {})
    if config is not None and any(task.name == "heldout" for task in chosen):
        bounded: Any = params.setdefault("heldout", {})  # type: ignore[attr-defined]
        bounded.setdefault("max_tokens", config.eval.heldout_tokens)
    for kind, given in (("parameters", params), ("samples", picked)):
        stray = sorted(set(given) - {task.name for task in chosen})
        if stray:
            raise EvaluationError(f"{kind} were given for {stray[0]!r}, which is not among the tasks to run")
    for task in chosen:
        task.parameters(params.get(task.name, {}))
    length = length or (config.data.length if config is not None else 256)
    longest = config.model.max_length if config is not None else length
    if length > longest:
        raise EvaluationError(f"windows of {length} tokens are longer than config.model.max_length={longest}")
    described = _describe(model, tokenizer, pipeline, config, layout, step, fingerprint or bool(cache))
    settings = {
        "batch_size": batch_size,
        "limit": limit or None,
        "length": length,
        "seed": seed,
        "bootstrap_iters": bootstrap_iterations,
        "gen_kwargs": dict(generation or {}),
        "params": params,
        "system_instruction": system or None,
    }
    began, found = time.perf_counter(), {}
    common = EvalContext(
        model=model,
        tokenizer=tokenizer,
        pipeline=pipeline,
        config=config,
        batch_size=batch_size,
        length=length,
        limit=limit,
        seed=seed,
        bootstrap_iterations=bootstrap_iterations,
        generation=dict(generation or {}),
        generate=generate,
        system=system,
        predict_only=predict_only,
        layout=layout,
        progress=progress,
    )
    for task in chosen:
        context = dataclasses.replace(common, params=params.get(task.name, {}), picked=picked.get(task.name))
        if cache:
            circumstances = {
                "task": task.name,
                "version": task.version,
                "parameters": task.parameters(context.params),
                "settings": {key: value for key, value in settings.items() if key not in ("batch_size", "params")},
                "picked": context.picked,
                "predict_only": predict_only,
                "run": {
                    key: described.get(key) for key in ("weights", "tokenizer", "corpus", "attention", "dtype", "jax")
                },
                "config": str(config),
            }
            found[task.name] = Cache(cache)(circumstances, functools.partial(task.run, context))
        else:
            found[task.name] = task.run(context)
    theirs: Mapping[str, Any] = {}
    if harness is not None:
        answers = f"{cache}/answers_{harness.fingerprint(described, tokenizer)}.jsonl" if cache else ""
        theirs = harness.run(common, template_folder=template_folder, answers=answers)
        settings |= harness.settings()
    name = name or (config.name if config is not None else type(model).__name__)
    date = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    return Results(
        name,
        {task.name: task for task in chosen},
        found,
        settings,
        described,
        time.perf_counter() - began,
        date,
        theirs,
    )


def _describe(
    model: nnx.Module,
    tokenizer: Any,
    pipeline: Any | None,
    config: ml_collections.ConfigDict | None,
    layout: Any | None,
    step: int | None,
    fingerprint: bool,
) -> dict[str, Any]:
    """The `run` block: what a reader needs to know besides the numbers."""
    weights = jax.tree.leaves(nnx.state(model, nnx.Param))
    block: dict[str, Any] = environment() | {
        "step": step,
        "parameters": int(sum(np.size(leaf) for leaf in weights)),
        "tokenizer": getattr(tokenizer, "fingerprint", None),
        "vocab_size": getattr(tokenizer, "vocab_size", None),
    }
    if config is not None:
        block |= {
            "attention": config.model.attention.get("layer"),
            "kernel": config.model.attention_implementation or "by platform and shape",
            "dtype": config.model.compute_dtype,
            "config_seed": config.seed,
        }
    if layout is not None:
        block |= {"mesh": dict(layout.mesh.shape), "sharding": layout.preset}
    if pipeline is not None:
        corpus = pipeline.corpus
        block["corpus"] = {"hash": corpus.hash, "files": len(corpus.files), "bytes": corpus.bytes}
    if fingerprint and all(leaf.is_fully_addressable for leaf in weights):
        digest = hashlib.sha256()
        for leaf in weights:
            digest.update(np.asarray(leaf).tobytes())
        block["weights"] = digest.hexdigest()
    return block
