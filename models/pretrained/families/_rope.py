"""Rotary positions of a config.json: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` before it."""

import math
from collections.abc import Mapping
from typing import Any

from layers.rope import Rope
from models.pretrained.settings import Settings

_KINDS = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}


def config(hf: Settings, *, theta: float = 10000.0) -> dict[str, Any]:
    """Fields of `config.rope` that differ from its defaults; `theta` is the family's own default base.

    YaRN's factor on cos and sin comes as `attention_factor`, as the pair (mscale, mscale_all_dim), or by default from
    the factor; all become mscale and mscale_all_dim. Where the m^2 of latent attention is meant too, its family says
    so.
    """
    group = _group(hf)
    kind = group.text("rope_type", "type", default="default")
    if kind == "dynamic":
        group.refuse(
            "rope_type",
            "= 'dynamic' changes positions with the length of the text, which no layer here does: set it to 'default' "
            "to use the network up to max_position_embeddings, where both are the same",
        )
    if kind not in _KINDS:
        group.refuse("rope_type", f"= {kind!r} is not supported: only {', '.join(map(repr, _KINDS))}")
    base = group.number("rope_theta", default=None, above=1) or hf.number("rope_theta", default=theta, above=1)
    fields: dict[str, Any] = {"theta": base, "scaling": _KINDS[kind]}
    if kind == "default":
        return fields
    length = hf.whole("max_position_embeddings")
    trained = hf.whole("original_max_position_embeddings", default=None) or group.whole(
        "original_max_position_embeddings", default=length
    )
    factor = group.number("factor", default=length / trained if kind == "yarn" else None, above=0)
    if factor is None or factor < 1:
        group.refuse("factor", f"must be a number >= 1, got {factor}")
    fields["factor"] = factor
    if kind in ("yarn", "llama3"):
        fields["original_length"] = trained
    if kind == "llama3":
        fields |= {name: group.number(name, above=0) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        group.only("truncate", True)
        fields["beta_fast"] = group.number("beta_fast", default=None, above=0) or 32.0
        fields["beta_slow"] = group.number("beta_slow", default=None, above=0) or 1.0
        fields["mscale"], fields["mscale_all_dim"] = _mscales(group, factor)
    return fields


def hf_config(rope: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` that say the same as the fields of `config.rope`."""
    value = Rope(**rope)
    kinds = {ours: theirs for theirs, ours in _KINDS.items()}
    fields: dict[str, Any] = {"rope_type": kinds.get(value.scaling, value.scaling), "rope_theta": value.theta}
    if value.scaling != "none":
        fields["factor"] = value.factor
    if value.scaling in ("yarn", "llama3"):
        fields["original_max_position_embeddings"] = value.original_length
    if value.scaling == "llama3":
        fields |= {"low_freq_factor": value.low_freq_factor, "high_freq_factor": value.high_freq_factor}
    if value.scaling == "yarn":
        fields |= {"beta_fast": value.beta_fast, "beta_slow": value.beta_slow}
        if value.mscale and value.mscale_all_dim:
            fields |= {"mscale": value.mscale, "mscale_all_dim": value.mscale_all_dim}
        elif (value.mscale, value.mscale_all_dim) != (1.0, 0.0):
            fields["attention_factor"] = value.amplitude
    return fields


def _group(hf: Settings) -> Settings:
    """The fields about positions, wherever this version of the library keeps them."""
    name = "rope_parameters" if "rope_parameters" in hf else "rope_scaling"
    group = hf.group(name)
    for kind in ("full_attention", "sliding_attention"):
        if kind in group:
            group.refuse(kind, "gives layers different positions, which is not supported")
    if group.number("partial_rotary_factor", default=1.0) != 1 or hf.number("partial_rotary_factor", default=1.0) != 1:
        group.refuse("partial_rotary_factor", "is not supported here")
    return group


def _mscales(group: Settings, factor: float) -> tuple[float, float]:
    given = group.number("attention_factor", default=None, above=0)
    mscale, all_dim = (group.number(name, default=0.0) for name in ("mscale", "mscale_all_dim"))
    if given is None:
        return (mscale, all_dim) if mscale and all_dim else (1.0, 0.0)
    unit = 0.1 * math.log(factor)
    if not unit:
        if given != 1:
            group.refuse("attention_factor", f"= {given} with a factor of 1 is not supported")
        return 1.0, 0.0
    return ((given - 1) / unit, 0.0) if given >= 1 else (0.0, (1 / given - 1) / unit)
