"""One file per task or family of tasks; `get(name)` and `match(patterns)` find them by name.

A file's `TASKS` lists what it defines. `include(folder)` adds files from elsewhere.
"""

import fnmatch
import functools
import importlib
import importlib.util
import pathlib
import pkgutil
from collections.abc import Iterable, Sequence

from configs.errors import unknown
from evaluation.contract import EvaluationError, Task

_included: dict[str, Task] = {}


@functools.cache
def _own() -> dict[str, Task]:
    found: dict[str, Task] = {}
    for module in pkgutil.iter_modules(__path__):
        _add(found, importlib.import_module(f"{__name__}.{module.name}").TASKS, module.name)
    return found


def names() -> tuple[str, ...]:
    """The tasks, sorted."""
    return tuple(sorted(_own() | _included))


def groups() -> dict[str, tuple[str, ...]]:
    """The tasks of each group, by the group's name."""
    members: dict[str, list[str]] = {}
    for task in (_own() | _included).values():
        if task.group:
            members.setdefault(task.group, []).append(task.name)
    return {group: tuple(sorted(tasks)) for group, tasks in sorted(members.items())}


def get(name: str) -> Task:
    """The task called `name`; EvaluationError naming the nearest ones if there is none."""
    known = _own() | _included
    if name not in known:
        raise EvaluationError(unknown("task", name, [*known, *groups()]))
    return known[name]


def match(patterns: Iterable[str]) -> list[Task]:
    """The tasks that names, groups and wildcards (`niah_*`) stand for, each once, in the order asked for."""
    known, grouped = names(), groups()
    chosen: list[str] = []
    for pattern in patterns:
        if pattern in known:
            chosen.append(pattern)
        elif pattern in grouped:
            chosen.extend(grouped[pattern])
        elif any(character in pattern for character in "*?["):
            hits = fnmatch.filter(known, pattern)
            if not hits:
                raise EvaluationError(f"no task matches {pattern!r}: known: {', '.join(known)}")
            chosen.extend(hits)
        else:
            get(pattern)
    if not chosen:
        raise EvaluationError(f"no task was named: known: {', '.join(known)}")
    return [get(name) for name in dict.fromkeys(chosen)]


def known(pattern: str) -> bool:
    """Whether a name, group or wildcard stands for any task here."""
    return pattern in groups() or bool(fnmatch.filter(names(), pattern))


def include(folder: str | pathlib.Path) -> Sequence[str]:
    """Adds the tasks of every .py file in `folder` (its `TASKS`); returns their names."""
    files = sorted(pathlib.Path(folder).glob("*.py"))
    if not files:
        raise EvaluationError(f"no task file (*.py with TASKS) in {folder}")
    added: dict[str, Task] = {}
    for file in files:
        spec = importlib.util.spec_from_file_location(f"included_task_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "TASKS"):
            raise EvaluationError(f"{file} does not define TASKS")
        _add(added, module.TASKS, str(file))
    clash = sorted(added.keys() & _own().keys())
    if clash:
        raise EvaluationError(f"{folder} defines task {clash[0]!r}, which exists already: rename it")
    _included.update(added)
    return tuple(added)


def _add(found: dict[str, Task], tasks: Iterable[Task], where: str) -> None:
    for task in tasks:
        if task.name in found:
            raise ValueError(f"{where} defines task {task.name!r}, which exists already")
        found[task.name] = task
