"""Several runs in turn: those of a sweep file, the finished ones skipped, and one report that compares them."""

import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from configs import command_line, fields, validate
from configs.errors import ConfigError, UserError
from configs.sweeps import combinators
from training import processes


def points(file: str, config: ml_collections.ConfigDict | None) -> list[ml_collections.ConfigDict]:
    """The configs of a sweep file: its `SWEEP` (a list of dotted overrides) over `config`, or over its own `CONFIG`.

    Each gets the run folder <runs/name of the sweep>/<label of the point>, unless the point says another. Raises
    ConfigError, naming the point, for an override that does not fit.
    """
    sweep = command_line.load_file(file, "SWEEP")
    name = pathlib.Path(file).stem
    base = config if config is not None else command_line.load(command_line.load_file(file, "CONFIG"))
    made = []
    for point, label in zip(sweep, combinators.labels(sweep), strict=True):
        folder = pathlib.Path(base.run_dir or f"runs/{name}") / label
        try:
            made.append(fields.apply(base, {"name": label, "run_dir": str(folder), **point}))
            validate.check(made[-1])
        except ConfigError as error:
            raise ConfigError(f"{file}, point {label}: {error}") from error
    if not made:
        raise ConfigError(f"{file}: SWEEP is empty")
    return made


def run(
    file: str,
    config: ml_collections.ConfigDict | None,
    one: Callable[[ml_collections.ConfigDict], Any],
    *,
    only_print: bool = False,
) -> int:
    """Runs every point with `one` (`train.run`), then writes the report; the exit status.

    A point that fails by a mistake of the user does not keep the others from running: it is told when it happens and
    again, in one UserError, at the end.
    """
    configs = points(file, config)
    if only_print:
        for number, each in enumerate(configs, 1):
            print(f"{number}/{len(configs)} {each.run_dir}")
        return 0
    done, failed = [], []
    for number, each in enumerate(configs, 1):
        if processes.first():
            print(f"[{number}/{len(configs)}] {each.run_dir}")
        try:
            result = one(each)
        except UserError as error:
            failed.append(f"{each.name}: {error}")
            print(f"failed: {failed[-1]}")
            continue
        if result.stopped:
            return 130 if result.stopped == signal.SIGINT else 0
        done.append(result.run_dir)
        jax.clear_caches()  # The programs of one point are of no use to the next, and a long sweep would keep them all.
    if done and processes.first():
        from rich.console import Console

        from evaluation import comparison, report

        page = done[0].parent / "report.html"
        report.write(done, page, command=f"python train.py --sweep={file}")
        Console(soft_wrap=True).print(comparison.table(done))
        print(f"report: {page}")
    if failed:
        raise UserError(f"{len(failed)} of {len(configs)} runs failed; first {failed[0]}")
    return 0
