"""MiniMax-Text-01 (arXiv 2501.08313): lightning and softmax attention mixed, experts in every layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs import attention as presets
from models.plan import layer_specs
from models.pretrained.errors import UnsuitedError
from models.pretrained.families import _decoder, _experts, _rope
from models.pretrained.mapping import Arrays, Mapped, array, linear, matrix
from models.pretrained.settings import Settings

MODEL_TYPES = ("minimax",)
ARCHITECTURE = "MiniMaxForCausalLM"
KINDS = {"lightning": "linear_attention", "mha": "full_attention"}
EXPERT = ("w1", "w3", "w2")
# Made from the config, here as there; as files of bf16 hold them they are rounded.
_DECAYS = "slope_rate|query_decay|key_decay|diagonal_decay"
_FACTORS = {"linear_attention": "linear_attn", "full_attention": "full_attn", "mlp": "mlp"}
_DEFAULTS = {"rope_theta": 1e6, "rms_norm_eps": 1e-5}


def config(hf: Settings) -> dict[str, Any]:
    """See `models.pretrained.families`. `rotary_dim` is honoured, as the network was trained (transformers 5.23 turns
    whole heads)."""
    hf.only("hidden_act", "silu")
    hf.only("postnorm", True)
    hf.only("shared_intermediate_size", 0)
    fields = _decoder.config(Settings(_DEFAULTS | hf.values, hf.where, hf.path))
    depth, heads, width = fields["depth"], fields["attention.heads"], fields["attention.head_dim"]
    default = tuple(KINDS["lightning" if layer % 2 else "mha"] for layer in range(depth))
    kinds = hf.texts("layer_types", length=depth, default=default)
    for kind in set(kinds) - set(KINDS.values()):
        hf.refuse("layer_types", f"has {kind!r}: only {' and '.join(map(repr, KINDS.values()))} are supported")
    count = _experts.bounded(hf, "num_local_experts", hf.whole("num_local_experts", "num_experts"), depth)
    chosen = hf.whole("num_experts_per_tok")
    if chosen > count:
        hf.refuse("num_local_experts", f"= {count} and num_experts_per_tok = {chosen} do not fit")
    lightning = presets.get("lightning").to_dict() | {
        "heads": heads,
        "head_dim": width,
        "decay": "minimax",
        "activation": "silu",
        "activate_values": True,
        "gate": "sigmoid",
        "norm_gain": True,
        "lrpe": False,
        "norm_epsilon": 1e-6,  # Whatever rms_norm_eps is.
    }
    layers = [layer for layer, kind in enumerate(kinds) if kind == KINDS["lightning"]]
    fields["per_layer"] = tuple((f"{first}:{last}", {"attention": lightning}) for first, last in _runs(layers))
    for ours, theirs in (("keep", "alpha"), ("gain", "beta")):
        factor = {name: hf.number(f"{name}_{theirs}_factor", default=1.0, above=0) for name in _FACTORS.values()}
        values = tuple(factor[_FACTORS[kind]] for kind in kinds)
        fields[f"residual.{ours}_attention"] = values if len(set(values)) > 1 else values[0]
        fields[f"residual.{ours}_mlp"] = factor["mlp"]
    rotary = min(hf.whole("rotary_dim", default=width), width)
    if rotary % 2:
        hf.refuse("rotary_dim", f"= {rotary} must be even")
    return fields | {
        "residual.form": "carried",
        "attention.window": hf.whole("sliding_window", default=0),
        "attention.rope.share": rotary / width,
        "mlp.experts.count": count,
        "mlp.experts.chosen": chosen,
        "mlp.experts.router": "softmax",
        "mlp.experts.renormalise": True,
    }


def _runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """First and one past the last of each run of neighbours."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    return list(zip(starts, [layer + 1 for layer in layers if layer + 1 not in layers], strict=True))


def hf_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    specs = layer_specs(model)
    by_kind: dict[str, Any] = {}
    for spec in specs:
        if spec["attention"]["layer"] not in KINDS:
            raise UnsuitedError(f"its attention is {spec['attention']['layer']}")
        by_kind.setdefault(KINDS[spec["attention"]["layer"]], spec)
    first, full = specs[0], by_kind.get("full_attention")
    experts, heads, width = first["mlp"]["experts"], first["attention"]["heads"], first["attention"]["head_dim"]
    rope = {**(full["attention"] if full else presets.get("mha"))["rope"]}
    rotary, rope["share"] = round(rope["share"] * width), 1.0
    fields = {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["width"],
        "intermediate_size": experts["width"] or first["mlp"]["width"],
        "num_hidden_layers": model["depth"],
        "num_attention_heads": heads,
        "num_key_value_heads": full["attention"]["kv_heads"] if full else heads,
        "head_dim": width,
        "hidden_act": "silu",
        "max_position_embeddings": model["max_length"],
        "initializer_range": model["init_std"],
        "rms_norm_eps": first["norm"]["epsilon"],
        "tie_word_embeddings": model["tie_embeddings"],
        "rope_parameters": _rope.hf_config(rope),
        "sliding_window": (full["attention"]["window"] or None) if full else None,
        "layer_types": [KINDS[spec["attention"]["layer"]] for spec in specs],
        "num_local_experts": experts["count"],
        "num_experts_per_tok": experts["chosen"],
        "router_jitter_noise": 0.0,
        "block_size": 256,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if rotary != width:
        fields["rotary_dim"] = rotary
    for ours, theirs in (("keep", "alpha"), ("gain", "beta")):
        for kind, spec in by_kind.items():
            fields[f"{_FACTORS[kind]}_{theirs}_factor"] = spec["residual"][f"{ours}_attention"]
        fields[f"mlp_{theirs}_factor"] = first["residual"][f"{ours}_mlp"]
    return fields


def mapping(model: Mapping[str, Any]) -> list[Mapped]:
    """The tensors of every layer; decays are made from the config."""
    specs = layer_specs(model)
    by_head = _by_head(specs[0]["attention"]["heads"])
    found = [array("embedding.table", "model.embed_tokens.weight")]
    for layer, spec in enumerate(specs):
        block, mixer = f"model.layers.{layer}", f"model.layers.{layer}.self_attn"
        found.append(array("attention_norm.gain", f"{block}.input_layernorm.weight", layer))
        if spec["attention"]["layer"] == "lightning":
            ours = tuple(f"attention.{name}.weight" for name in ("query", "key", "value"))
            found.append(Mapped(ours, (f"{mixer}.qkv_proj.weight",), layer, **by_head))
            found.append(array("attention.norm.gain", f"{mixer}.norm.weight", layer))
            found += linear("attention.gate", f"{mixer}.output_gate", layer)
            found += linear("attention.out", f"{mixer}.out_proj", layer)
        else:
            for name, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj")):
                found += linear(f"attention.{name}", f"{mixer}.{theirs}", layer)
        found.append(array("mlp_norm.gain", f"{block}.post_attention_layernorm.weight", layer))
        mixture, count = f"{block}.block_sparse_moe", spec["mlp"]["experts"]["count"]
        found.append(matrix("mlp.router.weight", f"{mixture}.gate.weight", layer))
        found += _experts.mapping(layer, count, f"{mixture}.experts", EXPERT)
    found.append(array("norm.gain", "model.norm.weight"))
    return found if model["tie_embeddings"] else found + linear("head", "lm_head")


def _by_head(heads: int) -> dict[str, Any]:
    """`read` and `write` of qkv_proj, whose rows are [query, key, value] of each head in turn."""

    def read(whole: np.ndarray) -> Arrays:
        width = whole.shape[1]
        parts = whole.reshape(heads, 3, -1, width)
        return tuple(parts[:, place].reshape(-1, width).T for place in range(3))

    def write(*parts: np.ndarray) -> Arrays:
        width = parts[0].shape[0]
        return (np.stack([part.T.reshape(heads, -1, width) for part in parts], axis=1).reshape(-1, width),)

    return {"read": read, "write": write}


def ignored(hf: Settings) -> tuple[str, ...]:
    """Decays, which transformers writes as buffers, and what all families leave."""
    return (*_decoder.ignored(hf), rf"model\.layers\.\d+\.self_attn\.({_DECAYS})")
