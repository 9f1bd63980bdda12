"""State, data position and meta on disk: written in the background, proven sound before they are used again.

A checkpoint is `<folder>/<step>/`, written by orbax, with the items

    model       step, parameters, other variables, average, rng   (what evaluation reads)
    optimizer   optax's state
    data        the position of the data, the same for every process
    meta        config, corpus, versions, elapsed seconds

and a `manifest.json` with the hash of every file, which appears, in one piece, after everything else is on disk. Only a
folder with a manifest that holds is a checkpoint: a process killed at any moment, a full disk and a damaged file all
leave either a sound checkpoint or none. Old ones go after the new one has its manifest.
"""

import concurrent.futures
import dataclasses
import errno
import logging
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import orbax.checkpoint as ocp

from configs.errors import UserError
from sharding.layout import name_of
from training import manifest, processes
from training.state import State

# orbax tells at length what it is about to do, and prints the traceback of an error that it also raises.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in pathlib.Path(record.pathname).parts)

DAMAGED = "damaged"  # Beside the checkpoints: where those that did not hold are put.


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read."""

    state: State
    position: Any
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return self.meta["step"]


class Checkpoints:
    """The checkpoints of one run. One writer at a time: the run folder's lock sees to that.

    `say` receives one line for each thing worth telling: a damaged checkpoint, an interrupted save.
    """

    def __init__(
        self, folder: pathlib.Path, options: ml_collections.ConfigDict, say: Callable[[str], None] = print
    ) -> None:
        self.folder, self.keep, self.say = folder.absolute(), options.keep, say
        self._asynchronous = options.asynchronous
        self._saver = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        if processes.first():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
        processes.meet("checkpoint folder")

    def __enter__(self) -> "Checkpoints":
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            self.wait()
        except CheckpointError as late:
            if error is None:
                raise
            self.say(str(late))  # The run already ends with an error of its own.
        finally:
            self._background.shutdown()
            self._saver.close()
            sys.unraisablehook = self._hook

    def steps(self) -> list[int]:
        """The steps that have a manifest, oldest first. Whether they hold is not looked at."""
        return steps(self.folder)

    def save(self, state: State, position: Any, meta: dict[str, Any]) -> None:
        """Writes the checkpoint of `state.step`, unless there is one; the arrays are copied before this returns.

        Raises CheckpointError for this save, or for the one before it if that failed in the background.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps():
            return
        self._guard(step, lambda: self._check_room(state))
        meta = {**meta, "step": step}
        self._guard(step, lambda: self._saver.save(self.folder / str(step), args=_arguments(state, position, meta)))
        self._pending = (step, self._background.submit(self._finish, step))
        if not self._asynchronous:
            self.wait()

    def check(self) -> None:
        """Raises CheckpointError if a save has failed in the background; does not wait, nor for other processes."""
        if self._pending and self._pending[1].done() and self._pending[1].exception():
            (step, future), self._pending = self._pending, None
            self._guard(step, future.result)

    def wait(self) -> None:
        """Waits for the save under way, and raises CheckpointError if it failed."""
        if self._pending:
            step, future = self._pending
            self._pending = None
            self._guard(step, future.result)
            processes.meet(f"checkpoint {step}")

    def restore(self, abstract: State) -> Restored | None:
        """The newest sound checkpoint, as arrays with the shapes and shardings of `abstract`; None if none was made.

        Those that do not hold are named through `say` and put aside. Raises CheckpointError if there were some and
        none of them holds, or if the checkpoint is that of another model.
        """
        step = processes.agree(self._newest() if processes.first() else 0)
        if step < 0:
            return None
        return read(self.folder / str(step), abstract)

    def _check_room(self, state: State) -> None:
        """The full disk that can be foreseen, told before anything is written; all processes hear of it."""
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if processes.agree(int(needed > free)):
            raise OSError(errno.ENOSPC, f"No space left on device ({needed:,} bytes needed, {free:,} free)")

    def _newest(self) -> int:
        found, problems = self.steps(), []
        for step in reversed(found):
            problem = manifest.problem(self.folder / str(step))
            if problem is None:
                if problems:
                    self.say(f"resuming from checkpoint {step} instead")
                return step
            problems.append(f"checkpoint {step} is damaged: {problem}")
            self.say(f"{problems[-1]}; put aside in {self._put_aside(step)}")
        if problems:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in {self.folder} is sound ({problems[0]}): give another "
                "config.run_dir, or delete this one to start anew"
            )
        return -1

    def _finish(self, step: int) -> None:
        self._saver.wait_until_finished()
        if processes.first():
            manifest.write(self.folder / str(step))
            for old in self.steps()[: -self.keep]:
                (self.folder / str(old) / manifest.NAME).unlink()  # First, so that half a deletion is no checkpoint.
                shutil.rmtree(self.folder / str(old))

    def _guard(self, step: int, action: Callable[[], Any]) -> None:
        """Runs `action`; what the disk has against it becomes a CheckpointError, and no partial checkpoint stays."""
        try:
            action()
        except Exception as error:
            reason = _disk_trouble(error)
            if reason is None:
                raise
            if processes.first():
                self._settle()
            newest = self.steps()[-1:]
            earlier = f"checkpoint {newest[0]} and those before it are intact" if newest else "there was none before it"
            raise CheckpointError(
                f"checkpoint {step} could not be written to {self.folder}: {reason}; {earlier}. Make room and run the "
                "same command again"
            ) from error

    def _settle(self) -> None:
        """Removes what a failed save left, until the writers that were still under way have given up too."""
        quiet = 0
        for _ in range(60):
            quiet = 0 if self._remove_unfinished() else quiet + 1
            if quiet == 3:
                return
            time.sleep(0.05)

    def _unraisable(self, fault: Any) -> None:
        # The other writers of a save that failed report to an event loop that is gone. The failure itself is raised.
        if not (isinstance(fault.exc_value, RuntimeError) and str(fault.exc_value) == "Event loop is closed"):
            self._hook(fault)

    def _clean(self) -> None:
        for name in self._remove_unfinished():
            self.say(f"checkpoint {name} was never finished: removed")

    def _remove_unfinished(self) -> list[str]:
        """Removes the folders of saves and deletions that were cut short; the steps they were of."""
        ours = [path for path in self.folder.iterdir() if path.name.partition(".")[0].isdigit()]
        unfinished = [path for path in ours if not (path / manifest.NAME).is_file()]
        for path in unfinished:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        return sorted(path.name.partition(".")[0] for path in unfinished)

    def _put_aside(self, step: int) -> pathlib.Path:
        place = self.folder.parent / DAMAGED / str(step)
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        (self.folder / str(step)).rename(place)
        return place


def steps(folder: pathlib.Path) -> list[int]:
    """The steps in a checkpoint folder that have a manifest, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        int(path.name) for path in folder.iterdir() if path.name.isdigit() and (path / manifest.NAME).is_file()
    )


def read(folder: pathlib.Path, abstract: State) -> Restored:
    """The checkpoint in `folder`, not verified. `abstract.opt_state` None leaves the optimiser's state unread."""
    meta = read_meta(folder)
    model, optimizer = _as_items(abstract)
    names = {"model": model} | ({"optimizer": optimizer} if abstract.opt_state is not None else {})
    for item, wanted in names.items():
        _compare(folder, item, wanted)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        found = reader.restore(
            folder.absolute(),
            args=ocp.args.Composite(
                data=ocp.args.JsonRestore(),
                **{item: ocp.args.StandardRestore(wanted) for item, wanted in names.items()},
            ),
        )
    return Restored(_from_items(abstract, found), found["data"]["position"], meta)


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """The meta item of the checkpoint in `folder`."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(folder.absolute(), args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def _arguments(state: State, position: Any, meta: dict[str, Any]) -> ocp.args.Composite:
    model, optimizer = _as_items(state)
    return ocp.args.Composite(
        model=ocp.args.StandardSave(model),
        optimizer=ocp.args.StandardSave(optimizer),
        data=ocp.args.JsonSave({"position": position}),
        meta=ocp.args.JsonSave(meta),
    )


def _as_items(state: State) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state as two flat dicts of arrays, keys as their data."""
    parts = {"step": state.step, "halted": state.halted, "rng": state.rng}
    for name in ("params", "rest", "ema"):
        parts |= {f"{name}/{leaf}": value for leaf, value in getattr(state, name).items()}
    optimizer = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    # orbax refuses an item without arrays, and plain gradient descent has no state.
    optimizer["step"] = state.step
    return jax.tree.map(_data_of_key, parts), jax.tree.map(_data_of_key, optimizer)


def _from_items(abstract: State, found: Any) -> State:
    model = found["model"]

    def part(name: str) -> dict[str, Any]:
        return {leaf: _key_of_data(like, model[f"{name}/{leaf}"]) for leaf, like in getattr(abstract, name).items()}

    opt_state = None
    if abstract.opt_state is not None:
        paths, treedef = jax.tree_util.tree_flatten_with_path(abstract.opt_state)
        values = [_key_of_data(like, found["optimizer"][name_of(path)]) for path, like in paths]
        opt_state = jax.tree_util.tree_unflatten(treedef, values)
    return State(
        step=model["step"],
        halted=jnp.zeros_like(model["halted"]),  # What halted the run may have been put right since.
        params=part("params"),
        rest=part("rest"),
        opt_state=opt_state,
        ema=part("ema"),
        rng=_key_of_data(abstract.rng, model["rng"]),
    )


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _data_of_key(x: Any) -> Any:
    if not _is_key(x):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=x.sharding)
    return jax.random.key_data(x)


def _key_of_data(like: Any, x: Any) -> Any:
    return jax.random.wrap_key_data(x) if _is_key(like) else x


def _compare(folder: pathlib.Path, item: str, wanted: dict[str, Any]) -> None:
    """CheckpointError unless the item has exactly the arrays that are wanted."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        saved = reader.metadata((folder / item).absolute()).item_metadata
    saved = {name: tuple(value.shape) for name, value in saved.items()}
    wanted = {name: tuple(value.shape) for name, value in wanted.items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            shown = [
                str(list(shape)) if shape is not None else "nothing" for shape in (saved.get(name), wanted.get(name))
            ]
            raise CheckpointError(
                f"{folder} is not a checkpoint of this model: {name} is {shown[0]} there and {shown[1]} here"
            )


def _disk_trouble(error: BaseException | None) -> str | None:
    """The line in which the operating system refused to write, or None if the error is something else."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return f"{error.strerror}"
        text = str(error)
        for sign in ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied",
                     "Input/output error", "File too large"):  # fmt: skip
            if sign in text:
                return sign
        error = error.__cause__ or error.__context__
    return None
