"""Continuations of prompts, greedy and drawn, for reading."""

from evaluation.completion import complete
from evaluation.contract import EvalContext, Task, TaskResult


def run(context: EvalContext) -> TaskResult:
    """Each prompt once greedily and `draws` times at `temperature`; the prompts are the config's unless given."""
    prompts = context.params["prompts"] or (context.config.eval.sample_prompts if context.config is not None else ("",))
    chosen = context.select(list(prompts))
    texts = [prompt for _, prompt in chosen]
    new = min(context.params["max_new_tokens"], context.longest // 2)
    rows = [
        {"doc_id": index, "doc": prompt, "prompt": prompt, "text": text, "filter": "greedy"}
        for (index, prompt), text in zip(chosen, complete(context, texts, max_new_tokens=new), strict=True)
    ]
    repeated = [(index, prompt) for index, prompt in chosen for _ in range(context.params["draws"])]
    if repeated:
        drawn = complete(
            context, [prompt for _, prompt in repeated], max_new_tokens=new, temperature=context.params["temperature"]
        )
        rows += [
            {"doc_id": index, "doc": prompt, "prompt": prompt, "text": text, "filter": "sampled"}
            for (index, prompt), text in zip(repeated, drawn, strict=True)
        ]
    return TaskResult("sample", {}, rows, effective=len(chosen), original=len(prompts))


TASKS = (
    Task(
        "sample",
        run,
        output_type="generate_until",
        description="greedy and drawn continuations of prompts",
        defaults={"prompts": (), "max_new_tokens": 120, "draws": 1, "temperature": 0.8},
    ),
)
