"""What DeepSeek-V2 and V3 share: latent attention, first layers dense, experts with shared ones, YaRN with m^2."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.plan import layer_specs
from models.pretrained import fp8
from models.pretrained.errors import UnsuitedError
from models.pretrained.families import _decoder, _experts, _rope
from models.pretrained.mapping import Arrays, Mapped, array, fused, linear, matrix
from models.pretrained.reader import Source
from models.pretrained.settings import Settings

EXPERT = ("gate_proj", "up_proj", "down_proj")
_MOST = {"num_hidden_layers": 4096, "num_nextn_predict_layers": 64}


def config(hf: Settings, *, scale: float) -> dict[str, Any]:
    """The fields of `config.model` but for the router's and the layout of rotated channels; `scale` is the family's
    default for routed_scaling_factor. Without experts there are no fields `mlp.experts.*`."""
    hf.only("hidden_act", "silu")
    for name, most in _MOST.items():
        if hf.whole(name, default=0, least=0) > most:
            hf.refuse(name, f"= {hf.values[name]} is more than {most}")
    heads, depth = hf.whole("num_attention_heads"), hf.whole("num_hidden_layers")
    hf.only("num_key_value_heads", heads)
    bias = hf.flag("attention_bias", default=False)
    query_rank = hf.whole("q_lora_rank", default=0)
    fields = {
        "vocab_size": hf.whole("vocab_size"),
        "width": hf.whole("hidden_size"),
        "depth": depth,
        "max_length": hf.whole("max_position_embeddings"),
        "tie_embeddings": hf.flag("tie_word_embeddings", default=False),
        "init_std": hf.number("initializer_range", default=0.02, above=0),
        "norm.kind": "rms",
        "norm.epsilon": hf.number("rms_norm_eps", default=1e-6, above=0),
        "attention": "mla",
        "attention.heads": heads,
        "attention.q_lora_rank": query_rank,
        "attention.kv_lora_rank": hf.whole("kv_lora_rank"),
        "attention.qk_nope_head_dim": hf.whole("qk_nope_head_dim"),
        "attention.qk_rope_head_dim": hf.whole("qk_rope_head_dim"),
        "attention.v_head_dim": hf.whole("v_head_dim"),
        "attention.latent_norm": "rms",
        "attention.norm_epsilon": 1e-6,  # Whatever rms_norm_eps is, in every implementation.
        "attention.query_down_bias": bias and query_rank > 0,
        "attention.latent_bias": bias,
        "attention.out_bias": bias,
        "mlp.kind": "swiglu",
        "mlp.width": hf.whole("intermediate_size"),
    }
    fields |= {f"attention.rope.{name}": value for name, value in _positions(hf).items()}
    hf.only("moe_layer_freq", 1)
    count = _experts.bounded(hf, "n_routed_experts", hf.whole("n_routed_experts", default=0, least=0), depth)
    dense = min(hf.whole("first_k_dense_replace", default=0, least=0), depth) if count else depth
    if dense == depth:
        return fields
    if dense:
        fields["per_layer"] = ((f":{dense}", {"mlp.experts.count": 0}),)
    return fields | {
        "mlp.experts.count": count,
        "mlp.experts.chosen": _at_most(hf, "num_experts_per_tok", count),
        "mlp.experts.width": hf.whole("moe_intermediate_size"),
        "mlp.experts.shared": hf.whole("n_shared_experts", default=0, least=0),
        "mlp.experts.scale": hf.number("routed_scaling_factor", default=scale, above=0),
    }


def groups(hf: Settings, score: str) -> dict[str, Any]:
    """The fields about groups of experts."""
    count, found = hf.whole("n_routed_experts"), hf.whole("n_group")
    chosen, size = _at_most(hf, "topk_group", found), count // found
    if count % found or (score == "top2" and size < 2):
        hf.refuse("n_group", f"= {found} does not make groups of n_routed_experts = {count}")
    _at_most(hf, "num_experts_per_tok", chosen * size)
    return {"mlp.experts.groups": found, "mlp.experts.groups_chosen": chosen, "mlp.experts.group_score": score}


def _at_most(hf: Settings, name: str, most: int) -> int:
    found = hf.whole(name)
    if found > most:
        hf.refuse(name, f"= {found} is more than the {most} there are to choose from")
    return found


def _positions(hf: Settings) -> dict[str, Any]:
    """Fields of `config.rope`. With latent attention YaRN's `mscale_all_dim` means a factor m^2 on the softmax scale
    too (see `layers.rope.Rope.logit_factor`), so it must not come from anywhere else."""
    fields = _rope.config(hf)
    rope = hf.group("rope_parameters" if "rope_parameters" in hf else "rope_scaling")
    if "attention_factor" in rope:
        rope.refuse("attention_factor", "is not supported with latent attention: give mscale and mscale_all_dim")
    mscale, all_dim = rope.number("mscale", default=0.0), rope.number("mscale_all_dim", default=0.0)
    if all_dim and not mscale or mscale not in (0, 1) and not all_dim:
        rope.refuse("mscale", "and mscale_all_dim must be given both: libraries disagree on what one alone means")
    if all_dim and fields["scaling"] != "yarn":
        rope.refuse("mscale_all_dim", "is only supported with rope_type 'yarn'")
    return fields


def hf_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `config`."""
    specs = layer_specs(model)
    attention, mlp = specs[0]["attention"], specs[0]["mlp"]
    if attention["layer"] != "mla":
        raise UnsuitedError(f"its attention is {attention['layer']}")
    if mlp["kind"] != "swiglu":
        raise UnsuitedError(f"its mlp is {mlp['kind']}")
    experts, counts = specs[-1]["mlp"]["experts"], _experts.counts(specs)
    fields = {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["width"],
        "num_hidden_layers": model["depth"],
        "max_position_embeddings": model["max_length"],
        "tie_word_embeddings": model["tie_embeddings"],
        "initializer_range": model["init_std"],
        "rms_norm_eps": model["norm"]["epsilon"],
        "num_attention_heads": attention["heads"],
        "num_key_value_heads": attention["heads"],
        "q_lora_rank": attention["q_lora_rank"] or None,
        "kv_lora_rank": attention["kv_lora_rank"],
        "qk_nope_head_dim": attention["qk_nope_head_dim"],
        "qk_rope_head_dim": attention["qk_rope_head_dim"],
        "v_head_dim": attention["v_head_dim"],
        "attention_bias": attention["latent_bias"],
        "hidden_act": "silu",
        "intermediate_size": mlp["width"],
        "first_k_dense_replace": counts.index(counts[-1]) if counts[-1] else model["depth"],
        "rope_parameters": _rope.hf_config(attention["rope"]),
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if counts[-1]:
        fields |= {
            "n_routed_experts": counts[-1],
            "num_experts_per_tok": experts["chosen"],
            "moe_intermediate_size": experts["width"] or specs[-1]["mlp"]["width"],
            "n_shared_experts": experts["shared"],
            "routed_scaling_factor": experts["scale"],
        }
    return fields


def mapping(model: Mapping[str, Any]) -> list[Mapped]:
    """The tensors of every layer; those of a multi-token-prediction layer have no place in the network."""
    specs = layer_specs(model)
    attention = specs[0]["attention"]
    heads, rotary = attention["heads"], attention["qk_rope_head_dim"]
    down = fused((attention["kv_lora_rank"], rotary))
    up = _by_head(heads, attention["qk_nope_head_dim"])
    found = [array("embedding.table", "model.embed_tokens.weight")]
    for layer, spec in enumerate(specs):
        block, mixer = f"model.layers.{layer}", f"model.layers.{layer}.self_attn"
        found.append(array("attention_norm.gain", f"{block}.input_layernorm.weight", layer))
        if attention["q_lora_rank"]:
            found += linear("attention.query_down", f"{mixer}.q_a_proj", layer, bias=attention["query_down_bias"])
            found.append(array("attention.query_norm.gain", f"{mixer}.q_a_layernorm.weight", layer))
            found += linear("attention.query", f"{mixer}.q_b_proj", layer)
        else:
            found += linear("attention.query", f"{mixer}.q_proj", layer)
        ours, theirs = ("attention.latent", "attention.rope_key"), f"{mixer}.kv_a_proj_with_mqa"
        found.append(Mapped(tuple(f"{name}.weight" for name in ours), (f"{theirs}.weight",), layer, **down))
        if attention["latent_bias"]:
            biases = tuple(f"{name}.bias" for name in ours)
            found.append(Mapped(biases, (f"{theirs}.bias",), layer, **down))
        found.append(array("attention.latent_norm.gain", f"{mixer}.kv_a_layernorm.weight", layer))
        ours = ("attention.key_up.weight", "attention.value_up.weight")
        found.append(Mapped(ours, (f"{mixer}.kv_b_proj.weight",), layer, **up))
        found += linear("attention.out", f"{mixer}.o_proj", layer, bias=attention["out_bias"])
        found.append(array("mlp_norm.gain", f"{block}.post_attention_layernorm.weight", layer))
        found += _mlp(spec["mlp"], f"{block}.mlp", layer)
    found.append(array("norm.gain", "model.norm.weight"))
    return found if model["tie_embeddings"] else [*found, matrix("head.weight", "lm_head.weight")]


def _by_head(heads: int, nope: int) -> dict[str, Any]:
    """`read` and `write` of kv_b_proj, whose rows are [key, value] of each head in turn."""

    def read(whole: np.ndarray) -> Arrays:
        rank = whole.shape[1]
        by_head = whole.reshape(heads, -1, rank)
        return by_head[:, :nope].reshape(-1, rank).T, by_head[:, nope:].reshape(-1, rank).T

    def write(*parts: np.ndarray) -> Arrays:
        key, value = (part.T.reshape(heads, -1, part.shape[0]) for part in parts)
        return (np.concatenate([key, value], axis=1).reshape(-1, key.shape[-1]),)

    return {"read": read, "write": write}


def _mlp(spec: Mapping[str, Any], theirs: str, layer: int) -> list[Mapped]:
    experts = spec["experts"]
    if not experts["count"]:
        return _dense("mlp", theirs, layer)
    found = [matrix("mlp.router.weight", f"{theirs}.gate.weight", layer)]
    if experts["correction"]:
        found.append(array("mlp.router.correction", f"{theirs}.gate.e_score_correction_bias", layer))
    found += _experts.mapping(layer, experts["count"], f"{theirs}.experts", EXPERT)
    return found + (_dense("mlp.shared", f"{theirs}.shared_experts", layer) if experts["shared"] else [])


def _dense(ours: str, theirs: str, layer: int) -> list[Mapped]:
    places = zip(("gate", "up", "down"), EXPERT, strict=True)
    return [matrix(f"{ours}.{name}.weight", f"{theirs}.{proj}.weight", layer) for name, proj in places]


def ignored(hf: Settings) -> tuple[str, ...]:
    """Rotary frequencies in old files, and the multi-token-prediction layers, which come after the last block."""
    first, more = hf.whole("num_hidden_layers"), hf.whole("num_nextn_predict_layers", default=0, least=0)
    extra = "|".join(str(first + number) for number in range(more))
    return (*_decoder.BUFFERS, *((rf"model\.layers\.({extra})\..*",) if more else ()))


def tensors(source: Source, hf: Settings) -> Source:
    """Every expert by itself, and fp8 made float32."""
    return fp8.opened(_experts.unfused(source, EXPERT), hf)
