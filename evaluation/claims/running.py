"""Measures a claim seed by seed, keeping what each seed gave as soon as it is done."""

import dataclasses
import datetime
import hashlib
import json
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from configs import fields
from evaluation import results
from evaluation.claims.contract import Claim, ClaimContext, Convert, Number, Train, Trained
from evaluation.claims.record import Measurement, Record, judged, plain_json
from evaluation.claims.watch import Watch
from evaluation.contract import EvaluationError

HOME = pathlib.Path("runs/claims")  # Trained runs, and the seeds of claims that are not complete yet.


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one seed gave."""

    seed: int
    numbers: tuple[Number, ...]
    runs: tuple[Mapping[str, Any], ...]
    commit: str | None
    date: str
    seconds: float


class Kept:
    """The outcomes of a claim's seeds under the same circumstances, one file each."""

    def __init__(self, claim: Claim, parameters: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        circumstances = {
            "version": claim.version,
            "parameters": {name: value for name, value in parameters.items() if name != "seeds"},
            "environment": {name: environment[name] for name in ("jax", "platform", "device_kind", "devices")},
        }
        self.folder = HOME / claim.slug / _digest(circumstances)

    def read(self, seed: int) -> Outcome | None:
        """What was kept; EvaluationError, naming the file, for a damaged one."""
        path = self._path(seed)
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            numbers = [Number(**{**each, "value": float(each["value"])}) for each in content.pop("numbers")]
            return Outcome(numbers=tuple(numbers), runs=tuple(content.pop("runs")), **content)
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{path} is damaged ({error!r}): delete it to have the seed measured again"
            ) from error

    def write(self, outcome: Outcome) -> None:
        """Keeps it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        results.write_atomic(self._path(outcome.seed), json.dumps(plain_json(dataclasses.asdict(outcome)), indent=1))

    def forget(self) -> None:
        """After the record is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, seed: int) -> pathlib.Path:
        return self.folder / f"seed-{seed}.json"


def measure(
    claim: Claim, parameters: Mapping[str, Any], train: Train, watch: Watch, convert: Convert | None = None
) -> tuple[Record, Kept]:
    """Every seed measured, or found among those kept, and the checks decided; and what was kept, to be forgotten."""
    environment, seeds = results.environment(), parameters["seeds"]
    kept, outcomes = Kept(claim, parameters, environment), []
    for place, seed in enumerate(seeds, 1):
        head, outcome = f"[{place}/{len(seeds)}] {claim.slug}, seed {seed}", kept.read(seed)
        if outcome is not None:
            watch.say(f"{head}: kept from {outcome.date} in {kept.folder}")
        else:
            watch.say(head)
            outcome = _one(claim, parameters, seed, train, watch, convert)
            kept.write(outcome)
        outcomes.append(outcome)
    commits = dict.fromkeys(outcome.commit for outcome in outcomes if outcome.commit)
    record = Record(
        slug=claim.slug,
        title=claim.title,
        paper=claim.paper,
        says=claim.says,
        setting=claim.setting,
        version=claim.version,
        checks=(),
        tables=(),
        measurements=_gathered(claim.slug, outcomes),
        seeds=tuple(seeds),
        parameters=dict(parameters),
        changed={name: claim.defaults[name] for name in parameters if parameters[name] != claim.defaults[name]},
        command=claim.command(parameters),
        runs=tuple({"seed": outcome.seed, **run} for outcome in outcomes for run in outcome.runs),
        environment=environment,
        commits=tuple(commits),
        date=max(outcome.date for outcome in outcomes),
        seconds=round(sum(outcome.seconds for outcome in outcomes), 1),
    )
    return judged(record, claim), kept


def _one(
    claim: Claim, parameters: Mapping[str, Any], seed: int, train: Train, watch: Watch, convert: Convert | None
) -> Outcome:
    began, runs = time.perf_counter(), []

    def trained(config: ml_collections.ConfigDict) -> Trained:
        folder = run_folder(config)
        reused = (folder / "finished.json").is_file()
        watch.pause()  # The run has a bar of its own.
        run = train(fields.apply(config, {"run_dir": str(folder)}))
        runs.append({"folder": str(folder), "step": int(run.step), "reused": reused})
        return run

    def converted(run_dir: str, options: dict[str, Any]) -> pathlib.Path:
        folder = HOME / "converted" / f"{results.sanitise(options['to'])}-{_digest([run_dir, options])}"
        if not (folder / "converted").is_file():  # Or one was broken off.
            shutil.rmtree(folder, ignore_errors=True)
            convert(run_dir, folder, **options)
            (folder / "converted").touch()
        return folder

    context = ClaimContext(seed, parameters, trained, watch.report, converted if convert else None)
    try:
        numbers = _distinct(claim.slug, claim.run(context))
    finally:
        watch.pause()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").removesuffix("+00:00") + "Z"
    return Outcome(seed, numbers, tuple(runs), _commit(), date, round(time.perf_counter() - began, 3))


def run_folder(config: ml_collections.ConfigDict) -> pathlib.Path:
    """Where a claim's run of `config` goes: the same place for the same config, another one for any other."""
    content = {name: value for name, value in fields.plain(config).items() if name != "run_dir"}
    return HOME / "trained" / f"{results.sanitise(config.name)}-{_digest(content)}"


def _gathered(slug: str, outcomes: Sequence[Outcome]) -> tuple[Measurement, ...]:
    """The numbers of all seeds side by side; every seed must have given the same ones."""
    first, *others = ({_identity(each): each for each in outcome.numbers} for outcome in outcomes)
    for outcome, other in zip(outcomes[1:], others, strict=True):
        if differing := sorted(map(str, first.keys() ^ other.keys())):
            raise ValueError(f"claim {slug}: seeds {outcomes[0].seed} and {outcome.seed} differ in {differing[0]}")
    return tuple(
        Measurement(each.name, each.unit, each.keys, tuple(seed[identity].value for seed in (first, *others)))
        for identity, each in first.items()
    )


def _distinct(slug: str, numbers: Iterable[Number]) -> tuple[Number, ...]:
    found = tuple(numbers)
    if not found or len({_identity(each) for each in found}) < len(found):
        raise ValueError(f"claim {slug} gave {'two numbers of one name and keys' if found else 'no numbers'}")
    return found


def _identity(each: Number) -> tuple[str, frozenset[tuple[str, str]]]:
    return each.name, frozenset(each.keys.items())


def _digest(content: Any) -> str:
    text = json.dumps(plain_json(content), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def _commit() -> str | None:
    """The commit of this code, with `+changes` where tracked files differ from it."""
    commit = results.git_hash()
    if commit is None:
        return None
    command, folder = ["git", "status", "--porcelain", "--untracked-files=no"], pathlib.Path(__file__).parent
    changed = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False).stdout.strip()
    return f"{commit}+changes" if changed else commit
