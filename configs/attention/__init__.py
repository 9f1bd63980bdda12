"""One file per attention preset; `get(name)` returns its options.

A preset names the layer it configures (`layers/attention/<layer>.py`) and every option of that layer's constructor.
"""

import importlib
import pkgutil

import ml_collections

from configs.errors import ConfigError, unknown


def names() -> tuple[str, ...]:
    """The presets, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get(name: str) -> ml_collections.ConfigDict:
    """The options of one preset; ConfigError naming the nearest presets if there is none of that name."""
    if name not in names():
        raise ConfigError(unknown("attention", name, names()))
    return importlib.import_module(f"configs.attention.{name}").get_config()
