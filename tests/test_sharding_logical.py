"""Logical axes against hand-computed layouts, on eight CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.tokens import sequence
from sharding import ShardingError, collectives, logical
from sharding.logical import Rule

RULES = {
    "batch": Rule(("data",)),
    "embed": Rule(("data",), stored=True),
    "heads": Rule(("model",)),
    "kv_heads": Rule(("model",), replicable=True),
    "mlp": Rule(("model",)),
    "latent": Rule(("data",), stored=True),
    "both": Rule(("data", "model")),
    "length": Rule(),
}


def mesh(data: int, model: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def test_without_layout_nothing_happens():
    x = jnp.ones((3, 5))
    assert logical.active() is None
    assert logical.constrain(x, ("batch", "mlp")) is x
    assert logical.gather(x, ("embed", "mlp")) is x
    function = jnp.sin
    assert logical.shard_kernel(function, (("batch", None),), ("batch", None)) is function
    assert logical.kv_repeat(6, 2) == 1
    with logical.activate(mesh(1, 1), RULES):
        assert logical.constrain(x, ("batch", "mlp")) is x
        assert logical.shard_kernel(function, (("batch", None),), ("batch", None)) is function


@pytest.mark.parametrize(
    ("axes", "shape", "at_rest", "expected"),
    [
        (("batch", "length", "embed"), (8, 5, 6), False, P("data", None, None)),
        (("embed", "mlp"), (8, 6), True, P("data", "model")),
        (("embed", "mlp"), (8, 6), False, P(None, "model")),
        (("mlp", "embed"), (6, 8), True, P("model", "data")),
        # Both stored on the same mesh axis: the first has it.
        (("embed", "latent"), (8, 4), True, P("data", None)),
        (("embed", ("kv_heads", 1)), (8, 6), True, P("data", None)),
        (("embed", ("kv_heads", 2)), (8, 6), True, P("data", "model")),
        (("kv_heads",), (3,), True, P(None)),
        (("both", None), (16, 3), False, P(("data", "model"), None)),
    ],
)
def test_spec(axes, shape, at_rest, expected):
    with logical.activate(mesh(4, 2), RULES) as active:
        assert active.spec(axes, shape, at_rest=at_rest) == expected


@pytest.mark.parametrize(
    ("axes", "shape", "says"),
    [
        (("batch", None), (6, 3), ["'batch'", "size 6", "'data' of size 4", "config.data.batch_size"]),
        ((("heads", 3), None), (12, 3), ["'heads'", "size 3", "'model' of size 2", "config.model.attention.heads"]),
        (("heads", "mlp"), (4, 4), ["'heads' and 'mlp'", "'model'"]),
        (("batch",), (4, 4), ["(4, 4)", "one name"]),
        (("batch", "head"), (4, 4), ["unknown logical axis 'head'", "heads"]),
    ],
)
def test_errors_name_what_is_wrong(axes, shape, says):
    with logical.activate(mesh(4, 2), RULES), pytest.raises(ShardingError) as caught:
        logical.constrain(jnp.ones(shape), axes)
    assert "\n" not in str(caught.value)
    for part in says:
        assert part in str(caught.value)


def test_rule_for_a_mesh_axis_that_is_not_there():
    with pytest.raises(ShardingError, match="unknown mesh axis 'modl': did you mean model"):
        with logical.activate(mesh(4, 2), {"mlp": "modl"}):
            pass


def test_constrain_lays_out_inside_and_outside_jit():
    on = mesh(4, 2)
    x = jnp.arange(32.0).reshape(8, 4)
    with logical.activate(on, RULES):
        for y in (logical.constrain(x, ("batch", "mlp")), jax.jit(lambda x: logical.constrain(x, ("batch", "mlp")))(x)):
            assert y.sharding.is_equivalent_to(NamedSharding(on, P("data", "model")), 2)
            assert {shard.data.shape for shard in y.addressable_shards} == {(2, 2)}
            np.testing.assert_array_equal(y, x)


def test_jit_traces_again_when_the_layout_changes():
    x, seen = jnp.ones((8, 4)), []

    @jax.jit
    def f(x):
        seen.append(logical.active() is not None)
        return logical.constrain(x, ("batch", None))

    f(x)
    with logical.activate(mesh(4, 2), RULES):
        assert len(f(x).sharding.device_set) == 8
    with logical.activate(mesh(2, 1), RULES):
        assert len(f(x).sharding.device_set) == 2
    assert len(f(x).sharding.device_set) == 1
    assert seen == [False, True, True]


def test_gather_makes_weights_whole_and_returns_gradients_in_pieces():
    on = mesh(4, 2)
    rest = NamedSharding(on, P("data", "model"))
    w = jax.device_put(jnp.arange(48.0).reshape(8, 6) / 48, rest)
    x = jax.device_put(jnp.arange(64.0).reshape(8, 8) / 64, NamedSharding(on, P("data", None)))

    def loss(w, x):
        h = x @ logical.gather(w, ("embed", "mlp"))
        return jnp.sum(h * h)

    with logical.activate(on, RULES):
        step = jax.jit(jax.grad(loss)).lower(w, x).compile()
    gradient = step(w, x)
    assert gradient.sharding.is_equivalent_to(rest, 2)
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    np.testing.assert_allclose(gradient, 2 * x64.T @ (x64 @ w64), rtol=1e-5)
    found = collectives(step, on)
    # The weight comes together along data: the columns of one model shard, all eight rows.
    assert [(one.shape, one.axes) for one in found["all-gather"]] == [((8, 3), ("data",))]


def test_shard_kernel_runs_on_the_local_part():
    on, seen = mesh(4, 2), []
    q, rate = jnp.arange(8 * 3 * 4.0).reshape(8, 3, 4), jnp.arange(4.0)

    def kernel(q, rate, tokens):
        seen.append((q.shape, rate.shape, tokens.index.shape, logical.active()))
        return q * rate, jnp.sum(q, axis=1)

    axes = (("batch", None, "heads"), ("heads",), ("batch", "length"))
    out_axes = (("batch", None, "heads"), ("batch", "heads"))
    with logical.activate(on, RULES):
        run = logical.shard_kernel(kernel, axes, out_axes)
        scaled, summed = jax.jit(run)(q, rate, sequence(3))
        gradient = jax.jit(jax.grad(lambda rate: jnp.sum(run(q, rate, sequence(3))[0])))(rate)
    # Tokens [1, T] hold for all rows: they stay whole, and inside nothing is active.
    assert seen[0] == ((2, 3, 2), (2,), (1, 3), None)
    np.testing.assert_array_equal(scaled, q * rate)
    np.testing.assert_array_equal(summed, q.sum(1))
    np.testing.assert_array_equal(gradient, q.sum((0, 1)))  # Summed over the data axis, which rate does not have.


def test_shard_kernel_keeps_too_few_kv_heads_whole():
    k = jnp.arange(8.0).reshape(4, 2, 1)
    axes = (("batch", "length", "kv_heads"),)
    with logical.activate(mesh(2, 4), RULES):
        out = jax.jit(logical.shard_kernel(lambda k: k + 1, axes, axes[0]))(k)
    np.testing.assert_array_equal(out, k + 1)


def test_shard_kernel_errors():
    with logical.activate(mesh(4, 2), RULES):
        with pytest.raises(ShardingError, match="2 arguments and the axes of 1"):
            logical.shard_kernel(lambda a, b: a, (("batch",),), ("batch",))(jnp.ones(4), jnp.ones(4))
        with pytest.raises(ShardingError, match="kernel argument 0 has size 3, which mesh axis 'data'"):
            logical.shard_kernel(lambda a: a, (("batch",),), ("batch",))(jnp.ones(3))


@pytest.mark.parametrize("model", [1, 2, 4, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (8, 1), (16, 2), (24, 3), (24, 6)])
def test_kv_repeat_gives_each_device_its_own_heads(model, heads, kv_heads):
    with logical.activate(mesh(8 // model, model), RULES):
        repeats = logical.kv_repeat(heads, kv_heads)
    owner = np.repeat(np.arange(kv_heads), repeats)  # The original head behind each repeated one.
    assert len(owner) % model == 0
    per_device, group = len(owner) // model, heads // len(owner)
    for device in range(model):
        held = owner[device * per_device : (device + 1) * per_device]
        for local in range(heads // model):  # What grouped attention does with the local heads.
            query = device * heads // model + local
            assert held[local // group] == query // (heads // kv_heads)
    assert all((kv_heads * r) % model or heads % (kv_heads * r) for r in range(1, repeats))


def test_kv_repeat_needs_query_heads_that_divide():
    with logical.activate(mesh(2, 4), RULES), pytest.raises(ShardingError, match="'heads' of queries has size 6"):
        logical.kv_repeat(6, 2)
