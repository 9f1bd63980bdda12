"""A run folder's network with another attention, as a run folder of its own: to evaluate, to serve, to train on.

python eval.py convert runs/mla --to=tpla --mode=tpla_pd --transform=pca --output=runs/tpla
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import data
import sharding
from configs import base, fields
from configs.errors import UserError
from evaluation import conversions
from models import conversion
from training import manifest, run_folder, setup, state
from training.checkpoints import Checkpoints
from training.loading import LoadedRun, load_run


def convert(
    run_dir: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    to: str = "tpla",
    rows: int = 128,
    report_rows: int = 32,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> conversion.Report:
    """The run in `run_dir` with its attention converted by `conversion.KINDS[to]` with these `options`, in `output`.

    `rows` rows of the run's training text calibrate, `report_rows` of its held-out text measure the stages. The new
    folder holds the config, the tokenizer, one checkpoint at step 0, `conversion.json` and a picture of it. Raises what
    loading and converting raise, and RunFolderError if `output` holds a run already.
    """
    kind = conversion.KINDS[to]
    source, target = load_run(run_dir, layout=sharding.build(_alone())), pathlib.Path(output)
    if (target / "config.json").exists():
        raise run_folder.RunFolderError(f"{target} holds a run already: give another --output")
    calibration, held_out = _texts(source, pathlib.Path(run_dir), rows if kind.calibrates else 0, report_rows)
    texts: dict[str, Any] = dict(calibration_ids=calibration) if kind.calibrates else {}
    made = kind.convert(
        source.model, fields.plain(source.config.model), report_ids=held_out, progress=progress, **texts, **options
    )
    config = _config(source.config, made.config, target)
    with run_folder.RunFolder(config) as folder:
        folder.write_config()
        folder.write_tokenizer(source.tokenizer)
        manifest.write_atomically(
            target / "conversion.json", json.dumps(conversion.report.plain(made.report), indent=1)
        )
        manifest.write_atomically(target / "conversion.svg", conversions.picture(made.report))
        with Checkpoints(folder.checkpoints, config.checkpoint) as checkpoints:
            checkpoints.save(_state(config, source, made), None, {"config": fields.plain(config), "elapsed": 0.0})
    return made.report


def _alone() -> ml_collections.ConfigDict:
    """One device, whatever the run had: conversions are NumPy's work."""
    return base.sharding()


def _config(
    before: ml_collections.ConfigDict, model: dict[str, Any], target: pathlib.Path
) -> ml_collections.ConfigDict:
    config = fields.from_plain(fields.plain(before) | {"model": model, "name": target.name, "run_dir": str(target)})
    with config.unlocked():
        config.train.init_from, config.train.steps = "", 0
    return config


def _state(config: ml_collections.ConfigDict, source: LoadedRun, made: conversion.Conversion) -> state.State:
    structure = setup.network(config, source.tokenizer)
    params, rest = structure.split(made.model)
    layout = sharding.build(_alone())
    plain = setup.build(_without_objective(config), structure, layout, source.tokenizer)
    fresh = plain.init(jax.random.key(config.seed))
    # Copies, because no two parts of a state may share a buffer.
    ema = {name: jnp.array(params[name], jnp.float32, copy=True) for name in fresh.ema}
    return state.State(fresh.step, fresh.halted, params, rest, fresh.opt_state, ema, fresh.rng)


def _without_objective(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.objective.name, config.train.steps = "next_token", 1
    return config


def _texts(
    source: LoadedRun, folder: pathlib.Path, rows: int, report_rows: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    options = source.config.data.copy_and_resolve_references()
    options.tokenizer = str(folder / "tokenizer")
    pipeline = data.build(options, seed=source.config.seed)
    length = options.length
    batches = pipeline.train()
    found: list[np.ndarray] = []
    while sum(map(len, found)) < rows:
        inputs = next(batches)["inputs"]
        found.append(inputs.reshape(-1, inputs.shape[-1]))  # Of pairs of answers, each by itself.
    batches.close()
    held_out: list[np.ndarray] = []
    for batch in pipeline.heldout_batches(options.batch_size, length) if report_rows else ():
        held_out.extend(batch["inputs"][batch["weight"].all(axis=1)])  # Whole windows.
        if len(held_out) >= report_rows:
            break
    if report_rows and not held_out:
        raise UserError(f"no held-out document has {length} tokens to measure stages on: give --report_rows=0")
    return np.concatenate(found)[:rows] if rows else None, np.stack(held_out)[:report_rows] if held_out else None


def main(argv: Sequence[str], parser: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> int:
    """The command line `eval.py convert`; returns the exit status. The `parser` decides how mistakes are told."""
    chooser = parser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--to", default="tpla", choices=conversion.KINDS, help="what the attention becomes")
    to = chooser.parse_known_args(argv)[0].to
    kind = conversion.KINDS[to]
    flags = parser(prog=f"eval.py convert --to={to}", description=__doc__, allow_abbrev=False, parents=[chooser],
                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    flags.add_argument("run", metavar="RUN", help=f"a run folder whose attention is {kind.source}")
    flags.add_argument("--output", "-o", required=True, metavar="DIR", help="the new run folder")
    kind.flags(flags)
    if kind.calibrates:
        flags.add_argument("--rows", type=int, default=128, help="rows of training text for calibration")
    flags.add_argument("--report_rows", type=int, default=32, help="rows of held-out text for the stages; 0 is none")
    options = vars(flags.parse_args(argv))
    run, output = options.pop("run"), options.pop("output")
    report = convert(run, output, **options)
    if report.stages:
        print(report.table())
    print(f"converted: {output}")
    return 0
