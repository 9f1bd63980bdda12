"""Small layers and models for the contract suite: every preset, and the options that change the mathematics."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import layers.attention
from configs import attention as presets
from kernels.tokens import Tokens, packed, sequence
from layers.rope import Rope
from layers.setting import Setting
from models.decoder import DecoderLM
from models.plan import layer_specs

WIDTH = 24
# Applied where a preset has the field; everything else keeps the preset's value.
SMALL = {
    "heads": 4,
    "kv_heads": lambda value: {8: 4, 2: 2, 1: 1}[value],
    "head_dim": 6,
    "shared_heads": 1,
    "window": lambda value: 5 if value else 0,
    "sink_tokens": lambda value: 2 if value else 0,
    "kv_lora_rank": lambda value: 10 if value == 64 else 5,  # GLA's is half of MLA's.
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "lrpe": False,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A named choice of options of one registered layer."""

    name: str
    preset: str
    changes: tuple[tuple[str, Any], ...] = ()

    def options(self) -> dict[str, Any]:
        """What the layer's constructor takes, and its registered name under "layer"."""
        options = presets.get(self.preset).to_dict()
        for field, value in SMALL.items():
            if field in options:
                options[field] = value(options[field]) if callable(value) else value
        options |= dict(self.changes)
        return options | ({"rope": dict(options["rope"])} if "rope" in options else {})

    @functools.cache  # noqa: B019 (cases live as long as the tests)
    def layer(self, *, dtype: str = "float32", implementation: str | None = None, index: int = 0) -> Any:
        """One layer of a network of 3."""
        setting = Setting(WIDTH, depth=3, max_length=64, param_dtype=dtype, compute_dtype=dtype, init_std=0.3)
        setting = dataclasses.replace(setting, implementation=implementation)
        options = self.options()
        if "rope" in options:
            options["rope"] = Rope(**options["rope"])
        variant = layers.attention.get(options.pop("layer"))
        return variant(setting, layer_index=index, rngs=nnx.Rngs(7), **options)

    @functools.cache  # noqa: B019
    def model(self, *, depth: int = 2, implementation: str | None = None, **changes: Any) -> DecoderLM:
        """A small language model of 50 tokens on this layer."""
        setting = Setting(WIDTH, depth=depth, max_length=64, init_std=0.1, implementation=implementation)
        config = dict(
            depth=depth,
            attention=self.options(),
            mlp=dict(kind="swiglu", width=32, bias=False),
            norm=dict(kind="rms", epsilon=1e-6),
            residual=dict(form="pre"),
            per_layer=(),
        )
        specs = layer_specs(config)
        return DecoderLM(setting, specs, vocab_size=50, rows=64, norm=config["norm"], rngs=nnx.Rngs(3), **changes)


YARN = tuple(
    dataclasses.asdict(
        Rope(scaling="yarn", factor=4.0, original_length=16, mscale_all_dim=1.0, layout="interleaved")
    ).items()
)
EXTRA = (
    Case("mha-every-option", "mha", (("qk_norm", True), ("learned_sinks", True), ("soft_cap", 3.0), ("value_dim", 5),
         ("qkv_bias", True), ("out_bias", True))),
    Case("mla-q-lora-yarn", "mla", (("q_lora_rank", 12), ("rope", YARN))),
    Case("tpla-scatter-q-lora-yarn", "tpla", (("out_mode", "scatter_heads"), ("q_lora_rank", 12), ("rope", YARN))),
    Case("lightning-lrpe", "lightning", (("lrpe", True), ("value_dim", 5))),
    Case("lightning-paper-ungated", "lightning", (("decay", "paper"), ("activation", "elu1"), ("gate", "none"))),
)  # fmt: skip


class Compiled:
    """A layer behind `jax.jit`: the same call and methods, without compiling every small operation by itself."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        definition, self.state = nnx.split(layer)
        self.call = jax.jit(lambda state, x, tokens, cache: nnx.merge(definition, state)(x, tokens, cache))

    def __call__(self, x: jax.Array, tokens: Tokens, cache: Any = None) -> Any:
        return self.call(self.state, x, tokens, cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def cases() -> list[Case]:
    """Every preset, then the extra options."""
    return [Case(name, name) for name in presets.names()] + list(EXTRA)


def one_of_each() -> list[Case]:
    """The first case of every layer."""
    return list({case.options()["layer"]: case for case in reversed(cases())}.values())


def inputs(length: int, batch: int = 2, dtype: str = "float32", seed: int = 0) -> jax.Array:
    """Hidden states [batch, length, WIDTH]."""
    return jax.random.normal(jax.random.key(seed), (batch, length, WIDTH), dtype)


def plain(length: int) -> Tokens:
    """One document per row."""
    return sequence(length)


def two_documents(first: int, second: int, padding: int = 0) -> Tokens:
    """Two documents packed in one row, then padding."""
    segment = [1] * first + [2] * second + [0] * padding
    return packed(jnp.asarray([segment], jnp.int32))
