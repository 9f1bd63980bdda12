"""Tasks of lm-evaluation-harness asked of a model of ours, and what they found in the layout of our results."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, cast

import jax
import numpy as np

from evaluation.contract import EvalContext, EvaluationError, Units
from evaluation.harness import chat, tasks
from evaluation.harness.answers import Answers
from models.decoder import DecoderLM

SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
KEPT = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclasses.dataclass(frozen=True)
class Harness:
    """Tasks of the harness that are made and wait for a model, and how they are to be run; see `prepare`."""

    tasks: Sequence[Any]
    manager: Any
    num_fewshot: int | None = None
    batch_size: int | str = "auto"
    max_length: int = 0
    add_bos: bool | None = None
    chat_template: bool = False
    seeds: Sequence[int] = (0, 1234, 1234, 1234)
    picked: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)

    def run(self, context: EvalContext, *, template_folder: str = "", answers: str = "") -> dict[str, Any]:
        """What the harness found: its results layout, `samples` by task, `units` for paired comparisons.

        Of `context` the model, tokenizer, layout, limits, generation options, system text and progress count.
        `template_folder` is where the tokenizer's chat template is looked for, `answers` a file that keeps answers.
        Several processes must all call this alike; all get the same.
        """
        import lm_eval

        from evaluation.harness.model import JaxLM

        if context.limit and self.picked:
            raise EvaluationError("--limit and --samples exclude each other for tasks of lm-evaluation-harness")
        if answers and jax.process_count() > 1:
            raise EvaluationError("--use_cache keeps the answers of one process, and there are several: leave it out")
        template = chat.find(template_folder, context.tokenizer) if self.chat_template else None
        if self.chat_template and template is None:
            raise EvaluationError(f"there is no chat template in {template_folder or 'this tokenizer'}")
        lm = JaxLM(
            cast(DecoderLM, context.model),
            context.tokenizer,
            layout=context.layout,
            batch_size=self.batch_size,
            max_length=self.max_length,
            add_bos=self.add_bos,
            template=template,
            seed=context.seed,
            answers=Answers(answers) if answers else None,
            report=context.progress,
        )
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(self.tasks),
            task_manager=self.manager,
            num_fewshot=self.num_fewshot,
            limit=context.limit or None,
            samples={name: list(rows) for name, rows in self.picked.items()} or None,
            bootstrap_iters=context.bootstrap_iterations,
            log_samples=True,
            system_instruction=context.system or None,
            apply_chat_template=self.chat_template,
            gen_kwargs=dict(context.generation) or None,
            predict_only=context.predict_only,
            **dict(zip(SEEDS, self.seeds, strict=True)),
        )
        return _ours(found, context.predict_only)

    def settings(self) -> dict[str, Any]:
        """How the tasks were run, for the record."""
        names = ("num_fewshot", "batch_size", "max_length", "chat_template", "seeds")
        return {"harness": {name: getattr(self, name) for name in names} | {"lm_eval": metadata.version("lm_eval")}}

    def fingerprint(self, described: Mapping[str, Any], tokenizer: Any) -> str:
        """Equal where equal requests have equal answers: same weights, ids and lengths."""
        circumstances = [described.get("weights"), described.get("dtype"), tokenizer.fingerprint, self.max_length]
        text = json.dumps([*circumstances, self.add_bos, self.chat_template])
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:24]


def prepare(
    names: Sequence[str],
    *,
    include: str = "",
    ours: Sequence[str] = (),
    data_root: str = "",
    num_fewshot: int | None = None,
    picked: Mapping[str, Sequence[int]] | None = None,
    **settings: Any,
) -> Harness:
    """The tasks called `names` (wildcards too) with their data, before any model is loaded.

    `include` is a folder of YAML tasks (functions they name are code of the user's, and run), `data_root` the folder
    all data comes from; `ours` are further names that a mistyped one may mean; `settings` are fields of `Harness`.
    Raises EvaluationError.
    """
    catalogue = tasks.Catalogue(include)
    made, manager = tasks.load(catalogue.expand(names, ours), catalogue, data_root=data_root, num_fewshot=num_fewshot)
    leaves: dict[str, Any] = {}
    for item in made:
        for task in item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]:
            leaves[task.task_name] = task
    for name, task in leaves.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise EvaluationError(f"task {name} runs code that models write, which is never done here: leave it out")
        if getattr(task, "MULTIMODAL", False):
            raise EvaluationError(f"task {name} needs images or sound, this model takes text: leave it out")
    for name, rows in (picked or {}).items():
        if name not in leaves:
            raise EvaluationError(f"samples were given for {name!r}, which is not among the tasks to run")
        size = len(leaves[name].eval_docs)
        missing = [row for row in rows if not 0 <= row < size]
        if missing:
            raise EvaluationError(f"document {missing[0]} of task {name} was asked for, it has {size}: 0 to {size - 1}")
    return Harness(made, manager, num_fewshot, picked=dict(picked or {}), **settings)


def _ours(found: Mapping[str, Any], predict_only: bool) -> dict[str, Any]:
    """The parts of the harness's results that results files hold, as plain JSON."""
    kept: dict[str, Any] = {name: found[name] for name in KEPT if name in found}
    for entry in [*kept["results"].values(), *kept.get("groups", {}).values()]:
        for field in [name for name in entry if predict_only and name.startswith("bypass")]:
            del entry[field]
    samples = {name: [_sample(row) for row in rows] for name, rows in found.get("samples", {}).items()}
    units = {name: _units(rows, kept["configs"][name]) for name, rows in samples.items() if not predict_only}
    kept |= {"samples": samples, "units": {name: vars(unit) for name, unit in units.items() if unit is not None}}
    plain = json.loads(json.dumps(kept, default=str))
    plain["results"] = {name: entry for name, entry in plain["results"].items() if name in plain["configs"]}
    return plain


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with its requests by name, as the harness writes it."""
    named = [{f"arg_{place}": part for place, part in enumerate(request)} for request in row["arguments"]]
    return {**row, "arguments": {f"gen_args_{place}": request for place, request in enumerate(named)}}


def _units(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> Units | None:
    """The numbers of each document behind the first metric that is a mean over documents or a ratio of sums."""
    rows = [row for row in rows if row["filter"] == rows[0]["filter"]]
    listed = [entry["metric"] for entry in config.get("metric_list", ())]
    for metric in [*listed, *(rows[0]["metrics"] if rows else ())]:
        values = [row.get(metric) for row in rows]
        ids = [row["doc_hash"] for row in rows]
        if all(isinstance(value, int | float | np.number) for value in values) and metric != "bypass":
            return Units(metric, ids, [float(value) for value in values], [1.0] * len(values))
        if metric == "bits_per_byte" and all(isinstance(value, tuple | list) for value in values):
            bits = [-float(value[0]) / np.log(2) for value in values]
            return Units(metric, ids, bits, [float(value[1]) for value in values])
    return None
