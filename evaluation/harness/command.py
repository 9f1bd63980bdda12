"""The flags of eval.py that are about tasks of lm-evaluation-harness."""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from configs.errors import ConfigError
from evaluation import tasks
from evaluation.contract import EvaluationError
from evaluation.harness import chat, program
from evaluation.harness import tasks as foreign

HEEDED = {  # Flags that only these tasks heed.
    "num_fewshot": "there are no worked examples in",
    "apply_chat_template": "no chat template is used by",
    "data_root": "no data of the harness is read by",
}


def include(folder: str) -> str:
    """Takes in the Python tasks of a folder; a folder of YAML tasks is returned, for the harness."""
    if folder and any(pathlib.Path(folder).rglob("*.yaml")):
        return folder
    if folder:
        tasks.include(folder)
    return ""


def prepare(options: argparse.Namespace, settings: dict[str, Any], names: Sequence[str], folder: str) -> Any:
    """The tasks that are not ours, made ready, with their share of `settings`; None where all are ours. `folder` holds
    YAML tasks of the user's, if it is not "".

    Raises ConfigError and EvaluationError, before anything is loaded.
    """
    for flag, why in HEEDED.items():
        if getattr(options, flag) and not names:
            raise ConfigError(f"--{flag}: {why} any of these tasks; leave the flag out")
    if not names:
        return None
    if not foreign.installed():
        try:
            tasks.match(names)
        except EvaluationError as error:
            raise EvaluationError(f"{error} (for tasks of lm-evaluation-harness: {foreign.INSTALL})") from error
    for run in options.run or [""] if options.apply_chat_template else ():
        if not run or chat.text(f"{run}/tokenizer") is None:
            raise ConfigError(f"--apply_chat_template: {run or 'this tokenizer'} has no chat template; leave it out")
    given = settings["params"].pop("harness", {})
    add_bos = given.pop("add_bos", "")
    if given or add_bos not in ("", "true", "false"):
        raise ConfigError("--params=harness.add_bos=true|false is all that is there for harness")
    picked = {name: rows for name, rows in settings["picked"].items() if not tasks.known(name)}
    settings["picked"] = {name: rows for name, rows in settings["picked"].items() if name not in picked}
    return program.prepare(
        names, include=folder, ours=[*tasks.names(), *tasks.groups()], data_root=options.data_root,
        num_fewshot=options.num_fewshot, picked=picked,
        batch_size=options.batch_size if options.batch_size == "auto" else settings["batch_size"],
        max_length=options.length, add_bos=json.loads(add_bos) if add_bos else None,
        chat_template=options.apply_chat_template, seeds=_seeds(options.seed),
    )  # fmt: skip


def _seeds(text: str) -> tuple[int, ...]:
    """The harness's seeds (Python, NumPy, framework, worked examples): its own defaults, one for all, or up to four."""
    parts = text.split(",")
    if len(parts) > 4 or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seed must be one to four whole numbers of 0 or more, got {text!r}")
    numbers = tuple(map(int, parts))
    if len(numbers) == 1:
        return (0, 1234, 1234, 1234) if text == "0" else numbers * 4
    return (*numbers, *(1234,) * (4 - len(numbers)))
