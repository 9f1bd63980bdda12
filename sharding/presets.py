"""The named meshes and their tables from logical axes to mesh axes.

A preset says which mesh axes exist, how large they are by default, and where each logical axis lives. To add one
(a ring of context shards): write a `Preset` here and name it in `PRESETS`; no layer changes, because layers only name
logical axes.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sharding.logical import Rule, ShardingError, unknown

# Every name a layer may give to an axis of an array. `slices` cut a latent; `slice_heads` are the heads of the devices
# that share a slice, and `slice_head_parts` those heads, cut once more over the slices. `expert_mlp` are the hidden
# units of one expert.
LOGICAL_AXES = (
    "batch", "length", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab", "latent",
    "slices", "slice_heads", "slice_head_parts", "experts", "expert_mlp", "layers", "norm",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Preset:
    """A mesh and a table.

    `mesh_axes` are "data" and then those over which a model is split: one axis "model", or two, "latent" and "head",
    whose sizes multiply to `config.sharding.model`. `default_model` is that number; 0 means all devices.
    """

    summary: str
    rules: Mapping[str, Rule]
    default_model: int = 1
    mesh_axes: tuple[str, ...] = ("data", "model")


def _table(**rules: Rule) -> Mapping[str, Rule]:
    return MappingProxyType({name: rules.get(name, Rule()) for name in LOGICAL_AXES})


_ROWS = Rule(("data",))
_AT_REST = Rule(("data",), stored=True)
_SPLIT = Rule(("model",))
_SPLIT_IF_ENOUGH = Rule(("model",), replicable=True)
_BOTH = Rule(("latent", "head"))

PRESETS: Mapping[str, Preset] = MappingProxyType({
    "single": Preset("one device, whatever else the machine has", _table()),
    "fsdp": Preset(
        "rows of the batch over all devices; each weight stored in pieces and gathered layer by layer",
        _table(batch=_ROWS, embed=_AT_REST, latent=_AT_REST, slices=_AT_REST),
    ),
    "tp": Preset(
        "heads, hidden units, experts and vocabulary over all devices (Megatron-LM, arXiv 1909.08053)",
        _table(
            batch=_ROWS, heads=_SPLIT, kv_heads=_SPLIT_IF_ENOUGH, slice_heads=_SPLIT, slice_head_parts=_SPLIT,
            mlp=_SPLIT, experts=_SPLIT, vocab=_SPLIT,
        ),
        default_model=0,
    ),
    "fsdp_tp": Preset(
        "tp inside each group of model-axis devices, fsdp across the groups",
        _table(
            batch=_ROWS, embed=_AT_REST, latent=_AT_REST, slices=_AT_REST,
            heads=_SPLIT, kv_heads=_SPLIT_IF_ENOUGH, slice_heads=_SPLIT, slice_head_parts=_SPLIT,
            mlp=_SPLIT, experts=_SPLIT, vocab=_SPLIT,
        ),
        default_model=2,
    ),
    "tpla": Preset(
        "latents over one mesh axis and heads over the other (TPLA, arXiv 2508.15881); all else over both",
        _table(
            batch=_ROWS, heads=_BOTH, kv_heads=Rule(("latent",), replicable=True), mlp=_BOTH, experts=_BOTH,
            vocab=_BOTH, slices=Rule(("latent",)), slice_heads=Rule(("head",)),
            slice_head_parts=Rule(("head", "latent")),
        ),
        default_model=0,
        mesh_axes=("data", "latent", "head"),
    ),
})  # fmt: skip


def get(name: str) -> Preset:
    """The preset of that name; `ShardingError` naming the nearest if there is none."""
    if name not in PRESETS:
        raise ShardingError(unknown("sharding preset", name, PRESETS))
    return PRESETS[name]


def sizes(config: Any, devices: int) -> dict[str, int]:
    """The size of each mesh axis that `config.sharding` means on so many devices. Needs no device itself.

    Raises `ShardingError` where the product cannot be the number of devices.
    """
    preset = get(config.preset)
    for axis in ("data", "model", "latent"):
        if config[axis] < 0:
            raise ShardingError(f"config.sharding.{axis} is {config[axis]}: set a number of devices, or 0")
        if config.preset == "single" and config[axis] > 1:
            raise ShardingError(
                f"preset 'single' is one device, but config.sharding.{axis} is {config[axis]}: use another preset"
            )
    if config.preset == "single":
        return {"data": 1, "model": 1}
    if config.latent and "latent" not in preset.mesh_axes:
        raise ShardingError(
            f"preset {config.preset!r} has no mesh axis 'latent': leave config.sharding.latent at 0, or use 'tpla'"
        )
    data, model = config.data, config.model
    if not model:
        model = preset.default_model or devices // (data or 1)
        # On one device fsdp_tp means the same as single, so that a config runs anywhere unchanged.
        model = max(1, min(model, devices))
    if not data:
        data = max(1, devices // model)
    if data * model != devices:
        raise ShardingError(
            f"preset {config.preset!r} makes a mesh of data={data} x model={model}, {data * model} devices, but there "
            f"{'is 1' if devices == 1 else f'are {devices}'}: set config.sharding.data and config.sharding.model "
            f"to sizes whose product is {devices}"
        )
    if "latent" not in preset.mesh_axes:
        return {"data": data, "model": model}
    latent = config.latent or math.gcd(2, model)
    if model % latent:
        raise ShardingError(
            f"config.sharding.latent is {latent}, which does not divide the {model} devices of config.sharding.model"
        )
    return {"data": data, "latent": latent, "head": model // latent}


def rules(config: Any) -> dict[str, Rule]:
    """The preset's table with the exceptions of `config.rules` put in, which keep the kind of their row.

    Raises `ShardingError` for an unknown logical or mesh axis, or an exception that is not a pair.
    """
    table = dict(get(config.preset).rules)
    for exception in config.rules:
        if not isinstance(exception, (tuple, list)) or len(exception) != 2:
            raise ShardingError(
                f"config.sharding.rules holds {exception!r}: each entry is (logical axis, mesh axis or None)"
            )
        name, axis = exception
        if name not in table:
            raise ShardingError("config.sharding.rules: " + unknown("logical axis", str(name), table))
        known = get(config.preset).mesh_axes
        if axis is not None and axis not in known:
            raise ShardingError("config.sharding.rules: " + unknown("mesh axis", str(axis), known))
        table[name] = dataclasses.replace(table[name], mesh_axes=() if axis is None else (axis,))
    return table


def markdown() -> str:
    """The tables as one Markdown table: a column per preset, `*` for stored rules, `?` for replicable ones."""
    lines = ["| logical axis | " + " | ".join(PRESETS) + " |", "|---|" + "---|" * len(PRESETS)]
    for name in LOGICAL_AXES:
        cells = [_cell(preset.rules[name]) for preset in PRESETS.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rule: Rule) -> str:
    return "+".join(rule.mesh_axes) + "*" * rule.stored + "?" * rule.replicable
