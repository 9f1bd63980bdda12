"""From a command line to a locked config: `--config=configs/lm.py:attention=mla,smoke --config.model.width=512`.

The grammar is that of `ml_collections.config_flags`. The reading is our own, because the mistakes of that library's
users come out as tracebacks of many lines, and here each one is a `ConfigError` of a single line. Three additions: a
field that is a preset takes the preset's name (`--config.model.attention=mla`), a tuple may be written without
parentheses (`--config.data.sources=a,b`), and `arguments` gives the text after the colon names, types and defaults.
"""

import dataclasses
import importlib.machinery
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import ml_collections

from configs import validate
from configs.errors import ConfigError, UserError, nearest, unknown
from configs.fields import Repeated, apply, convert, flat, split

_BARE = Repeated(["true"])  # The value of a flag without one; told apart from other texts by identity.


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag beside `--config`: its default, whose type is the flag's type, and a line of help."""

    default: Any
    help: str = ""


def parse(
    argv: Sequence[str], options: Mapping[str, Option] | None = None, *, default: str | None = None
) -> tuple[ml_collections.ConfigDict | None, SimpleNamespace]:
    """The locked, checked config and the other options that `argv` (without the program's name) asks for.

    `default` is the `--config` used when none is given; without either the config is None, and an override is an
    error. Raises ConfigError, one line, for every mistake. `--help` prints the flags and raises SystemExit(0).
    """
    options = dict(options or {})
    values = {name: option.default for name, option in options.items()}
    spec, overrides = default, []
    for name, text in _flags(argv, options):
        if name == "help":
            print(_help(options))
            raise SystemExit(0)
        if name == "config":
            spec = text
        elif name.startswith("config."):
            overrides.append((name.removeprefix("config."), text))
        else:
            values[name] = convert(f"--{name}", text, options[name].default)
    if spec is None:
        if overrides:
            raise ConfigError(f"--config.{overrides[0][0]} without a config: add --config=configs/lm.py")
        return None, SimpleNamespace(**values)
    config = load(spec)
    kinds = {path: type(value) for path, value in flat(config).items()}
    for path, text in overrides:
        if text is _BARE and kinds.get(path, bool) is not bool:
            raise ConfigError(f"--config.{path} needs a value: --config.{path}=...")
    config = apply(config, _gather(overrides))
    validate.check(config)
    return config, SimpleNamespace(**values)


def run(main: Callable[[list[str]], int | None]) -> None:
    """Calls `main` with the arguments of the process and leaves with its status; a UserError is one line, status 2."""
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    raise SystemExit(status or 0)


def load(spec: str) -> ml_collections.ConfigDict:
    """The config that `file.py` or `file.py:argument` describes: its `get_config()` or `get_config(argument)`."""
    path, _, argument = spec.partition(":")
    module = _module(path)
    function = getattr(module, "get_config", None)
    if not callable(function):
        raise ConfigError(f"{path} has no function get_config")
    config = _guard(path, function, *((argument,) if argument else ()))
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"get_config of {path} returned {type(config).__name__}, not a ConfigDict")
    return config


def load_file(path: str, attribute: str) -> Any:
    """What `attribute` of the Python file at `path` holds (a sweep, for example); ConfigError if either is missing."""
    module = _module(path)
    if not hasattr(module, attribute):
        raise ConfigError(f"{path} does not define {attribute}")
    return getattr(module, attribute)


def arguments(text: str, **defaults: Any) -> SimpleNamespace:
    """Reads `attention=mla,size=small,smoke`: names, types and defaults are those of `defaults`.

    A name alone sets a true-or-false argument. Commas inside brackets do not separate.
    """
    values = dict(defaults)
    for part in split(text or ""):
        name, given, value = (piece.strip() for piece in part.partition("="))
        if name not in defaults:
            raise ConfigError(unknown("config argument", name, defaults))
        if not given and not isinstance(defaults[name], bool):
            raise ConfigError(f"config argument {name} needs a value: {name}={defaults[name]}")
        values[name] = convert(f"config argument {name}", value if given else "true", defaults[name])
    return SimpleNamespace(**values)


def _flags(argv: Sequence[str], options: Mapping[str, Option]) -> list[tuple[str, str]]:
    """(name, text) of each flag in order; `--x` and `--nox` of true-or-false flags become "true" and "false"."""
    found, rest = [], list(argv)
    known = ["config", "help", *options]
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word in ("-", "--"):
            hint = f", write --config={word}" if word.partition(":")[0].endswith(".py") else ": flags begin with --"
            raise ConfigError(f"unexpected argument {word!r}{hint}")
        name, given, text = word.lstrip("-").partition("=")
        if name in ("h", "help"):
            return [("help", "")]
        if name.startswith("noconfig.") or (name.startswith("no") and _is_switch(name[2:], options)):
            if given:
                raise ConfigError(f"--{name} takes no value")
            name, given, text = name.removeprefix("no"), "=", "false"
        if not name.startswith("config.") and name not in known:
            raise ConfigError(unknown("flag", f"--{name}", [f"--{known_name}" for known_name in known]))
        if not given:
            if rest and not _is_switch(name, options) and not _looks_like_flag(rest[0]):
                text = rest.pop(0)
            elif _is_switch(name, options) or name.startswith("config."):
                text = _BARE
            else:
                raise ConfigError(f"--{name} needs a value: --{name}=...")
        found.append((name, text))
    return found


def _looks_like_flag(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit() and word[1:2] != "."


def _is_switch(name: str, options: Mapping[str, Option]) -> bool:
    return name in options and isinstance(options[name].default, bool)


def _gather(overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One value per field: the last one given, or all of them where a field repeats, for tuples."""
    repeated: dict[str, list[str]] = {}
    for path, text in overrides:
        repeated.setdefault(path, []).append(text)
    return {path: texts[0] if len(texts) == 1 else Repeated(texts) for path, texts in repeated.items()}


def _module(path: str) -> Any:
    """The module in the file at `path`, executed."""
    file = pathlib.Path(path)
    if not os.path.isfile(path):  # Unlike Path.is_file, False also for names that no file can have.
        near = nearest(path, _config_files(file.parent))
        hint = f"did you mean {' or '.join(near)}?" if near else "give the path of a Python file with get_config"
        raise ConfigError(f"no config file {path!r}: {hint}")
    if file.suffix != ".py":
        raise ConfigError(f"config file {path!r} is not a Python file (.py)")
    loader = importlib.machinery.SourceFileLoader(f"config_{file.stem}", str(file))
    module = types.ModuleType(loader.name)
    module.__file__ = str(file)
    _guard(path, loader.exec_module, module)
    return module


def _config_files(folder: pathlib.Path) -> list[str]:
    """The files of a folder that define get_config."""
    files = sorted(folder.glob("*.py")) if os.path.isdir(folder) else []
    return [str(file) for file in files if "\ndef get_config(" in file.read_text(encoding="utf-8", errors="replace")]


def _guard(path: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the user's code; what it raises becomes one line with the place in the file."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
        place = f"{path}:{frames[-1].lineno}" if frames else path
        raise ConfigError(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _help(options: Mapping[str, Option]) -> str:
    lines = [
        "--config=FILE.py[:ARGUMENTS]  the run; ARGUMENTS as in attention=mla,size=small,smoke",
        "--config.FIELD=VALUE          sets one field, e.g. --config.model.width=512",
    ]
    for name, option in options.items():
        shown = f"--{name}" if isinstance(option.default, bool) else f"--{name}={option.default}"
        lines.append(f"{shown:<30}{option.help}")
    return "\n".join(lines)
