"""The one loop: config -> data -> model -> step -> checkpoint -> metrics.

    python train.py --config=configs/lm.py:attention=mla,smoke
    python train.py --config=configs/lm.py --config.model.width=512 --print
    python train.py --sweep=configs/sweeps/quickstart.py

A run folder (runs/<name>, or `config.run_dir`) holds everything. The same command again continues an interrupted run
where its newest sound checkpoint stands, with bitwise the losses it would have had. SIGTERM saves and leaves with
status 0. Several processes (hosts) each run the same command with --coordinator, --num_processes and --process_id.
"""

import contextlib
import dataclasses
import errno
import pathlib
import signal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ml_collections

from configs import command_line, validate
from configs.command_line import Option
from configs.errors import ConfigError, UserError

if TYPE_CHECKING:
    from training.checkpoints import Checkpoints
    from training.run_folder import RunFolder
    from training.setup import Training
    from training.state import State

OPTIONS = {
    "print": Option(False, "show config, parameters, FLOPs, memory and mesh; allocate nothing, train nothing"),
    "sweep": Option("", "a file of configs/sweeps/: its runs in turn, the finished ones skipped, and one report"),
    "coordinator": Option("", "several processes: where they meet, as host:port"),
    "num_processes": Option(1, "several processes: how many"),
    "process_id": Option(-1, "several processes: which one this is, from 0"),
}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run leaves: its folder, every number of its last step, and the signal that ended it early (0: none)."""

    run_dir: pathlib.Path
    metrics: dict[str, Any]
    stopped: int = 0


def run(config: ml_collections.ConfigDict) -> RunResult:
    """Trains what `config` describes, from its newest sound checkpoint if there is one, to its end or to a signal.

    The order of the loop must stay: evaluate, save, take the batch, step, log. A checkpoint then holds the position
    of the data before the batch it has not seen, and a resumed run repeats nothing and leaves nothing out.

    Raises UserError for everything that its caller can put right; among these NotFinite, with the state saved, and
    CheckpointError, with the earlier checkpoints intact.
    """
    validate.check(config)
    # Heavy imports come after the checks that need none, so that a mistake in the config is told at once.
    import jax

    if config.train.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.train.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    import data
    import sharding
    from training import evaluating, journal, processes, profiling, progress, run_folder, setup
    from training.checkpoints import Checkpoints

    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(processes.Interruption())
        folder = stack.enter_context(run_folder.RunFolder(config, primary=processes.first()))
        bar = stack.enter_context(progress.Bar(config.name, config.train.steps, quiet=not processes.first()))
        finished = folder.finished()
        if finished:
            bar.say(f"{folder.path} is finished at step {finished['step']}: nothing to do")
            return RunResult(folder.path, finished["metrics"])

        layout = sharding.build(config.sharding)
        reader, readers = layout.reader()
        pipeline = data.build(config.data, seed=config.seed, process_index=reader, process_count=readers)
        structure = setup.network(config, pipeline.tokenizer)
        training = setup.build(config, structure, layout, pipeline.tokenizer)
        checkpoints = stack.enter_context(Checkpoints(folder.checkpoints, config.checkpoint, bar.say))
        batches = stack.enter_context(contextlib.closing(pipeline.train()))
        state, elapsed = begin(config, training, folder, checkpoints, batches, pipeline.tokenizer)

        step = start = int(state.step)
        bar.begin(start)
        clock = progress.Clock(elapsed)
        log = stack.enter_context(journal.Journal(config, folder, bar, clock, training, start))
        trace = stack.enter_context(profiling.Trace(folder.path / "profile", config.log.profile_steps))

        def save(position: Any) -> None:
            checkpoints.save(state, position, setup.meta(config, pipeline, clock.seconds()))

        try:
            while True:
                last = step >= config.train.steps
                stopping = not last and interruption.requested(step)
                evaluates = (last or due(step, config.eval.every)) and not stopping and step not in log.evaluated
                saves = last or stopping or (due(step, config.checkpoint.every) and step > start)

                if evaluates or saves:
                    log.catch_up()  # Files are complete up to here, should the run end after the save.
                if evaluates:
                    with clock.pause():
                        log.write_evaluation(step, *evaluating.evaluate(config, training, pipeline, state, bar, last))
                if saves:
                    with clock.pause():
                        save(batches.get_state())
                if last or stopping:
                    break

                position = batches.get_state()
                batch = layout.put(next(batches))
                step += 1
                trace.before(step)
                state, report = training.step(state, batch)
                trace.after(step, report)
                log.note(step, report, position)  # Reads the report of the step before.
                checkpoints.check()
        except journal.NotFinite as error:
            save(error.position)
            raise
        checkpoints.wait()
        metrics = log.last(step)
        if stopping:
            why = signal.Signals(interruption.signal or signal.SIGTERM).name
            bar.say(f"stopped by {why} after step {step}, saved; the same command continues {folder.path}")
            return RunResult(folder.path, metrics, interruption.signal or signal.SIGTERM)
        finish(folder, step, metrics, bar)
        return RunResult(folder.path, metrics)


def begin(
    config: ml_collections.ConfigDict,
    training: "Training",
    folder: "RunFolder",
    checkpoints: "Checkpoints",
    batches: Any,
    tokenizer: Any,
) -> tuple["State", float]:
    """The state to go on from, and the seconds already trained: own checkpoint, else another run's weights, else drawn.

    Leaves `batches` and the run folder where that state left them.
    """
    import jax

    restored = checkpoints.restore(training.abstract)
    if restored is not None:
        batches.set_state(restored.position)
        folder.rewind(restored.step)
        folder.write_config()
        return restored.state, restored.meta["elapsed"]
    folder.rewind(0)
    folder.write_config()
    folder.write_tokenizer(tokenizer)
    state = training.init(jax.random.key(config.seed))
    if config.train.init_from:
        from training import loading

        state = loading.start_from(config.train.init_from, state, training.structure, training.layout)
    return state, 0.0


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after `step` steps."""
    return every > 0 and step > 0 and step % every == 0


def finish(folder: "RunFolder", step: int, metrics: dict[str, Any], bar: Any) -> None:
    """The report, and the mark that the run is done."""
    from training import processes

    if not processes.first():
        return
    from evaluation import report

    page = folder.path / "report.html"
    report.write([folder.path], page)
    folder.finish(step, metrics)
    bar.doing("done")
    bar.say(f"done: {page}")


def main(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    config, flags = command_line.parse(argv, OPTIONS)
    if config is None and not flags.sweep:
        raise ConfigError("nothing to train: give --config=configs/lm.py, or --sweep=configs/sweeps/quickstart.py")
    with told():
        join(flags)
        if flags.sweep:
            from training import sweeps

            return sweeps.run(flags.sweep, config, told()(run), only_print=flags.print)
        if flags.print:
            from training import summary

            print(summary.text(config))
            return 0
        stopped = run(config).stopped
    return 130 if stopped == signal.SIGINT else 0


def join(flags: SimpleNamespace) -> None:
    """Meets the other processes of the run, if there are any."""
    if flags.coordinator or flags.num_processes > 1 or flags.process_id >= 0:
        from training import processes

        processes.join(flags.coordinator, flags.process_id, flags.num_processes)


@contextlib.contextmanager
def told() -> Any:
    """Makes what `data` and `sharding` (which know nothing of configs) and the disk complain of into UserErrors."""
    from data.errors import DataError
    from sharding.logical import ShardingError

    try:
        yield
    except (DataError, ShardingError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise UserError(f"{error.filename or 'a file of the run'} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    command_line.run(main)
