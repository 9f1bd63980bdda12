"""Which files a source means: a folder, a file, a glob, or the interpreter's own standard library."""

import collections
import dataclasses
import difflib
import glob
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from data.errors import DataError

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
}
STDLIB = "stdlib"
# Tests are out because half of the library's bytes are theirs; the rest does not belong to the library.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a source; `name` is relative to the source and has forward slashes on every system."""

    name: str
    path: Path
    kind: str  # text | jsonl | parquet


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of one source, sorted by name, and what was found there but is of no known kind."""

    spec: str
    files: tuple[File, ...]
    ignored: dict[str, int]  # Extension -> number of files.


def find(spec: str, *, max_files: int = 0) -> Source:
    """The files that `spec` names, in the order of their relative names.

    Folders are walked without entering hidden folders; in a glob `**` matches any depth. `max_files` above 0 keeps
    that many of the first. Raises DataError when nothing is there or nothing has a known extension.
    """
    if spec == STDLIB:
        named = _stdlib()
    elif os.path.isdir(root := os.path.expanduser(spec)):
        named = _walk(Path(root), lambda folder: not folder.startswith(".") and folder != "__pycache__")
    elif os.path.lexists(root):
        if kind(spec) is None:
            raise DataError(f"source {spec!r}: unknown kind of file; known: {' '.join(KINDS)}")
        named = [(os.path.basename(root), Path(root))]
    elif glob.has_magic(root):
        named = _matches(root)
    else:
        near = " (did you mean 'stdlib'?)" if difflib.get_close_matches(spec, [STDLIB], cutoff=0.7) else ""
        raise DataError(f"source {spec!r}: no such file or folder{near}; correct config.data.sources")

    files = sorted((File(name, path, k) for name, path in named if (k := kind(name))), key=lambda file: file.name)
    ignored = collections.Counter(Path(name).suffix.lower() or "no extension" for name, _ in named if not kind(name))
    if not files:
        others = ", ".join(f"{n} {suffix}" for suffix, n in ignored.most_common(3))
        raise DataError(f"source {spec!r}: no {' '.join(KINDS)} files there; found {others or 'no files at all'}")
    return Source(spec, tuple(files[:max_files] if max_files > 0 else files), dict(ignored.most_common()))


def kind(name: str) -> str | None:
    """How a file is read, by its extension; None when it is not one of KINDS."""
    lowered = name.lower()
    return next((KINDS[end] for end in KINDS if lowered.endswith(end)), None)


def _stdlib() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    named = _walk(root, lambda folder: folder not in _NOT_LIBRARY and not folder.startswith((".", "config-")))
    # The build's own settings lie there as a module too: they differ between two machines with the same Python.
    return [(name, path) for name, path in named if name.endswith(".py") and not name.startswith("_sysconfigdata")]


def _walk(root: Path, enter: Callable[[str], bool]) -> list[tuple[str, Path]]:
    def refuse(error: OSError) -> None:
        raise DataError(f"folder {error.filename!r}: {error.strerror}; make it readable or choose another source")

    def files() -> Iterator[tuple[str, Path]]:
        for folder, folders, names in os.walk(root, onerror=refuse):
            folders[:] = [name for name in folders if enter(name)]
            for name in names:
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path

    return list(files())


def _matches(pattern: str) -> list[tuple[str, Path]]:
    paths = [Path(match) for match in glob.glob(pattern, recursive=True) if not os.path.isdir(match)]
    if not paths:
        raise DataError(f"source {pattern!r}: the pattern matches no files; correct config.data.sources")
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    return [(path.relative_to(root).as_posix(), path) for path in paths]
