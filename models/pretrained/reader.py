"""The tensors of a Hugging Face folder: everything about them is checked when it is opened, nothing is read before.

The safetensors library checks each file (its header against its length, offsets without gap or overlap, sizes against
shapes); here the files are checked against the index and against each other, and tensors are seen as views of the
mapped file, so that reading one costs no copy of it.
"""

import json
import mmap
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import safetensors

from models.pretrained.errors import PretrainedError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_LARGEST = {"config.json": 1 << 20, INDEX: 1 << 26}  # Bytes; the largest indices in use have some 10 MB.
_LARGEST_HEADER = 100_000_000  # The library's own bound.
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """A tensor before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str
    offset: int


class Source(Protocol):
    """Tensors by name. `read` gives a view that holds until `release` of its file."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What there is."""

    def read(self, name: str) -> np.ndarray:
        """The tensor."""

    def release(self, file: str) -> None:
        """Lets a file go; it can be read again."""


class Folder:
    """The safetensors of a folder: model.safetensors, or shards with model.safetensors.index.json.

    Raises PretrainedError, naming file and tensor, for whatever does not hold together.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.entries: dict[str, Entry] = {}
        self._open: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()
        index = None if (self.path / WHOLE).exists() else self._index()
        for file in [WHOLE] if index is None else sorted(set(index.values())):
            self._add(file, None if index is None else {name for name, where in index.items() if where == file})

    def read(self, name: str) -> np.ndarray:
        """A view of the mapped file; touched pages belong to the process until `release`."""
        entry = self.entries[name]
        with self._lock:
            if entry.file not in self._open:
                with open(self._inside(entry.file), "rb") as stream:
                    self._open[entry.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            mapped = self._open[entry.file]
        return np.ndarray(entry.shape, entry.dtype, mapped, entry.offset)

    def release(self, file: str) -> None:
        """Forgets the mapping; views that are still held keep it alive."""
        self._open.pop(file, None)

    def _index(self) -> dict[str, str]:
        if not (self.path / INDEX).exists():
            pickled = sorted(item.name for item in self.path.iterdir() if item.suffix in _PICKLED)
            if pickled:
                raise PretrainedError(
                    f"{self.path / pickled[0]}: pickled weights can run code and are never opened: "
                    "convert them to safetensors first"
                )
            raise PretrainedError(f"{self.path} has neither {WHOLE} nor {INDEX}")
        index = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise PretrainedError(f"{self.path / INDEX}: weight_map must name the file of each tensor")
        for name, file in index.items():
            if not isinstance(file, str) or not file.endswith(".safetensors") or pathlib.PurePath(file).name != file:
                raise PretrainedError(
                    f"{self.path / INDEX}: tensor {name} is said to be in {file!r}, which is no safetensors file of "
                    "this folder"
                )
        return index

    def _inside(self, file: str) -> pathlib.Path:
        """The file, which may be a link only to where a hub's cache keeps files: two folders up, in blobs."""
        place, folder = self.path / file, self.path.resolve()
        found = place.resolve()
        if found.parent != folder and found.parent != folder.parent.parent / "blobs":
            raise PretrainedError(f"{place} is a link out of its folder, to {found}: copy the file instead")
        return place

    def _add(self, file: str, wanted: set[str] | None) -> None:
        path = self._inside(file)
        if not path.is_file():
            tensor = f": the index has tensors such as {min(wanted)} in it" if wanted else ""
            raise PretrainedError(f"{path} is missing{tensor}")
        for name, entry in _header(path, file).items():
            if name in self.entries:
                raise PretrainedError(f"{path}: tensor {name} is also in {self.entries[name].file}")
            if wanted is not None and name not in wanted:
                raise PretrainedError(f"{path}: holds tensor {name}, which {INDEX} does not say")
            self.entries[name] = entry
        absent = (wanted or set()) - self.entries.keys()
        if absent:
            raise PretrainedError(f"{path}: tensor {min(absent)} is missing, which {INDEX} says is there")


def _header(path: pathlib.Path, file: str) -> dict[str, Entry]:
    try:
        with safetensors.safe_open(path, framework="np"):  # Checks the header and the length of the file.
            pass
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            rows = json.loads(stream.read(min(length, _LARGEST_HEADER)), object_pairs_hook=list)
    except safetensors.SafetensorError as error:
        raise PretrainedError(f"{path} is damaged or no safetensors file: {error}") from error
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} is damaged: its header cannot be read ({error})") from error
    found: dict[str, Entry] = {}
    for name, fields in rows:
        if name == "__metadata__":
            continue
        if name in found:
            raise PretrainedError(f"{path}: tensor {name} is there twice")
        fields = dict(fields)
        if fields["dtype"] not in _DTYPES:
            raise PretrainedError(f"{path}: tensor {name} is of type {fields['dtype']}, which cannot be read")
        dtype, offset = np.dtype(_DTYPES[fields["dtype"]]), 8 + length + fields["data_offsets"][0]
        found[name] = Entry(tuple(fields["shape"]), dtype, file, offset)
    return found


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; PretrainedError if it is missing, too large, or something else."""
    try:
        with open(path, "rb") as stream:
            largest = _LARGEST.get(path.name, 1 << 20)
            text = stream.read(largest + 1)
        if len(text) > largest:
            raise PretrainedError(f"{path} has more than {largest:,} bytes: that is no {path.name}")
        found = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read: {error.strerror}") from error
    except PretrainedError:
        raise
    except (ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise PretrainedError(f"{path} must be a JSON object")
    return found


def _unique(path: pathlib.Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PretrainedError(f"{path}: {twice} is there twice")
    return found
