"""Tasks of lm-evaluation-harness by name: its own and those of the user's folders, with local or the hub's data."""

import contextlib
import difflib
import fnmatch
import functools
import importlib.util
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from configs.errors import UserError, nearest
from evaluation.contract import EvaluationError
from evaluation.harness import files

INSTALL = "pip install 'tessera[harness]'"
LOCAL = ("json", "parquet")  # Builders whose data_files are read here.


def installed() -> bool:
    """Whether lm-evaluation-harness is there."""
    return importlib.util.find_spec("lm_eval") is not None


def _import() -> None:
    """Imports the harness: without its bars and its many warnings, and without the network unless that was asked for.

    HF_HUB_OFFLINE=0 in the environment lets tasks fetch their data from the hub.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", os.environ["HF_HUB_OFFLINE"])
    import datasets
    from lm_eval.api import task

    datasets.disable_progress_bars()
    # What tqdm itself heeds, TQDM_DISABLE, counts only where nobody has imported it before.
    task.tqdm = functools.partial(task.tqdm, disable=True)
    logging.getLogger("lm_eval").setLevel(os.environ.get("LMEVAL_LOG_LEVEL", "ERROR"))


class Catalogue:
    """What can be asked for by name: the YAML tasks, groups and tags of `include` over those of the harness.

    The harness has over ten thousand task files, and it takes a while to parse them all. So names are looked for in
    the text of the files, and only those folders are parsed that have something of what is asked for.
    """

    def __init__(self, include: str = "") -> None:
        """Raises EvaluationError without the harness, and for a folder that is not there or holds a damaged file."""
        if not installed():
            raise EvaluationError(f"tasks of lm-evaluation-harness need it installed: {INSTALL}")
        self.include = [include] if include else []
        if include and not pathlib.Path(include).is_dir():
            raise EvaluationError(f"--include_path={include}: there is no such folder")
        for file in sorted(pathlib.Path(include).rglob("*.yaml")) if include else ():
            _check(file)
        self.own = tuple(self._parsed([]).all_tasks) if include else ()

    def expand(self, names: Iterable[str], ours: Iterable[str] = ()) -> list[str]:
        """The names, wildcards replaced by what they stand for.

        Raises:
            EvaluationError: a name that is nowhere; the nearest ones are named, also of `ours`.
        """
        known, found = [*self.own, *_defined()], []
        for name in names:
            hits = fnmatch.filter(known, name) if set(name) & set("*?[") else [name] * (name in known)
            if not hits:
                ours = list(ours)
                near = difflib.get_close_matches(name, ours, cutoff=0.8) or nearest(name, [*ours, *known])
                hint = f"did you mean {' or '.join(near)}?" if near else "see `eval.py ls tasks` and `lm-eval ls tasks`"
                raise EvaluationError(f"unknown task {name!r}: {hint}")
            found += hits
        return list(dict.fromkeys(found))

    def manager(self, names: Sequence[str]) -> Any:
        """A TaskManager that knows all `names` (without wildcards) and all that they are made of."""
        folders: set[pathlib.Path] = set()
        missing = {name for name in names if name not in self.own}
        while True:
            folders = folders.union(*(_defined()[name] for name in missing if name in _defined()))
            manager = self._parsed(folders)
            members = _members(manager.task_index, names)
            missing = {
                name for name in members if name not in self.own and not _defined().get(name, folders) <= folders
            }
            if not missing:
                return manager

    def _parsed(self, folders: Iterable[pathlib.Path]) -> Any:
        _import()
        from lm_eval.tasks import TaskManager

        # Of two tasks of one name the harness takes the first in the order of paths; of several roots the last wins,
        # tags included, whose members are put together again.
        manager = TaskManager(include_path=[*sorted(folders, reverse=True), *self.include], include_defaults=False)
        index = manager.task_index
        for name, entry in index.items() if folders else ():
            for tag in entry.tags if entry.kind.name in ("TASK", "PY_TASK") else ():
                if tag not in self.own and index[tag].kind.name == "TAG":
                    index[tag].tags.add(name)
        return manager


def _check(file: pathlib.Path) -> None:
    """The harness leaves out files that it cannot read; those of the user are told."""
    _import()
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        load_yaml(file, resolve_func=False)
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise EvaluationError(f"{file} cannot be read as a task: {error}") from error


@functools.cache
def _defined() -> dict[str, set[pathlib.Path]]:
    """By the name of each task, group and tag of the harness, the folders of its files that name it as such."""
    library = importlib.util.find_spec("lm_eval").submodule_search_locations[0]  # To import it takes a while.
    root, found = pathlib.Path(library, "tasks"), {}
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith("yaml") or "." not in name:  # Templates that tasks include may have any name.
                text = pathlib.Path(folder, name).read_text(encoding="utf-8")
                top = root / pathlib.Path(folder).relative_to(root).parts[0]
                for other in (pathlib.Path(folder, part) for part in _INCLUDED.findall(text)):
                    text += f"\n{other.read_text(encoding='utf-8')}" if other.is_file() else ""  # Its tags are ours.
                listed = (item for block in _LISTED.findall(text) for item in _ITEM.findall(block))
                for defined in (*_NAMED.findall(text), *listed):
                    found.setdefault(defined, set()).add(top)
    return found


_NAMED = re.compile(r"""^["']?(?:task|group|tag)["']?[ ]*:[ ]*["']?([^\s"'#\[]+)""", re.MULTILINE)
_LISTED = re.compile(r"""^["']?tag["']?[ ]*:[ ]*\n((?:[ ]*-[ ].*\n?)+)""", re.MULTILINE)
_INCLUDED = re.compile(r"""^include[ ]*:[ ]*["']?([.][.]/[^\s"'#]+)""", re.MULTILINE)
_ITEM = re.compile(r"""-[ ]+["']?([^\s"'#]+)""")


def _members(index: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """The names with those of all members of groups among them, as far as the index knows them."""
    found: set[str] = set()
    todo: list[Any] = list(names)
    while todo:
        item = todo.pop()
        if isinstance(item, Mapping):  # A member with fields of its own, or a group written out on the spot.
            inner = item.get("task")
            todo += [item.get("group"), *(inner if isinstance(inner, list) else [inner])]
        elif isinstance(item, str) and item not in found:
            found.add(item)
            entry = index.get(item)
            if entry is not None and entry.kind.name == "TAG":
                todo += entry.tags
            elif entry is not None and entry.kind.name == "GROUP":
                todo.append({"task": entry.cfg.get("task")})
    return found


def load(
    names: Sequence[str], catalogue: Catalogue, *, data_root: str = "", num_fewshot: int | None = None
) -> tuple[list[Any], Any]:
    """The tasks and groups called `names` (see `Catalogue.expand`), their data read, and the manager they came from.

    With `data_root` all data comes from there (see `files`). Raises EvaluationError, naming the file looked for.
    """
    if data_root and not pathlib.Path(data_root).is_dir():
        raise EvaluationError(f"--data_root={data_root}: there is no such folder")
    manager = catalogue.manager(names)
    with _data_from(data_root, num_fewshot):
        try:
            loaded = manager.load(list(names))
        except UserError:
            raise
        except Exception as error:  # Whatever a YAML file may be wrong in: fields, templates, functions, columns.
            raise EvaluationError(
                f"tasks {', '.join(names)} cannot be made: {type(error).__name__}: {str(error)[:300]}"
            ) from error
    inside = {child for group in loaded["groups"].values() for child in group.child_names}
    inside |= {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
    roots = [group for name, group in loaded["groups"].items() if name not in inside]
    return [*roots, *(task for name, task in loaded["tasks"].items() if name not in inside)], manager


@contextlib.contextmanager
def _data_from(root: str, num_fewshot: int | None) -> Iterator[None]:
    """Has tasks get their data by `_download`. The harness makes tasks of one class itself and offers its method
    `download` for data from elsewhere, so that is replaced while tasks are made."""
    from lm_eval.api.task import ConfigurableTask

    fetch = ConfigurableTask.download
    ConfigurableTask.download = functools.partialmethod(_download, fetch=fetch, root=root, num_fewshot=num_fewshot)
    try:
        yield
    finally:
        ConfigurableTask.download = fetch


def _download(
    task: Any, dataset_kwargs: Mapping[str, Any] | None = None, *, fetch: Callable, root: str, num_fewshot: int | None
) -> None:
    """Sets `task.dataset`, from `root`, from the files beside the task's YAML, or as the harness does."""
    config, options = task.config, dict(dataset_kwargs or {})
    if config.dataset_path in LOCAL and "data_files" in options:
        task.dataset = _beside(config, options["data_files"])
        return
    if callable(config.custom_dataset):
        fetch(task, dataset_kwargs)
        return
    if root:
        task.dataset = _under(pathlib.Path(root), config, num_fewshot)
        return
    if options.get("trust_remote_code"):
        raise EvaluationError(
            f"task {config.task} wants to run code of its data set {config.dataset_path!r} (trust_remote_code), which "
            "is never done here: give its data as files with --data_root=DIR"
        )
    try:
        fetch(task, dataset_kwargs)
    except Exception as error:  # The library raises many kinds, some of them over several lines.
        places = files.folders(pathlib.Path("DIR"), config.task, str(config.dataset_path), config.dataset_name)
        raise EvaluationError(
            f"task {config.task}: its data set {config.dataset_path!r} cannot be had ({str(error)[:120]}): give "
            f"--data_root=DIR with {files.wanted(places[:1], _evaluated(config))}, or HF_HUB_OFFLINE=0 to fetch it"
        ) from error


def _beside(config: Any, data_files: Any) -> dict[str, Any]:
    """The splits of a task that names its files: as given, or beside its YAML file."""
    given = data_files if isinstance(data_files, Mapping) else {"train": data_files}
    folder = pathlib.Path((config.metadata or {}).get("config_source", "inline")).parent
    found = {}
    for split, names in given.items():
        paths = []
        for name in names if isinstance(names, list | tuple) else [names]:
            tried = [pathlib.Path(name), folder / name]
            path = next((path for path in tried if path.is_file()), None)
            if path is None:
                raise EvaluationError(
                    f"task {config.task}: no file {' or '.join(map(str, dict.fromkeys(tried)))} for its split {split}"
                )
            paths.append(path)
        found[split] = files.read(paths)
    return found


def _under(root: pathlib.Path, config: Any, num_fewshot: int | None) -> dict[str, Any]:
    """The splits of a task below `root`: the one it is evaluated on, that of its worked examples where it has any, and
    others if they are there; the task forgets those that are not."""
    places = files.folders(root, config.task, str(config.dataset_path), config.dataset_name)
    shots = config.num_fewshot if num_fewshot is None or config.num_fewshot == 0 else num_fewshot
    fewshot = config.fewshot_config
    source = fewshot.split or config.training_split or config.validation_split or config.test_split
    needed = {_evaluated(config): ""}
    if shots and not fewshot.samples:
        needed.setdefault(source, f" ({shots} worked examples)")
    found = {}
    for split, why in needed.items():
        paths = files.find(places, split)
        if not paths:
            raise EvaluationError(f"task {config.task}: there is no {files.wanted(places, split)}{why}")
        found[split] = files.read(paths)
    for field in ("training_split", "validation_split", "test_split"):
        split = getattr(config, field)
        if split is not None and split not in found:
            paths = files.find(places, split)
            if paths:
                found[split] = files.read(paths)
            else:
                setattr(config, field, None)
    if fewshot.split is not None and fewshot.split not in found:
        paths = files.find(places, fewshot.split)
        if paths:
            found[fewshot.split] = files.read(paths)
        else:
            fewshot.split = config.fewshot_split = None
    return found


def _evaluated(config: Any) -> str:
    split = config.test_split or config.validation_split
    if split is None:
        raise EvaluationError(f"task {config.task} names neither a test nor a validation split")
    return split
