"""The lightning op: every implementation against a per-token float64 recurrence, forward, state and every gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.lightning import IMPLEMENTATIONS as KNOWN
from kernels.lightning import cost, decay_rates, lightning_attention
from kernels.tokens import Tokens, packed, sequence

# Relative RMS against float64, per dtype: output, state, gradients. The state is float32 whatever the inputs are.
TOLERANCE = {"float32": (2e-6, 2e-6, 3e-6), "bfloat16": (4e-3, 2e-6, 4e-3)}
RATES = np.array([0.0, 0.3, 2.0])
# Kernels run nowhere but on their chips or interpreted: tests/test_lightning_kernels.py.
IMPLEMENTATIONS = [name for name, implementation in KNOWN.items() if not implementation.kernel]

SEGMENT = np.array([[1] * 9 + [2] * 12 + [3] * 2, [1] * 5 + [0] * 3 + [1] * 4 + [2] * 7 + [0] * 4])


@dataclasses.dataclass(frozen=True)
class Setting:
    """One call: [T, D, E], the chunk, and which token columns are given ("" none)."""

    shape: tuple[int, int, int]
    chunk: int = 8
    columns: str = ""


SETTINGS = {
    "whole_chunks": Setting((16, 6, 2)),
    "one_chunk": Setting((8, 4, 4)),
    "rest": Setting((23, 3, 5)),
    "one_token": Setting((1, 4, 4)),
    "packed": Setting((23, 3, 5), columns="packed"),
    "segments": Setting((23, 3, 5), columns="segments"),
    "padding": Setting((23, 3, 5), columns="padding"),
    "starts": Setting((23, 3, 5), columns="starts"),
    "one_token_padding": Setting((1, 4, 4), columns="padding"),
    "one_token_starts": Setting((1, 4, 4), columns="starts"),
}


def make_tokens(columns: str, length: int) -> Tokens | None:
    segment = SEGMENT[:, :length]
    index = np.arange(length)[None]
    valid = np.array([[True] * 4 + [False] * 3 + [True] * 12 + [False] * 4, [False] + [True] * 20 + [False] * 2])
    starts = np.array([[0] * 9 + [9] * 14, [-5] * 12 + [12] * 11])
    made = {
        "": None,
        "packed": packed(jnp.asarray(segment)),
        "segments": Tokens(index=jnp.asarray(index), segment=jnp.asarray(segment)),
        "padding": sequence(length, valid=jnp.asarray(valid[::-1, :length])),
        "starts": Tokens(index=jnp.asarray(index), start=jnp.asarray(starts[:, :length])),
    }
    return made[columns]


def oracle(q, k, v, rates, tokens, state):
    """The definition, token by token in float64: age by one valid token, forget at a document's border, add, read."""
    batch, length, heads = q.shape[:3]
    out, final = np.zeros(v.shape), np.array(state, np.float64)
    for b in range(batch):
        last_segment = None
        for t in range(length):
            row = {name: None for name in ("segment", "start", "valid", "index")}
            if tokens is not None:
                columns = {name: getattr(tokens, name) for name in row}
                row = {n: None if c is None else np.broadcast_to(c, (batch, length))[b, t] for n, c in columns.items()}
            if row["valid"] is not None and not row["valid"]:
                continue
            begins = row["start"] is not None and row["start"] == row["index"]
            if row["segment"] is not None:
                begins |= last_segment is not None and row["segment"] != last_segment
                last_segment = row["segment"]
            for h in range(heads):
                kept = 0 if begins else np.exp(-rates[h]) * final[b, h]
                final[b, h] = kept + np.outer(k[b, t, h], v[b, t, h])
                out[b, t, h] = q[b, t, h] @ final[b, h]
    return out, final


def draw(shape, dtype, seed=0, heads=3, batch=2):
    """q, k, v, an initial state, and weights that make one number of output and final state."""
    rng = np.random.default_rng(seed)
    length, width, value = shape
    token = (batch, length, heads)
    q, k, v = (jnp.asarray(rng.normal(size=(*token, n)), dtype) for n in (width, width, value))
    wide = jnp.promote_types(dtype, jnp.float32)
    state, state_weight = (jnp.asarray(rng.normal(size=(batch, heads, width, value)), wide) for _ in range(2))
    return (q, k, v, state), (jnp.asarray(rng.normal(size=v.shape), dtype), state_weight)


def relative(found, wanted):
    """Root mean square of the difference over that of the wanted array (of all zeros: of the difference)."""
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    scale = np.sqrt(np.mean(wanted**2)) if wanted.size else 0.0
    return np.sqrt(np.mean((found - wanted) ** 2)) / (scale or 1.0) if wanted.size else 0.0


def value_and_gradients(inputs, weights, rates, tokens, chunk, implementation):
    def loss(inputs):
        *qkv, state = inputs
        result = lightning_attention(
            *qkv, rates, tokens=tokens, initial_state=state, chunk=chunk, implementation=implementation
        )
        parts = [jnp.sum(x.astype(w.dtype) * w, dtype=state.dtype) for x, w in zip(result, weights, strict=True)]
        return parts[0] + parts[1], result

    (_, result), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    return result, gradients


@functools.cache
def expected(name, dtype):
    """Oracle output, state and gradients: the loss is linear in each input, so unit steps give derivatives exactly."""
    setting = SETTINGS[name]
    inputs, weights = draw(setting.shape, dtype)
    arrays = [np.asarray(x, np.float64) for x in inputs]
    tokens = make_tokens(setting.columns, setting.shape[0])
    out_weight, state_weight = (np.asarray(x, np.float64) for x in weights)

    def loss(q, k, v, state):
        out, final = oracle(q, k, v, RATES, tokens, state)
        return np.sum(out * out_weight) + np.sum(final * state_weight)

    base, gradients = loss(*arrays), []
    for i, x in enumerate(arrays):
        gradient = np.zeros(x.shape)
        for place in np.ndindex(x.shape):
            if place[0] == 0 or x.size < 200:  # The second row of the large settings is checked through its outputs.
                moved = x.copy()
                moved[place] += 1
                gradient[place] = loss(*arrays[:i], moved, *arrays[i + 1 :]) - base
        gradients.append(gradient if x.size < 200 else gradient[:1])
    return oracle(*arrays[:3], RATES, tokens, arrays[3]), gradients


CASES = [(name, implementation, "float32") for name in SETTINGS for implementation in IMPLEMENTATIONS]
CASES += [(name, "xla", "bfloat16") for name in ("rest", "one_token", "packed")] + [("rest", "recurrent", "bfloat16")]


@pytest.mark.parametrize(("name", "implementation", "dtype"), CASES)
def test_matches_the_recurrence(name, implementation, dtype):
    setting = SETTINGS[name]
    inputs, weights = draw(setting.shape, jnp.dtype(dtype))
    tokens = make_tokens(setting.columns, setting.shape[0])
    rates = jnp.asarray(RATES, jnp.float32)
    (out, state), gradients = value_and_gradients(inputs, weights, rates, tokens, setting.chunk, implementation)
    (wanted_out, wanted_state), wanted_gradients = expected(name, dtype)
    out_tolerance, state_tolerance, gradient_tolerance = TOLERANCE[dtype]
    assert out.dtype == dtype and state.dtype == jnp.float32
    assert relative(out, wanted_out) < out_tolerance
    assert relative(state, wanted_state) < state_tolerance
    for x, gradient, wanted in zip(inputs, gradients, wanted_gradients, strict=True):
        assert gradient.dtype == x.dtype
        assert relative(gradient[: len(wanted)], wanted) < gradient_tolerance


@pytest.mark.parametrize("columns", ["", "packed"])
def test_float64_agrees_to_rounding_at_every_chunk(columns):
    tokens = make_tokens(columns, 23)
    with jax.enable_x64(True):
        inputs, weights = draw((23, 3, 5), jnp.float64)
        rates = jnp.asarray(RATES)
        wanted = value_and_gradients(inputs, weights, rates, tokens, 8, "reference")
        for chunk in (1, 7, 64):
            found = value_and_gradients(inputs, weights, rates, tokens, chunk, "xla")
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                assert a.dtype == jnp.float64
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_no_tokens():
    inputs, _ = draw((0, 3, 5), jnp.float32)
    for name in IMPLEMENTATIONS:
        out, state = lightning_attention(
            *inputs[:3], jnp.ones(3), initial_state=inputs[3], chunk=8, implementation=name
        )
        assert out.shape == (2, 0, 3, 5)
        np.testing.assert_array_equal(state, inputs[3])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decay_is_a_constant(implementation):
    (q, k, v, _), (weight, _) = draw((12, 3, 5), jnp.float32)

    def loss(rates):
        return jnp.sum(lightning_attention(q, k, v, rates, chunk=4, implementation=implementation)[0] * weight)

    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(RATES, jnp.float32)), np.zeros(3))


def test_state_continues_across_calls_and_gradients_flow_through_it():
    (q, k, v, state), (weight, _) = draw((23, 3, 5), jnp.float32)
    rates = jnp.asarray(RATES, jnp.float32)

    def loss(k, state, cuts):
        pieces = []
        for a, b in zip([0, *cuts], [*cuts, 23], strict=True):
            part = slice(a, b)
            out, state = lightning_attention(q[:, part], k[:, part], v[:, part], rates, initial_state=state, chunk=8)
            pieces.append(out)
        return jnp.sum(jnp.concatenate(pieces, 1) * weight) + jnp.sum(state**2)

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    whole, parts = gradients(k, state, ()), gradients(k, state, (1, 2, 11))
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert relative(a, b) < 3e-6


def test_right_padded_prompts_decode_as_if_alone():
    """Prompts of 3, 9 and 7 tokens in one batch, then five tokens one at a time, against each row on its own."""
    lengths, steps, width = [3, 9, 7], 5, 9
    (q, k, v, _), _ = draw((width + steps, 4, 4), jnp.float32, batch=3)
    rates = jnp.asarray(RATES, jnp.float32)
    valid = np.arange(width) < np.array(lengths)[:, None]
    prompt = [jnp.where(valid[..., None, None], x[:, :width], jnp.nan) for x in (q, k, v)]
    tokens = sequence(width, valid=jnp.asarray(valid))
    _, state = lightning_attention(*prompt, rates, tokens=tokens, chunk=4)
    outs = []
    for step in range(steps):
        here = sequence(1, jnp.asarray(lengths) + step)
        new = [x[:, width + step][:, None] for x in (q, k, v)]
        out, state = lightning_attention(*new, rates, tokens=here, initial_state=state, chunk=4)
        outs.append(out)
    for row, length in enumerate(lengths):
        alone = [np.concatenate([x[row, :length], x[row, width:]])[None] for x in (q, k, v)]
        wanted, final = oracle(*(np.asarray(x, np.float64) for x in alone), RATES, None, np.zeros((1, 3, 4, 4)))
        assert relative(jnp.concatenate(outs, 1)[row], wanted[0, length:]) < 3e-6
        assert relative(state[row], final[0]) < 3e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_crosses_a_document(implementation):
    """The output of one document has gradient zero at all others, and at an initial state that it began after."""
    (q, k, v, state), (weight, _) = draw((23, 3, 5), jnp.float32)
    tokens = packed(jnp.asarray(SEGMENT))
    inside = np.asarray(SEGMENT == 2)[..., None, None]

    def loss(k, v, state):
        out, _ = lightning_attention(
            q,
            k,
            v,
            jnp.zeros(3),
            tokens=tokens,
            initial_state=state,
            chunk=8,
            implementation=implementation,
        )
        return jnp.sum(jnp.where(inside, out * weight, 0))

    *gradients, state_gradient = jax.grad(loss, argnums=(0, 1, 2))(k, v, state)
    for gradient in gradients:
        assert np.all(np.where(inside, 0, gradient) == 0)
        assert np.any(np.where(inside, gradient, 0) != 0)
    np.testing.assert_array_equal(state_gradient, np.zeros(state.shape))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_may_hold_anything(implementation):
    inputs, weights = draw((23, 3, 5), jnp.float32)
    tokens = make_tokens("padding", 23)
    valid = np.asarray(tokens.valid)[..., None, None]
    rates = jnp.asarray(RATES, jnp.float32)
    clean = value_and_gradients(inputs, weights, rates, tokens, 8, implementation)
    bad = (jnp.nan, jnp.inf, jnp.nan)
    dirty_inputs = (*(jnp.where(valid, x, y) for x, y in zip(inputs[:3], bad, strict=True)), inputs[3])
    dirty = value_and_gradients(dirty_inputs, weights, rates, tokens, 8, implementation)
    for a, b in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.all(np.where(valid, 0, clean[0][0]) == 0)
    assert np.all(np.where(valid, 0, clean[1][0]) == 0)


def test_slow_decay_stays_exact_over_many_tokens():
    """exp(-s n), not a product of n factors: after 20,000 tokens at the top layer's rate the state is right to 1e-6."""
    rate, length = 2.5e-6, 20_000
    ones = jnp.ones((1, length, 1, 1))
    _, state = lightning_attention(ones, ones, ones, jnp.full(1, rate))
    wanted = np.sum(np.exp(-np.float64(np.float32(rate)) * np.arange(length)))
    assert abs(float(state[0, 0, 0, 0]) / wanted - 1) < 3e-6


def test_repeats_are_bitwise_equal():
    inputs, weights = draw((70, 8, 8), jnp.float32)
    rates = jnp.asarray(RATES, jnp.float32)
    first, second = (value_and_gradients(inputs, weights, rates, None, 16, "xla") for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def gradient_program(length, dtype, columns=False):
    """The compiled gradient for one row of 2 heads of width 32, chunk 16."""
    x = jax.ShapeDtypeStruct((1, length, 2, 32), dtype)
    tokens = packed(jnp.arange(length)[None] // 50 + 1) if columns else None

    def loss(q, k, v):
        return jnp.sum(lightning_attention(q, k, v, jnp.ones(2), tokens=tokens, chunk=16)[0].astype(jnp.float32))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()


def test_backward_keeps_only_its_inputs():
    length = 512
    x = jnp.ones((1, length, 2, 32))
    _, pullback = jax.vjp(lambda q, k, v: lightning_attention(q, k, v, jnp.ones(2), chunk=16)[0], x, 2 * x, 3 * x)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert kept <= 3 * x.size + 2 * 32 * 32 + 16 * 16 * 4


def test_memory_is_linear_in_length_and_far_below_a_state_per_token():
    small, large = (gradient_program(n, jnp.float32).memory_analysis().temp_size_in_bytes for n in (1024, 4096))
    token_bytes = 2 * 32 * 4
    assert large - small <= 2.1 * 3072 * token_bytes  # At most two whole arrays beside the outputs.
    assert large < 4096 * 2 * 32 * 32 * 4 / 8


def test_bfloat16_is_never_widened_as_a_whole():
    """XLA's CPU backend turns bf16 slices and updates in loops into float32 ones of the whole array."""
    assert "f32[1,512,2,32]" in gradient_program(512, jnp.float32).as_text()  # The text would show it.
    for columns in (False, True):
        assert "f32[1,512,2,32]" not in gradient_program(512, jnp.bfloat16, columns).as_text()


def test_inside_scan_remat_and_vmap():
    """Layers with their own traced index under scan and remat, batched by vmap, equal a plain loop."""
    (q, k, v, _), _ = draw((20, 4, 4), jnp.float32)
    layers = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 4)) / 2, jnp.float32)

    def layer(x, inputs):
        w, index = inputs
        rates = decay_rates(3, index, 3)
        return x + jnp.tanh(lightning_attention(x @ w, k[:1] @ w, v[:1], rates, chunk=8)[0]), None

    def stacked(layers, x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x[None], (layers, jnp.arange(3)))[0])

    def plain(layers, x):
        x = x[None]
        for index in range(3):
            x, _ = layer(x, (layers[index], index))
        return jnp.sum(x)

    for a, b in zip(
        jax.jit(jax.vmap(jax.value_and_grad(stacked), (None, 0)))(layers, q),
        [jnp.stack(parts) for parts in zip(*(jax.value_and_grad(plain)(layers, x) for x in q), strict=True)],
        strict=True,
    ):
        assert relative(a, b) < 2e-5


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("columns", ["", "packed"])
def test_sharded_over_rows_and_heads(mapped, columns):
    """Rows and heads on a 2 x 2 mesh: the numbers of one device, and no communication."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    (q, k, v, _), (weight, _) = draw((23, 4, 4), jnp.float32, heads=4)
    tokens, rates = make_tokens(columns, 23), jnp.asarray([0.0, 0.1, 0.5, 2.0])
    spec, rows = PartitionSpec("data", None, "model"), PartitionSpec("data")

    def attend(q, k, v, rates, tokens):
        return lightning_attention(q, k, v, rates, tokens=tokens, chunk=8)[0]

    def gradients(function, q, k, v, rates, tokens):
        return jax.grad(lambda q, k, v: jnp.sum(function(q, k, v, rates, tokens) * weight), argnums=(0, 1, 2))(q, k, v)

    wanted = gradients(attend, q, k, v, rates, tokens)
    function = attend
    if mapped:
        specs = (spec, spec, spec, PartitionSpec("model"), rows)
        function = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=spec)
    q, k, v = (jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v))
    rates = jax.device_put(rates, NamedSharding(mesh, PartitionSpec("model")))
    tokens = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, rows)), tokens)
    program = jax.jit(functools.partial(gradients, function)).lower(q, k, v, rates, tokens).compile()
    for a, b in zip(program(q, k, v, rates, tokens), wanted, strict=True):
        assert relative(a, b) < 3e-6
        assert a.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
    assert not any(name in program.as_text() for name in ("all-reduce", "all-gather", "all-to-all", "collective"))


def test_decay_rules():
    alibi = decay_rates(8, 0, 5, layer_factor=False)
    np.testing.assert_allclose(alibi, 2.0 ** -np.arange(1, 9), rtol=1e-6)
    six = decay_rates(6, 0, 5, layer_factor=False)
    np.testing.assert_allclose(six, 2.0 ** -np.array([2, 4, 6, 8, 1, 3]), rtol=1e-6)
    np.testing.assert_allclose(decay_rates(4, 2, 5), 2.0 ** -np.array([2, 4, 6, 8]) * (0.5 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(decay_rates(1, 0, 1), [2.0**-8 * (1 + 1e-5)], rtol=1e-6)
    np.testing.assert_allclose(decay_rates(4, 3, 4, "paper"), np.array([0, 2, 4, 6]) / 4, rtol=1e-6)
    np.testing.assert_array_equal(decay_rates(4, 1, 4, "none"), np.zeros(4))
    for heads in (1, 3, 8, 12):
        for rule in ("alibi", "paper", "none"):
            traced = jax.jit(lambda layer, heads=heads, rule=rule: decay_rates(heads, layer, 7, rule))
            for layer in range(7):
                rates = decay_rates(heads, layer, 7, rule)
                assert rates.shape == (heads,) and rates.dtype == jnp.float32 and np.all(rates >= 0)
                np.testing.assert_allclose(traced(layer), rates, rtol=1e-6)
    with pytest.raises(ValueError, match="unknown decay rule 'alibbi'.*alibi"):
        decay_rates(4, 0, 4, "alibbi")


def count_dots(jaxpr):
    """Operations of all products in a jaxpr without loops."""
    total = 0
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            total += count_dots(inner) if hasattr(inner, "eqns") else 0
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([shape[i] for i in contracted]))
    return total


def test_cost_is_what_is_computed():
    """Declared operations against those of the traced program, for one whole chunk and a rest (which need no loop)."""
    length, heads, width, value, chunk = 80, 2, 6, 4, 64
    (q, k, v, _), _ = draw((length, width, value), jnp.float32, heads=heads, batch=1)

    def forward(q, k, v):
        return lightning_attention(q, k, v, jnp.ones(heads), chunk=chunk, implementation="xla")

    zeros = jax.tree.map(jnp.zeros_like, forward(q, k, v))
    made = count_dots(jax.make_jaxpr(forward)(q, k, v).jaxpr)
    assert made == cost.flops(length, heads, width, value, chunk=chunk)
    both = count_dots(jax.make_jaxpr(lambda q, k, v: jax.vjp(forward, q, k, v)[1](zeros))(q, k, v).jaxpr)
    assert both - made == cost.flops(length, heads, width, value, chunk=chunk, backward=True)
    assert cost.bytes(1, length, heads, width, value) == 4 * sum(x.size for x in (q, k, v, *zeros, zeros[1]))
    assert cost.state_bytes(heads, width, value) == zeros[1].size * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((2, 5, 3))}, "q must be"),
        ({"k": jnp.ones((2, 5, 3, 5))}, "do not fit each other"),
        ({"v": jnp.ones((2, 6, 3, 4))}, "do not fit each other"),
        ({"v": jnp.ones((2, 5, 3, 4), jnp.bfloat16)}, "share one float type"),
        ({"decay": jnp.ones(2)}, "one rate per head"),
        ({"initial_state": jnp.ones((2, 3, 4, 5))}, "initial_state"),
        ({"tokens": sequence(6)}, "tokens of shape"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"implementation": "xlaa"}, "did you mean xla"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    x = jnp.ones((2, 5, 3, 4))
    arguments = {"q": x, "k": x, "v": x, "decay": jnp.ones(3)} | change
    with pytest.raises(ValueError, match=message):
        lightning_attention(**arguments)
