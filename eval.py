"""The one evaluator: runs or untrained models -> tasks -> tables, JSON, samples, reports.

    python eval.py --run=runs/lm-gqa --tasks=heldout,needle --limit=50
    python eval.py --run=runs/gqa --run=runs/mla --tasks=heldout        compared document by document
    python eval.py --run=runs/lm-gqa --tasks=arc_easy,hellaswag --data_root=DIR     of lm-evaluation-harness
    python eval.py --model=mla --tasks=mqar --params=mqar.steps=400     a probe of an attention; no run needed
    python eval.py ls tasks
    python eval.py report runs/gqa runs/mla --output=report.html
    python eval.py --claim=tpla                                         a published claim, tried at small scale

Flags and files follow lm-evaluation-harness. Results go to --output, by default to <run>/eval. On several hosts each
runs the same command with --coordinator, --num_processes and --process_id.
"""

import argparse
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from configs import command_line
from configs.errors import ConfigError, UserError, unknown

if TYPE_CHECKING:
    from evaluation import Results


OF_CLAIMS = ("claim", "smoke", "params", "output_path", "config")  # The flags that --claim may have beside it.


class Parser(argparse.ArgumentParser):
    """Mistakes as one line that names the nearest flag."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0]
            if not word.startswith("-"):
                raise ConfigError(f"unexpected argument {word!r}: begin with --, `ls`, `report` or `claims`")
            known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            raise ConfigError(unknown("flag", word.partition("=")[0], known))
        raise ConfigError(message)


def parser() -> Parser:
    """The flags."""
    flags = Parser(
        prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = flags.add_argument
    add("--run", action="append", default=[], metavar="DIR", help="a run folder; several are compared")
    add("--step", type=int, default=None, help="the checkpoint of this step; else the newest sound one")
    add(
        "--model",
        "-m",
        default="",
        help="an untrained model: an attention preset, or a config such as configs/lm.py:attention=mla",
    )
    add(
        "--model_args",
        "-a",
        default="",
        metavar="K=V,...",
        help="fields of the model's config, such as model.width=128,seed=1",
    )
    add("--tasks", "-t", default="heldout", help="names, groups and wildcards, with commas between")
    add(
        "--params",
        action="append",
        default=[],
        metavar="TASK.K=V,...",
        help="a task's own parameters, such as mqar.steps=400",
    )
    add(
        "--num_fewshot", "-f", type=int, default=None, help="worked examples before each question, where tasks have any"
    )
    add("--batch_size", "-b", default="16", help="rows, or auto")
    add("--limit", "-L", type=float, default=0.0, help="documents per task; below 1 a share of them; 0 is all")
    add("--samples", "-E", default="", metavar="JSON", help="""only these documents: '{"heldout": [0, 5]}'""")
    add("--output_path", "--output", "-o", default="", metavar="DIR", help="where results go; else <run>/eval")
    add("--log_samples", "-s", action="store_true", help="write samples_<task>_<time>.jsonl")
    add("--predict_only", action="store_true", help="write samples, compute no metrics")
    add("--gen_kwargs", default="", metavar="K=V,...", help="of generation, such as temperature=0.8,max_gen_toks=64")
    add("--seed", default="0", help="decides draws and probes; a list of four gives the harness its own")
    add("--bootstrap_iters", type=int, default=100_000, help="for the errors of ratios; 0 takes the delta method")
    add("--length", type=int, default=0, help="window in tokens; else config.data.length")
    add("--system_instruction", default="", help="text before every prompt")
    add("--apply_chat_template", action="store_true", help="only for tokenizers that have one")
    add("--use_cache", "-c", default="", metavar="DIR", help="keep results of tasks, and do finished tasks only once")
    add("--include_path", default="", metavar="DIR", help="a folder with further tasks, in Python or in YAML")
    add("--data_root", default="", metavar="DIR", help="data of the harness's tasks: DIR/<dataset>/<split>.jsonl")
    add("--coordinator", default="", help="several processes: where they meet, as host:port")
    add("--num_processes", type=int, default=1, help="several processes: how many")
    add("--process_id", type=int, default=-1, help="several processes: which one this is, from 0")
    add("--claim", default="", metavar="SLUG", help="measure a published claim (see `ls claims`); nothing else")
    add("--smoke", action="store_true", help="with --claim: as small as can be, to see that it works")
    add(
        "--config",
        "-C",
        default="",
        metavar="FILE",
        help="a YAML or JSON file with values of these flags; the command line wins",
    )
    return flags


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    if argv and argv[0] == "ls":
        return listing(list(argv[1:]))
    if argv and argv[0] == "convert":
        from training import converting

        with told():
            return converting.main(list(argv[1:]), Parser)
    if argv and argv[0] in ("import", "export"):
        from training import importing

        with told():
            return importing.main(list(argv), Parser)
    if argv and argv[0] == "report":
        return reporting(list(argv[1:]))
    if argv and argv[0] == "claims":
        return refresh_claims(list(argv[1:]))
    options = read_options(argv)
    with told():
        return measure_claim(options) if options.claim else evaluate(options)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of the command line over those of --config over the defaults."""
    flags = parser()
    given = flags.parse_args(argv)
    if given.config:
        known = {action.dest for action in flags._actions} - {"help", "config"}
        values = _file(pathlib.Path(given.config))
        for name in values:
            if name not in known:
                raise ConfigError(f"{given.config}: {unknown('flag', str(name), known)}")
        for name, value in values.items():
            if name in ("run", "params") and not isinstance(value, list):
                values[name] = [value]
            elif name in ("tasks",) and isinstance(value, list):
                values[name] = ",".join(map(str, value))
            elif isinstance(value, dict):
                values[name] = (
                    json.dumps(value) if name == "samples" else ",".join(f"{k}={v}" for k, v in value.items())
                )
        flags.set_defaults(
            **{name: str(v) if isinstance(flags.get_default(name), str) else v for name, v in values.items()}
        )
        given = flags.parse_args(argv)
    if given.claim:
        untouched = vars(parser().parse_args([]))  # Not the defaults of `flags`, which a file may have set.
        stray = [name for name, value in vars(given).items() if name not in OF_CLAIMS and value != untouched[name]]
        if stray:
            hint = f": give --params={given.claim}.seeds=..." if stray[0] == "seed" else ""
            raise ConfigError(f"--claim and --{stray[0]} exclude each other{hint}")
        return given
    if given.smoke:
        raise ConfigError("--smoke needs a --claim")
    if not given.run and not given.model:
        raise ConfigError("nothing to evaluate: give --run=DIR, or --model=NAME for an untrained model")
    if given.run and (given.model or given.model_args):
        raise ConfigError("--run and --model (or --model_args) exclude each other: a run has its model")
    if given.num_fewshot is not None and given.num_fewshot < 0:
        raise ConfigError(f"--num_fewshot must be 0 or more, got {given.num_fewshot}")
    if given.step is not None and len(given.run) != 1:
        raise ConfigError("--step needs exactly one --run")
    if given.bootstrap_iters < 0:
        raise ConfigError(f"--bootstrap_iters must be 0 or more, got {given.bootstrap_iters}")
    return given


def evaluate(options: argparse.Namespace) -> int:
    """Evaluates every run (or the untrained model), shows tables and writes results."""
    import jax
    from rich.console import Console

    from evaluation import tasks
    from evaluation.harness import command
    from training import processes

    processes.join(options.coordinator, options.process_id, options.num_processes)
    include = command.include(options.include_path)
    asked = [part for part in options.tasks.split(",") if part]
    theirs = [name for name in asked if not tasks.known(name)]
    settings = _settings(options)
    settings["harness"] = command.prepare(options, settings, theirs, include)
    ours = asked if settings["harness"] is None else [name for name in asked if name not in theirs]
    chosen = tasks.match(ours) if ours or not asked else []
    settings["tasks"] = ours
    console, documents = Console(highlight=False, quiet=jax.process_index() > 0), []
    for folder in options.run or [""]:
        results, target = _one(options, settings, folder, any(task.needs_text for task in chosen))
        console.print(results.table())
        documents.append((results.name, results.json()))
        if jax.process_index() == 0:
            path = results.write(target, log_samples=options.log_samples or options.predict_only)
            console.print(f"results: {path}", soft_wrap=True)
    if len(documents) > 1:
        from evaluation import comparison

        console.print(comparison.differences(documents))
    return 0


def listing(argv: Sequence[str]) -> int:
    """`ls tasks`: every task with what it does, with --include_path=DIR also those of a folder; `ls claims`."""
    from rich.console import Console

    from evaluation import tasks
    from evaluation.harness import command

    flags = Parser(prog="eval.py ls", allow_abbrev=False)
    flags.add_argument("what", choices=("tasks", "groups", "claims"))
    flags.add_argument("--include_path", default="")
    options = flags.parse_args(argv)
    folder = command.include(options.include_path)
    console = Console(highlight=False, soft_wrap=True)
    if options.what == "claims":
        from evaluation.claims import program

        program.listing(console)
        return 0
    if options.what == "groups":
        for group, members in tasks.groups().items():
            console.print(f"[bold]{group:<18}[/bold]{', '.join(members)}")
        return 0
    for task in tasks.match(["*"]):
        shown = ", ".join(f"{name}={value}" for name, value in task.defaults.items() if len(str(value)) < 30)
        console.print(f"[bold]{task.name:<18}[/bold]{task.description} \\[{task.output_type}]")
        console.print(f"{'':<18}[dim]{shown}[/dim]")
    if folder:
        from evaluation.harness import tasks as foreign

        for name in foreign.Catalogue(folder).own:
            console.print(f"[bold]{name:<18}[/bold]of lm-evaluation-harness, from {folder}")
    return 0


def reporting(argv: Sequence[str]) -> int:
    """`report RUN ... --output=report.html`: one page about the runs; the first is the one others are compared with."""
    flags = Parser(prog="eval.py report", allow_abbrev=False)
    flags.add_argument("runs", nargs="+", metavar="RUN")
    flags.add_argument("--output", "--output_path", "-o", default="")
    options = flags.parse_args(argv)
    from evaluation import report

    with told():
        runs = [pathlib.Path(run) for run in options.runs]
        target = (
            options.output or (runs[0] if len(runs) == 1 else pathlib.Path(os.path.commonpath(runs))) / "report.html"
        )
        print(f"report: {report.write(runs, target)}")
    return 0


def measure_claim(options: argparse.Namespace) -> int:
    """Measures the claim --claim names; what it has to train goes through the loop of train.py."""
    from evaluation.claims import program

    def trained(config: Any) -> Any:
        import train
        from training import load_run

        result = train.run(config)
        if result.stopped:
            raise program.Stopped(result.stopped)
        return load_run(result.run_dir)

    def converted(run_dir: Any, output: Any, **how: Any) -> None:
        from training import converting

        converting.convert(run_dir, output, **how)

    return program.measure(
        options.claim, _params(options), trained, convert=converted, smoke=options.smoke, output=options.output_path
    )


def refresh_claims(argv: Sequence[str]) -> int:
    """`claims`: judges and describes every recorded claim anew, without measuring; `--check` tells if that is due."""
    flags = Parser(prog="eval.py claims", allow_abbrev=False)
    flags.add_argument("--check", action="store_true", help="write nothing; status 1 if something is not up to date")
    flags.add_argument("--draw", action="store_true", help="every picture too")
    options = flags.parse_args(argv)
    from evaluation.claims import program

    return program.refresh(check=options.check, draw=options.draw)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Makes the user's mistakes that `data` and `sharding` find, which know nothing of configs, into UserErrors."""
    from data.errors import DataError
    from sharding.logical import ShardingError

    try:
        yield
    except (DataError, ShardingError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error


def _one(
    options: argparse.Namespace, settings: dict[str, Any], folder: str, needs_text: bool
) -> tuple["Results", pathlib.Path]:
    """The results of one run folder, or of the untrained model, and the folder they belong in."""
    import data
    import evaluation
    from evaluation.results import sanitise

    if folder:
        from training import load_run

        loaded = load_run(folder, options.step)
        config, model, tokenizer, layout, step = (
            loaded.config,
            loaded.model,
            loaded.tokenizer,
            loaded.layout,
            loaded.step,
        )
    else:
        config, layout, step = _untrained_config(options), None, 0
        tokenizer = model = None
    pipeline = None
    if needs_text or model is None:
        source = config.data.copy_and_resolve_references()
        if folder:
            source.tokenizer = str(pathlib.Path(folder) / "tokenizer")  # The run's own, not one trained anew.
        pipeline = data.build(source, seed=config.seed)
    if model is None:
        from flax import nnx

        import models

        tokenizer = pipeline.tokenizer
        model = models.build(config.model, vocab_size=tokenizer.vocab_size, rngs=nnx.Rngs(config.seed))
    name = config.name if folder else f"{options.model} (untrained)"
    with _progress() as progress:
        results = evaluation.evaluate(
            model, tokenizer, pipeline, config=config, name=name, layout=layout, step=step, progress=progress,
            fingerprint=True, cache=options.use_cache, template_folder=f"{folder}/tokenizer", **settings,
        )  # fmt: skip
    if folder:
        _check_corpus(pathlib.Path(folder), results)
    target = (
        pathlib.Path(options.output_path) / sanitise(name)
        if options.output_path
        else pathlib.Path(folder or "runs") / "eval"
    )
    return results, target


def _untrained_config(options: argparse.Namespace) -> Any:
    from configs import attention, fields, validate

    if options.model.partition(":")[0].endswith(".py"):
        spec = options.model
    elif options.model in attention.names():
        spec = f"configs/lm.py:attention={options.model}"
    else:
        raise ConfigError(unknown("--model", options.model, attention.names()))
    config = fields.apply(command_line.load(spec), _pairs("--model_args", options.model_args))
    validate.check(config)
    return config


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `evaluation.evaluate` that flags give."""
    length = options.length or 256
    if options.batch_size == "auto":
        batch_size = max(1, 16_384 // length)
    elif options.batch_size.isdecimal() and int(options.batch_size) > 0:
        batch_size = int(options.batch_size)
    else:
        raise ConfigError(f"--batch_size must be a number of rows or auto, got {options.batch_size!r}")
    seed = options.seed.split(",")[0]
    if not seed.isdecimal():
        raise ConfigError(f"--seed must be a whole number of 0 or more, got {options.seed!r}")
    return {
        "limit": options.limit,
        "batch_size": batch_size,
        "length": options.length,
        "seed": int(seed),
        "params": _params(options),
        "bootstrap_iterations": options.bootstrap_iters,
        "generation": {name: _number(value) for name, value in _pairs("--gen_kwargs", options.gen_kwargs).items()},
        "system": options.system_instruction,
        "picked": _picked(options.samples),
        "predict_only": options.predict_only,
    }


def _params(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Parameters by the task or claim whose they are."""
    params: dict[str, dict[str, str]] = {}
    for text in options.params:
        for name, value in _pairs("--params", text, lists=True).items():
            task, dot, parameter = name.partition(".")
            if not dot:
                raise ConfigError(
                    f"--params needs the task's name before a dot, as in heldout.max_tokens=0, got {name!r}"
                )
            params.setdefault(task, {})[parameter] = value
    return params


def _picked(text: str) -> dict[str, list[int]]:
    try:
        picked = json.loads(text) if text else {}
        if not all(isinstance(i, int) for indices in picked.values() for i in indices):
            raise TypeError("indices must be whole numbers")
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"""--samples must be JSON such as '{{"heldout": [0, 5]}}': {error}""") from None
    return picked


def _pairs(flag: str, text: str, *, lists: bool = False) -> dict[str, str]:
    """Names and values; with `lists` a part without a name belongs to the value before it."""
    from configs.fields import split

    pairs: dict[str, str] = {}
    for part in split(text):
        name, equals, value = part.partition("=")
        if not equals and lists and pairs:
            pairs[next(reversed(pairs))] += f":{part.strip()}"
            continue
        if not equals:
            raise ConfigError(f"{flag} needs name=value with commas between, got {part!r}")
        pairs[name.strip()] = value.strip()
    return pairs


def _number(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _file(path: pathlib.Path) -> dict[str, Any]:
    import yaml

    if path.suffix == ".py":
        raise ConfigError(
            f"--config={path} is a model's config: give it as --model={path}; --config reads YAML or JSON"
        )
    if not path.is_file():
        raise ConfigError(f"--config={path}: there is no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config={path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config={path} must hold names and values of flags")
    return values


def _check_corpus(folder: pathlib.Path, results: "Results") -> None:
    """Says so when the held-out text is not that of the run: another interpreter has another standard library."""
    from evaluation import runs

    before = runs.read([folder])[0].described.get("corpus", {}).get("hash")
    now = results.run.get("corpus", {}).get("hash")
    if before and now and before != now:
        print(
            f"warning: the corpus has changed since {folder} was evaluated ({before[:12]}, now {now[:12]})",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A bar on a terminal; nothing elsewhere, where the tables say enough."""
    import jax
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, quiet=jax.process_index() > 0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        job = bar.add_task("loading", total=None)
        yield lambda what, done, total: bar.update(job, description=what, completed=done, total=total)


if __name__ == "__main__":
    command_line.run(main)
