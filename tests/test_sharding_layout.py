"""Presets, meshes and the placement of states and batches."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sharding
from configs import base
from sharding import ShardingError, presets
from sharding.layout import Layout, name_of


def settings(preset: str, **fields) -> ml_collections.ConfigDict:
    config = base.sharding()
    config.preset = preset
    config.update(fields)
    return config


def layout(preset: str, count: int = 8, **fields) -> Layout:
    return sharding.build(settings(preset, **fields), jax.devices()[:count])


class Small(nnx.Module):
    def __init__(self) -> None:
        self.up = nnx.Param(jnp.ones((3, 16, 24)), axes=("layers", "embed", "mlp"))
        self.value = nnx.Param(jnp.ones((16, 8)), axes=("embed", ("kv_heads", 2)))
        self.table = nnx.Param(jnp.ones((32, 16)), axes=("vocab", "embed"))
        self.gain = nnx.Param(jnp.ones((16,)), axes=("norm",))
        self.plain = nnx.Param(jnp.ones((7,)))


STATE = nnx.eval_shape(lambda: nnx.state(Small()))


@pytest.mark.parametrize(
    ("preset", "count", "fields", "expected"),
    [
        ("single", 8, {}, (1, 1)),
        ("fsdp", 8, {}, (8, 1)),
        ("tp", 8, {}, (1, 8)),
        ("tp", 8, {"data": 2}, (2, 4)),
        ("tp", 8, {"model": 2}, (4, 2)),
        ("fsdp_tp", 8, {}, (4, 2)),
        ("fsdp_tp", 8, {"model": 4}, (2, 4)),
        ("fsdp_tp", 1, {}, (1, 1)),
        ("fsdp", 2, {}, (2, 1)),
    ],
)
def test_mesh_sizes(preset, count, fields, expected):
    assert tuple(presets.sizes(settings(preset, **fields), count).values()) == expected
    assert layout(preset, count, **fields).mesh.devices.shape == expected


@pytest.mark.parametrize(
    ("preset", "fields", "says"),
    [
        ("fspd", {}, "unknown sharding preset 'fspd': did you mean fsdp"),
        ("tp", {"data": 3}, "data=3 x model=2, 6 devices, but there are 8"),
        ("fsdp", {"data": 4}, "data=4 x model=1, 4 devices, but there are 8"),
        ("single", {"data": 8}, "config.sharding.data is 8: use another preset"),
        ("fsdp", {"model": -1}, "config.sharding.model is -1"),
        ("fsdp", {"rules": (("embd", "data"),)}, "unknown logical axis 'embd': did you mean embed"),
        ("fsdp", {"rules": (("embed", "dat"),)}, "unknown mesh axis 'dat': did you mean data"),
        ("fsdp", {"rules": ("embed",)}, "each entry is (logical axis, mesh axis or None)"),
    ],
)
def test_errors_come_in_one_line(preset, fields, says):
    with pytest.raises(ShardingError, match=re.escape(says)) as caught:
        layout(preset, **fields)
    assert "\n" not in str(caught.value)


def test_exceptions_keep_the_kind_of_their_row():
    table = presets.rules(settings("fsdp_tp", rules=(("embed", "model"), ("vocab", None), ("mlp", "data"))))
    assert table["embed"].mesh_axes == ("model",) and table["embed"].stored
    assert table["vocab"].mesh_axes == ()
    assert table["mlp"].mesh_axes == ("data",) and not table["mlp"].stored
    assert presets.PRESETS["fsdp_tp"].rules["vocab"].mesh_axes == ("model",)  # The preset itself is untouched.


EXPECTED = {
    "single": {"up": P(None, None, None), "value": P(None, None), "table": P(None, None)},
    "fsdp": {"up": P(None, "data", None), "value": P("data", None), "table": P(None, "data")},
    "tp": {"up": P(None, None, "model"), "value": P(None, None), "table": P("model", None)},
    "fsdp_tp": {"up": P(None, "data", "model"), "value": P("data", "model"), "table": P("model", "data")},
    "tpla": {"up": P(None, None, ("latent", "head")), "value": P(None, "latent"), "table": P(("latent", "head"), None)},
}


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_parameters_follow_the_table(preset):
    on = layout(preset)
    found = nnx.to_pure_dict(on.param_shardings(STATE))
    for name in ("up", "value", "table"):
        assert found[name].spec == EXPECTED[preset][name], name
    assert found["gain"].spec == P(None) and found["plain"].spec == P()
    placed = jax.device_put(nnx.state(Small()), on.param_shardings(STATE))
    for row, array in zip(on.placements(STATE), jax.tree.leaves(placed), strict=True):
        shards = array.addressable_shards
        assert {shard.data.nbytes for shard in shards} == {row.bytes_per_device}, row.name
        assert len(shards) == on.mesh.size
    held = sum(shard.data.nbytes for array in jax.tree.leaves(placed) for shard in array.addressable_shards)
    assert on.bytes_per_device(STATE) * on.mesh.size == held


@pytest.mark.parametrize("pure", [False, True])
def test_optimiser_states_follow_their_parameters(pure):
    on = layout("fsdp_tp")
    params = {name_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(STATE)} if pure else STATE
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    tree = {"opt": jax.eval_shape(optimizer.init, params), "params": params, "rng": jax.random.key(0)}
    own = {row.name: row for row in on.placements(STATE)}
    seen = 0
    places = jax.tree_util.tree_leaves(on.like(tree, STATE), is_leaf=lambda x: isinstance(x, NamedSharding))
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(tree), places, strict=True):
        name = name_of(path).rsplit(".", 1)[-1]
        assert place.spec == (own[name].sharding.spec if name in own and leaf.ndim else P()), name_of(path)
        seen += name in own
    assert seen == 3 * len(own)  # Parameters and both moments.


def test_a_parameter_that_does_not_divide_is_named():
    class Odd(nnx.Module):
        def __init__(self) -> None:
            self.up = nnx.Param(jnp.ones((16, 30)), axes=("embed", "mlp"))

    with pytest.raises(ShardingError, match=r"'mlp' of parameter up has size 30.*'model' of size 8.*mlp.width"):
        layout("tp").param_shardings(nnx.eval_shape(lambda: nnx.state(Odd())))


def test_batches_are_split_by_rows():
    batch = {"inputs": np.arange(64, dtype=np.int32).reshape(16, 4), "weight": np.ones(16, np.float32)}
    on = layout("fsdp_tp")
    assert on.reader() == (0, 1)
    placed = on.put(batch)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding.is_equivalent_to(on.batch_sharding(), array.ndim)
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {4}
    with pytest.raises(ShardingError, match="'batch' of the global batch has size 6.*config.data.batch_size"):
        on.put({"inputs": np.ones((6, 4))})


def test_processes_on_one_model_axis_read_the_same_rows(monkeypatch):
    def pretend(blocks, process):
        """A layout whose processes hold these blocks of the batch."""
        on = layout("fsdp")
        monkeypatch.setattr(Layout, "_rows_by_process", lambda self: blocks)
        monkeypatch.setattr(jax, "process_index", lambda: process)
        return on

    assert pretend({0: (0, 1), 1: (2, 3)}, 1).reader() == (1, 2)
    assert pretend({0: (0,), 1: (0,), 2: (1,), 3: (1,)}, 2).reader() == (1, 2)
    assert pretend({0: (0, 2), 1: (1, 3)}, 0).reader() == (0, 2)  # Not neighbours: still a share each.
    with pytest.raises(ShardingError, match="overlapping or unequal"):
        pretend({0: (0, 1), 1: (1, 2)}, 0).reader()


def test_description():
    text = layout("fsdp_tp").describe(STATE)
    assert "mesh data=4 x model=2 on cpu" in text
    assert "embed -> data (stored in pieces, whole in use)" in text
    up = next(line for line in text.splitlines() if line.strip().startswith("up "))
    assert "(3, 16, 24)" in up and "[-, data, model]" in up and "576 bytes" in up
    # 3*16*24/8 + 16*8/8 + 32*16/8 + 16 + 7 numbers of 4 bytes.
    assert "988 of 7,260 bytes on each device" in text
    assert "bytes" not in layout("single").describe()


def test_the_documented_tables_are_the_tables():
    assert presets.markdown() in Path("docs/sharding.md").read_text()
