"""The content hashes of a folder, written when it is complete: how damage is told from soundness, file by file."""

import concurrent.futures
import hashlib
import json
import os
import pathlib

NAME = "manifest.json"


def write(folder: pathlib.Path) -> None:
    """Writes `manifest.json` with size and SHA-256 of every file in `folder`, last and in one piece.

    A folder without the file is one whose writing, or whose deletion, was interrupted.
    """
    names = [path.relative_to(folder).as_posix() for path in _files(folder)]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashlib lets other threads run.
        entries = dict(zip(names, pool.map(lambda name: _entry(folder / name), names), strict=True))
    text = json.dumps({"files": entries, "sha256": _digest(entries)}, indent=1)
    write_atomically(folder / NAME, text)


def problem(folder: pathlib.Path) -> str | None:
    """What is wrong with `folder`, in a line that names the file; None if it is as its manifest says."""
    path = folder / NAME
    if not path.is_file():
        return f"{NAME} is missing: its writing was interrupted"
    try:
        content = json.loads(path.read_bytes())
        entries = content["files"]
        sound = content["sha256"] == _digest(entries)
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        return f"{NAME} itself is damaged"
    for name, (size, _) in sorted(entries.items()):  # Sizes first: they cost nothing.
        if not (folder / name).is_file():
            return f"{name} is missing"
        found = (folder / name).stat().st_size
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _entry(folder / name), sorted(entries))
        for name, entry in zip(sorted(entries), found, strict=True):
            if entry != entries[name]:
                return f"the content of {name} is not what was written"
    return None


def write_atomically(path: pathlib.Path, text: str) -> None:
    """The file at `path` is either what it was or `text`, whenever the process or the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)


def _entry(path: pathlib.Path) -> list[int | str]:
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _digest(entries: dict[str, list[int | str]]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
