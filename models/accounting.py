"""What a model costs before it runs: parameters, operations, memory, cache. Nothing is allocated."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.attention.contract import NOWHERE

_OPTIMIZER_SLOTS = {"adamw": 2, "muon": 2, "lion": 1, "sgd": 1}


@dataclasses.dataclass(frozen=True)
class Account:
    """The cost of a model at a sequence length and batch.

    Attributes:
        parameters: all trained numbers.
        active_parameters: those that one token meets: of a mixture, the experts it goes to and what all tokens share.
        embedding_parameters: those in token tables.
        forward_flops_per_token: matrix products only, 2 per multiply-add, causal and window aware.
        training_flops_per_token: forward and backward, 3 times the forward.
        state_bytes: parameters, their gradients and the optimiser's averages, over all devices.
        activation_bytes: what the forward pass keeps for the backward pass at this batch, over all devices.
        cache_bytes_per_token: what decoding remembers per token and device, at this length, over all layers.
    """

    parameters: int
    active_parameters: int
    embedding_parameters: int
    forward_flops_per_token: float
    training_flops_per_token: float
    state_bytes: int
    activation_bytes: int
    cache_bytes_per_token: float

    def lines(self) -> list[str]:
        """The account for people."""
        active = "" if self.active_parameters == self.parameters else f", {self.active_parameters:,} active per token"
        return [
            f"parameters            {self.parameters:,} ({self.embedding_parameters:,} in embeddings{active})",
            f"training FLOPs/token  {self.training_flops_per_token:,.0f} (forward {self.forward_flops_per_token:,.0f})",
            f"memory, state         {_mib(self.state_bytes)} (parameters, gradients, optimiser; all devices)",
            f"memory, activations   {_mib(self.activation_bytes)} (kept for the backward pass; all devices)",
            f"cache bytes/token     {self.cache_bytes_per_token:,.1f} (per device, at this length)",
        ]


def account(
    config: Mapping[str, Any],
    vocab_size: int,
    *,
    length: int,
    batch: int = 1,
    optimizer: str = "adamw",
    parts: Mapping[str, int] = NOWHERE,
) -> Account:
    """The cost of `config.model` for a tokenizer of `vocab_size`, training on `batch` rows of `length` tokens.

    `parts`: into how many pieces a mesh cuts logical axes (`sharding.Layout.parts`).
    """
    from models import build

    config = {**config, "scan_layers": "always"}  # What a block keeps does not depend on how blocks are run.
    model = nnx.eval_shape(lambda: build(config, vocab_size=vocab_size, rngs=nnx.Rngs(0)))
    definition, parameters, rest = nnx.split(model, nnx.Param, ...)
    leaves = jax.tree.leaves(parameters)
    count = sum(leaf.size for leaf in leaves)
    rows = model.embedding.table.get_value().size
    tables = rows if model.head is None else rows + model.head.weight.get_value().size
    forward, cache, idle = 2.0 * rows, 0.0, 0
    itemsize = jnp.dtype(model.setting.compute_dtype).itemsize
    for stack in model.stacks:
        for block in stack.blocks:
            forward += stack.repeats * (block.attention.flops(length) + block.mlp.flops(length)) / length
            idle += stack.repeats * block.mlp.idle_parameter_count()
            cache += stack.repeats * block.attention.cache_bytes(length, itemsize, parts) / length
    weight_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    slots = _OPTIMIZER_SLOTS.get(optimizer, 2)
    return Account(
        parameters=count,
        active_parameters=count - idle,
        embedding_parameters=tables,
        forward_flops_per_token=forward,
        training_flops_per_token=3 * forward,
        state_bytes=2 * weight_bytes + 4 * slots * count,
        activation_bytes=_residual_bytes(definition, parameters, rest, batch, length),
        cache_bytes_per_token=cache,
    )


def _residual_bytes(definition: nnx.GraphDef, parameters: nnx.State, rest: nnx.State, batch: int, length: int) -> int:
    """Sizes of what `jax.vjp` of the logits would hold, without what it holds of its inputs as they are."""

    def residuals(parameters: nnx.State, rest: nnx.State, ids: jax.Array) -> Any:
        return jax.vjp(lambda p: nnx.merge(definition, p, rest)(ids).logits, parameters)[1]

    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    jaxpr = jax.make_jaxpr(residuals)(parameters, rest, ids).jaxpr
    inputs = {id(variable) for variable in jaxpr.invars}
    held = {id(variable): variable.aval for variable in jaxpr.outvars if id(variable) not in inputs}
    return sum(aval.size * aval.dtype.itemsize for aval in held.values())  # type: ignore[attr-defined]


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"
