"""The folder of one run: who may write in it, whose it is, and files that read as one uninterrupted run."""

import fcntl
import json
import os
import pathlib
import shutil
import socket
from typing import Any

import ml_collections

from configs import fields
from configs.errors import ConfigError, UserError
from training import manifest, processes

# A resumed run may change these: what is seen and kept of it, and how long it goes on. Nothing of them is in a step.
FREE = ("train.steps", "train.compilation_cache", "log.", "eval.", "checkpoint.", "run_dir", "data.workers",
        "data.tokenizer_cache")  # fmt: skip

LINES = ("metrics.jsonl", "eval.jsonl", "samples.jsonl")


class RunFolderError(UserError):
    """A run folder that cannot be used."""


def path_of(config: ml_collections.ConfigDict) -> pathlib.Path:
    """`config.run_dir`, or runs/<name>."""
    return pathlib.Path(config.run_dir or f"runs/{config.name}")


class RunFolder:
    """The folder, held by this process until the `with` block ends. With several processes, process 0 alone holds it.

    Raises RunFolderError if another live process holds it, and ConfigError if it belongs to a run of another config.
    """

    def __init__(self, config: ml_collections.ConfigDict, *, primary: bool = True) -> None:
        self.path, self.config, self.primary = path_of(config), config, primary
        self._lock: Any = None

    def __enter__(self) -> "RunFolder":
        if self.primary:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunFolderError(f"run folder {self.path} cannot be made: {error.strerror}") from error
            self._take_lock()
        try:
            self._check_config()
        except ConfigError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        if self._lock is not None:
            self._lock.close()  # The operating system does the same for a process that is killed.
            self._lock = None

    @property
    def checkpoints(self) -> pathlib.Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    def write_config(self) -> None:
        """Says which config the folder belongs to."""
        if self.primary:
            manifest.write_atomically(self.path / "config.json", json.dumps(fields.plain(self.config), indent=1) + "\n")

    def write_tokenizer(self, tokenizer: Any) -> None:
        """Keeps the tokenizer, so that the folder alone is enough to use the model."""
        if self.primary:
            tokenizer.save(self.path / "tokenizer")

    def finished(self) -> dict[str, Any] | None:
        """What `finish` wrote, if the run is as long as the config wants it; else None."""
        file = self.path / "finished.json"
        if not file.is_file():
            return None
        content = json.loads(file.read_text())
        return content if content["step"] >= self.config.train.steps else None

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        """Marks the run as done."""
        if self.primary:
            manifest.write_atomically(
                self.path / "finished.json", json.dumps({"step": step, "metrics": metrics}, indent=1)
            )

    def rewind(self, step: int) -> None:
        """Makes the folder that of a run which has just reached `step`: later lines go, also half a last line."""
        if self.primary:
            (self.path / "finished.json").unlink(missing_ok=True)
            for name in LINES:
                rewind(self.path / name, step)
            if step == 0:
                shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        processes.meet("run folder")  # What the others read of it from here on must be what is left.

    def _take_lock(self) -> None:
        # flock and not the mere file: it goes with the process, however that ends, so it is never left behind.
        lock = open(self.path / "lock", "a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise RunFolderError(
                f"run folder {self.path} is in use by {holder}: wait for it, or give another config.run_dir"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock

    def _check_config(self) -> None:
        file = self.path / "config.json"
        # Without a checkpoint there is nothing to continue, and the run starts anew with whatever config it now has.
        if not file.is_file() or not any(self.checkpoints.glob(f"*/{manifest.NAME}")):
            return
        changed = changes(read_config(self.path), self.config)
        if changed:
            raise ConfigError(
                f"run folder {self.path} belongs to a run with {'; '.join(changed)}: give another config.run_dir, or "
                "take these fields back to continue it"
            )


def read_config(folder: pathlib.Path) -> ml_collections.ConfigDict:
    """The config of the run in `folder`; RunFolderError if there is none."""
    file = folder / "config.json"
    if not file.is_file():
        raise RunFolderError(f"{folder} is not a run folder: it has no config.json")
    try:
        content = json.loads(file.read_bytes())
        if "model_type" in content and "model" not in content:
            raise RunFolderError(
                f"{folder} is a Hugging Face folder, no run: first python eval.py import {folder} --output=RUN"
            )
        return fields.from_plain(content)
    except ValueError as error:
        raise RunFolderError(f"{file} is damaged: {error}") from error


def changes(before: ml_collections.ConfigDict, now: ml_collections.ConfigDict) -> list[str]:
    """The fields that differ and that a resumed run may not change, as `config.x = old (now new)`."""
    old, new = fields.flat(before), fields.flat(now)
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return [
        f"config.{name} = {old.get(name, 'absent')!r} (now {new.get(name, 'absent')!r})"
        for name in differing
        if not name.startswith(FREE)
    ]


def rewind(file: pathlib.Path, step: int) -> None:
    """Keeps the lines of a JSON-lines file up to `step`; a last line without its end was being written at a crash."""
    if not file.is_file():
        return
    with open(file, "rb+") as lines:
        keep = 0
        for line in lines:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            keep += len(line)
        lines.truncate(keep)


def append(file: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Adds lines to a JSON-lines file."""
    with open(file, "a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def lines(file: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
