"""Where numbers go: JSON lines always, TensorBoard by default, Weights & Biases when asked for."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import ml_collections

from configs import fields
from configs.errors import ConfigError, UserError


class Writer(Protocol):
    """One place for numbers."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The values after `step` steps."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class JsonLines:
    """One object per line, each line on disk before the next step: {"step": 10, "time": 1.5, "loss": 3.2, ...}."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._file = open(path, "a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends a line; numbers that are not finite become null, which every JSON reader knows."""
        line = json.dumps({"step": step, **{name: _plain(value) for name, value in values.items()}}, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}; checkpoints are intact") from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Event files; `start` hides what an interrupted run wrote after the step that it resumed from."""

    def __init__(self, folder: pathlib.Path, start: int) -> None:
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar per finite value."""
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes."""
        self._writer.close()


class WeightsAndBiases:
    """A run of that service, continued under the same id when the run folder is."""

    def __init__(self, folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "config.log.wandb needs the package wandb: pip install wandb, or set it to false"
            ) from error
        self._run = wandb.init(
            project="tessera", name=config.name, id=_identifier(folder), dir=str(folder), resume="allow",
            config=fields.plain(config),
        )  # fmt: skip

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the service's run."""
        self._run.finish()


def writers(folder: pathlib.Path, config: ml_collections.ConfigDict, start: int) -> list[Writer]:
    """The writers that `config.log` asks for, for a run that starts or goes on at step `start`."""
    made: list[Writer] = [JsonLines(folder / "metrics.jsonl")]
    if config.log.tensorboard:
        made.append(TensorBoard(folder / "tensorboard", start))
    if config.log.wandb:
        made.append(WeightsAndBiases(folder, config))
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _identifier(folder: pathlib.Path) -> str:
    """An id of the service, drawn once per run folder."""
    import secrets

    file = folder / "wandb-id"
    if not file.is_file():
        file.write_text(secrets.token_hex(8))
    return file.read_text()
