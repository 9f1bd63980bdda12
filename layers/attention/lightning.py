"""Lightning attention: causal linear attention with a fixed exponential decay per head."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels.lightning import cost, lightning_attention
from kernels.lightning.decay import decay_rates
from kernels.tokens import Tokens
from layers.attention.contract import NOWHERE, Attention, AttentionOutput, Setting, register
from layers.cache import StateCache
from layers.hooks import Hooks, LayerHooks
from layers.linear import Linear
from layers.norm import Norm, widened
from layers.variables import Constant
from sharding import logical

GATES = ("plain", "sigmoid", "none")
ACTIVATIONS = {"silu": jax.nn.silu, "elu1": lambda x: 1 + jax.nn.elu(x), "none": lambda x: x}


@register("lightning")
class LightningAttention(Attention):
    """The gated linear attention of TransNormerLLM (arXiv 2405.17381; 2307.14995). Options:
    `configs/attention/lightning.py`.

    o_t = sum_{u<=t} lambda^(t-u) (q_t . k_u) v_u with q = phi(x W_q), k = phi(x W_k), no softmax, scale or
    denominator; the heads are normalised together (RMS over all of them, without a gain unless `norm_gain`), gated by
    x W_u ("plain") or its sigmoid, projected. MiniMax-01 (arXiv 2501.08313) has the sigmoid, the gain, and phi on v too
    (`activate_values`).
    lambda = exp(-s), s fixed by head and layer; the paper's rule and the released code's differ, and `decay` chooses
    (default the released "alibi"). LRPE, where on, turns q and k into (x cos(theta t), x sin(theta t)) with
    learnt theta.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        layer_index: int,
        rngs: nnx.Rngs,
        heads: int = 8,
        head_dim: int = 32,
        value_dim: int = 0,
        decay: str = "alibi",
        layer_factor: bool = True,
        activation: str = "silu",
        activate_values: bool = False,
        gate: str = "plain",
        norm_gain: bool = False,
        lrpe: bool = False,
        norm_epsilon: float = 1e-6,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"lightning activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if gate not in GATES:
            raise ValueError(f"lightning gate {gate!r} is not one of {', '.join(GATES)}")
        self.setting, self.activation, self.activate_values = setting, activation, activate_values
        self.gating = gate
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim or head_dim
        into: dict[str, Any] = dict(axes=("embed", "heads"), rngs=rngs)
        self.query = Linear(setting, setting.width, heads * head_dim, **into)
        self.key = Linear(setting, setting.width, heads * head_dim, **into)
        self.value = Linear(setting, setting.width, heads * self.value_dim, **into)
        self.gate = Linear(setting, setting.width, heads * self.value_dim, **into) if gate != "none" else None
        norm = "rms" if norm_gain else "srms"
        self.norm = Norm(setting, heads * self.value_dim, kind=norm, epsilon=norm_epsilon, axis="heads")
        self.out = Linear(
            setting,
            heads * self.value_dim,
            setting.width,
            axes=("heads", "embed"),
            std=setting.residual_std,
            rngs=rngs,
        )
        rates = decay_rates(heads, layer_index, setting.depth, rule=decay, layer_factor=layer_factor)
        self.decay = Constant(rates, axes=("heads",))
        channels = jnp.arange(heads * head_dim, dtype=jnp.float32).reshape(heads, head_dim)
        theta = 10000.0 ** (-2 * channels / (heads * head_dim))
        self.theta = nnx.Param(theta.astype(setting.param_dtype), axes=("heads", None)) if lrpe else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        cache: StateCache | None = None,
        hooks: Hooks | None = None,
        layer: int = 0,
    ) -> AttentionOutput:
        site = LayerHooks(hooks, layer, tokens)
        if any(map(site.edits, ("scores", "probabilities"))) or site.tap("scores") or site.tap("probabilities"):
            raise NotImplementedError("lightning attention forms no scores: hook queries or heads instead")
        x = site("layer_input", x)
        phi = ACTIVATIONS[self.activation]
        shape = (*x.shape[:2], self.heads, -1)
        q, k = (phi(project(x)).reshape(shape) for project in (self.query, self.key))
        v = (phi(self.value(x)) if self.activate_values else self.value(x)).reshape(shape)
        q, k = self._phases(site("query_raw", q), tokens), self._phases(k, tokens)
        q = site("query", q)
        state = None if cache is None or cache.fresh else cache.state["kv"]
        heads, state = self._attend(q, k, v, tokens, state)
        heads = site("heads", heads).reshape(*x.shape[:2], -1)
        heads = self.norm(heads)
        if self.gate is not None:
            gate = self.gate(x)
            heads = heads * (jax.nn.sigmoid(gate) if self.gating == "sigmoid" else gate)
        cache = None if cache is None else cache.advance({"kv": state}, tokens)
        return AttentionOutput(self.out(heads), cache, site.taken)

    def _phases(self, x: Float[Array, "B T H D"], tokens: Tokens) -> Float[Array, "B T H D2"]:
        if self.theta is None:
            return x
        angle = tokens.positions()[..., None, None] * widened(self.theta[...])
        wide = widened(x)
        return jnp.concatenate([wide * jnp.cos(angle), wide * jnp.sin(angle)], axis=-1).astype(x.dtype)

    def _attend(self, q, k, v, tokens, state) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H D2 Dv"]]:
        plain = tokens.segment is None and tokens.valid is None
        tokens = None if plain else Tokens(tokens.index, segment=tokens.segment, valid=tokens.valid)

        def local(q, k, v, decay, tokens, state):
            return lightning_attention(
                q, k, v, decay, tokens=tokens, initial_state=state, implementation=self.setting.implementation
            )

        heads, states = ("batch", "length", "heads", None), ("batch", "heads", None, None)
        specs = (heads, heads, heads, ("heads",), None if plain else ("batch", "length"), states)
        specs = specs if state is not None else (*specs[:-1], None)
        return logical.shard_kernel(local, specs, (heads, states))(q, k, v, self.decay[...], tokens, state)

    @property
    def _key_dim(self) -> int:
        return self.head_dim if self.theta is None else 2 * self.head_dim

    def init_cache(self, batch: int, length: int, dtype: str) -> StateCache:
        return StateCache.create(batch, {"kv": (self.heads, self._key_dim, self.value_dim)})

    def parameter_count(self) -> int:
        values = 2 if self.gate is None else 3
        matrices = self.setting.width * self.heads * (2 * self.head_dim + values * self.value_dim)
        return matrices + self._vectors

    @property
    def _vectors(self) -> int:
        """Parameters outside matrices."""
        gain = 0 if self.norm.gain is None else self.heads * self.value_dim
        return gain + (0 if self.theta is None else self.heads * self.head_dim)

    def flops(self, length: int) -> int:
        projections = 2 * length * (self.parameter_count() - self._vectors)
        return projections + cost.flops(length, self.heads, self._key_dim, self.value_dim)

    def cache_bytes(self, length: int, itemsize: int, parts: Mapping[str, int] = NOWHERE) -> int:
        return self.heads // parts.get("heads", 1) * self._key_dim * self.value_dim * 4  # The state is float32.

    def all_reduces(self) -> dict[int, int]:
        return {self.setting.width: 1, 1: 1}  # The mean square of the output norm spans all heads.
