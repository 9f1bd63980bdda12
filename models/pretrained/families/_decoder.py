"""What the families of pre-norm decoders with grouped-query attention share."""

from collections.abc import Mapping
from typing import Any

from models.plan import layer_specs
from models.pretrained.errors import UnsuitedError
from models.pretrained.families import _rope
from models.pretrained.mapping import Mapped, array, linear
from models.pretrained.settings import Settings

KINDS = ("full_attention", "sliding_attention")
_ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "swish": "swiglu"}

# Buffers that files of old versions carry.
BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def config(hf: Settings, *, tied: bool = False, activation: str = "hidden_act") -> dict[str, Any]:
    """The fields of `config.model` that all these families say alike; `tied` is the family's default."""
    heads = hf.whole("num_attention_heads")
    width = hf.whole("hidden_size")
    found = hf.text(activation, default="silu")
    if found not in _ACTIVATIONS:
        known = ", ".join(map(repr, _ACTIVATIONS))
        hf.refuse(activation, f"= {found!r} is not supported: only {known}")
    kv_heads = hf.whole("num_key_value_heads", default=heads)
    if heads % kv_heads:
        hf.refuse("num_key_value_heads", f"= {kv_heads} does not divide num_attention_heads = {heads}")
    return {
        "vocab_size": hf.whole("vocab_size"),
        "width": width,
        "depth": hf.depth(),
        "max_length": hf.whole("max_position_embeddings"),
        "tie_embeddings": hf.flag("tie_word_embeddings", default=tied),
        "init_std": hf.number("initializer_range", default=0.02, above=0),
        "norm.epsilon": hf.number("rms_norm_eps", default=1e-6, above=0),
        "mlp.kind": _ACTIVATIONS[found],
        "mlp.width": hf.whole("intermediate_size"),
        "attention": "mha",
        "attention.heads": heads,
        "attention.kv_heads": kv_heads,
        "attention.head_dim": hf.whole("head_dim", default=max(1, width // heads)),
        **{f"attention.rope.{name}": value for name, value in _rope.config(hf).items()},
    }


def windows(hf: Settings, kinds: tuple[str, ...], window: int | None) -> dict[str, Any]:
    """`attention.window` of layers of these kinds."""
    for kind in kinds:
        if kind not in KINDS:
            hf.refuse("layer_types", f"has {kind!r}: only {' and '.join(map(repr, KINDS))} are supported")
    if "sliding_attention" not in kinds:
        return {"attention.window": 0}
    if window is None:
        hf.refuse("sliding_window", "is missing, and layer_types has 'sliding_attention'")
    values = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return {"attention.window": window if len(set(values)) == 1 else values}


def hf_config(model: Mapping[str, Any], *, activation: str = "hidden_act") -> dict[str, Any]:
    """The fields of a config.json that all these families write alike."""
    specs = layer_specs(model)
    other = next((spec["attention"]["layer"] for spec in specs if spec["attention"]["layer"] != "mha"), None)
    if other:
        raise UnsuitedError(f"its attention is {other}")
    spec, attention = specs[0], specs[0]["attention"]
    kinds = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
    if spec["mlp"]["kind"] not in kinds:
        raise UnsuitedError(f"its mlp is {spec['mlp']['kind']}")
    return {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["width"],
        "intermediate_size": spec["mlp"]["width"],
        "num_hidden_layers": model["depth"],
        "num_attention_heads": attention["heads"],
        "num_key_value_heads": attention["kv_heads"],
        "head_dim": attention["head_dim"],
        activation: kinds[spec["mlp"]["kind"]],
        "max_position_embeddings": model["max_length"],
        "initializer_range": model["init_std"],
        "rms_norm_eps": spec["norm"]["epsilon"],
        "tie_word_embeddings": model["tie_embeddings"],
        "rope_parameters": _rope.hf_config(attention["rope"]),
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def kinds_of(model: Mapping[str, Any]) -> tuple[list[str], int | None]:
    """`layer_types` and the window of the layers that have one."""
    found = [spec["attention"]["window"] for spec in layer_specs(model)]
    return [KINDS[bool(window)] for window in found], next((window for window in found if window), None)


def whole_heads(model: Mapping[str, Any]) -> None:
    """UnsuitedError where transformers wants the width to be a multiple of the heads."""
    heads = layer_specs(model)[0]["attention"]["heads"]
    if model["width"] % heads:
        raise UnsuitedError(f"its width {model['width']} is no multiple of its {heads} heads")


def mapping(model: Mapping[str, Any], norms: Mapping[str, str] | None = None) -> list[Mapped]:
    """Tensors by the names that Llama gave them; `norms` are the norms of a block, theirs by ours."""
    norms = norms or {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    found = [array("embedding.table", "model.embed_tokens.weight")]
    for layer, spec in enumerate(layer_specs(model)):
        options, prefix = spec["attention"], f"model.layers.{layer}"
        found += [array(f"{ours}.gain", f"{prefix}.{theirs}.weight", layer) for ours, theirs in norms.items()]
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            bias = options["qkv_bias"]
            found += linear(f"attention.{ours}", f"{prefix}.self_attn.{theirs}", layer, bias=bias)
        found += linear("attention.out", f"{prefix}.self_attn.o_proj", layer, bias=options["out_bias"])
        if options["qk_norm"]:
            for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
                found.append(array(f"attention.{ours}.gain", f"{prefix}.self_attn.{theirs}.weight", layer))
        for name in ("gate", "up", "down"):
            found += linear(f"mlp.{name}", f"{prefix}.mlp.{name}_proj", layer, bias=spec["mlp"]["bias"])
    found.append(array("norm.gain", "model.norm.weight"))
    return found if model["tie_embeddings"] else found + linear("head", "lm_head")


def ignored(hf: Settings, *, tied: bool = False) -> tuple[str, ...]:
    """Old buffers, and the head where it is the embedding."""
    return (*BUFFERS, "lm_head\\.weight") if hf.flag("tie_word_embeddings", default=tied) else BUFFERS
