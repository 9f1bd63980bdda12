"""Attentions train under every sharding preset as on one device, and send what the preset says they send.

Tolerance: losses of five steps agree to 1e-5 relative in float32. Sums over devices round in another order; measured
differences are below 1e-6 of the loss.
"""

import collections
import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import sharding
from configs import attention, base
from sharding import collectives
from sharding.layout import name_of
from training import setup

ATTENTION = ("gqa", "mqa", "mla", "lightning")
SHARDED = ("fsdp", "tp", "fsdp_tp")
WIDTH, DEPTH, LENGTH, ROWS, TOKENS = 64, 3, 16, 8, 64
TOKENIZER = SimpleNamespace(vocab_size=TOKENS)
# Code generation is most of the time here, and not what this is about.
QUICK = {"xla_backend_optimization_level": 0}

# All-reduces along the model axis, by how many numbers per token. Once a step: the embedding's rows and the gradient of
# the logits (WIDTH each), and three single numbers for the loss.
ONCE = {WIDTH: 2, 1: 3}
# For each layer: forward, one of WIDTH after each of the two output matrices; backward, one of WIDTH for each matrix
# into split heads or hidden units (gate and up among them), because this compiler adds after summing over devices.
PER_LAYER = {
    "gqa": {WIDTH: 2 + 2 + 1},
    "mqa": {WIDTH: 2 + 2 + 1},
    "mla": {WIDTH: 2 + 2 + 1, 16: 2, 4: 1},  # Back into the latent through W_UK and W_UV, and into the rotated key.
    "lightning": {WIDTH: 2 + 2 + 4, 1: 2},  # The mean square of the output norm spans heads, as does its gradient.
}
KV_HEADS = {"gqa": 2, "mqa": 1}
HEAD_DIM = 8


def settings(variant: str, preset: str, **fields):
    """A small config; `fields` are those of the optimizer."""
    config = base.get_config()
    model = config.model
    model.width, model.depth, model.max_length, model.mlp.width = WIDTH, DEPTH, LENGTH, 96
    model.attention = options = attention.get(variant)
    small = {
        "head_dim": HEAD_DIM,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    }  # fmt: skip
    options.update({name: value for name, value in small.items() if options.get(name)})
    config.sharding.preset = preset
    # Plain gradient descent: the steps of Adam would blow up the rounding of gradients near zero.
    config.optimizer.update(dict(name="sgd", momentum=0.0, learning_rate=0.5, schedule="constant", warmup_steps=0))
    config.optimizer.update(fields)
    return config


def batch(rows: int = ROWS) -> dict[str, np.ndarray]:
    """Packed documents of different lengths, with padding at the end of the last row."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, TOKENS, (rows, LENGTH + 1)).astype(np.int32)
    segment = np.sort(rng.integers(1, 4, (rows, LENGTH)), axis=1).astype(np.int32)
    segment[-1, -5:] = 0
    first = np.concatenate([np.ones((rows, 1), bool), segment[:, 1:] != segment[:, :-1]], axis=1)
    start = np.maximum.accumulate(np.where(first, np.arange(LENGTH), 0), axis=1)
    return {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment": segment,
        "position": (np.arange(LENGTH) - start).astype(np.int32),
        "weight": (segment > 0).astype(np.float32),
    }


@dataclasses.dataclass
class Trained:
    """Five steps on one batch."""

    losses: np.ndarray
    program: jax.stages.Compiled
    training: setup.Training
    state: object


@functools.cache
def drawn(variant: str, optimizer: str) -> object:
    """The initial state, drawn once per variant."""
    config = settings(variant, "single", name=optimizer)
    training = setup.build(config, setup.network(config, TOKENIZER), sharding.build(config.sharding), TOKENIZER)
    key = jax.random.key(0)
    return training.init.lower(key).compile(compiler_options=QUICK)(key)


@functools.cache
def trained(variant: str, preset: str, optimizer: str = "sgd", devices: int = 8) -> Trained:
    config = settings(variant, preset, name=optimizer)
    layout = sharding.build(config.sharding, jax.devices()[:devices])
    training = setup.build(config, setup.network(config, TOKENIZER), layout, TOKENIZER)
    placed = layout.put(batch())
    lowered = training.step.lower(training.abstract, placed)
    program = lowered.compile(compiler_options=QUICK)
    fresh = jax.tree.map(lambda x: x.copy(), drawn(variant, optimizer))  # The step takes over what it is given.
    state = jax.device_put(fresh, jax.tree.map(lambda x: x.sharding, training.abstract))
    losses = []
    for _ in range(5):
        state, report = program(state, placed)
        losses.append(float(report.metrics["loss"]))
    return Trained(np.array(losses), program, training, state)


@pytest.mark.parametrize("preset", SHARDED)
@pytest.mark.parametrize("variant", ATTENTION)
def test_losses_are_those_of_one_device(variant, preset):
    alone, together = trained(variant, "single"), trained(variant, preset)
    assert alone.losses[0] - alone.losses[-1] > 0.05  # The steps really move the weights.
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-5)


@pytest.mark.parametrize(("variant", "devices"), [("mla", 8), ("gla", 4), ("tpla", 2), ("tpla", 8)])
def test_latents_train_on_their_mesh(variant, devices):
    alone, together = trained(variant, "single"), trained(variant, "tpla", devices=devices)
    assert alone.losses[0] - alone.losses[-1] > 0.05
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-5)
    # A cut latent is not put together again. Where 2 latents serve 4 devices, each is copied to those of its heads.
    names = {name for name, _, _ in counted(together)}
    assert names <= ({"all-reduce"} if variant == "tpla" else {"all-reduce", "all-gather", "collective-permute"})


@pytest.mark.parametrize("preset", SHARDED)
@pytest.mark.parametrize("variant", ATTENTION)
def test_collectives_are_those_of_the_preset(variant, preset):
    run = trained(variant, preset)
    found = counted(run)
    expected = collections.Counter()
    if "fsdp" in preset:
        expected += fully_sharded(run)
    if "tp" in preset:
        expected += tensor_parallel(variant, run)
    for key in set(found) | set(expected):
        assert found[key] == expected[key], f"{key}: {found[key]} in the program, {expected[key]} expected"


def counted(run: Trained) -> collections.Counter:
    """(name, mesh axes, numbers) -> how many collectives; those of a single number (a norm, the loss) are left out."""
    result = collections.Counter()
    for name, entries in collectives(run.program, run.training.layout.mesh).items():
        for one in entries:
            assert one.exact
            if math.prod(one.shape) > 1:
                result[name, one.axes, math.prod(one.shape)] += one.times
    return result


def fully_sharded(run: Trained) -> collections.Counter:
    """Along data: each stored weight gathered, forward and again backward; each gradient summed once.

    The tied table serves twice in the forward pass, and the backward pass has what the forward pass gathered. What is
    used twice (the table; the phases that turn both queries and keys) has two gradients.
    """
    layout, result = run.training.layout, collections.Counter()
    with layout.activate() as active:
        for name, axes in run.training.structure.axes.items():
            shape = run.training.structure.abstract()[0][name].shape
            repeats = shape[0] if axes[0] == "layers" else 1
            axes, shape = (axes[1:], shape[1:]) if axes[0] == "layers" else (axes, shape)
            in_use = jax.sharding.NamedSharding(layout.mesh, active.spec(axes, shape))
            whole = math.prod(in_use.shard_shape(shape))
            if active.spec(axes, shape) != active.spec(axes, shape, at_rest=True):
                result["all-gather", ("data",), whole] += 2 * repeats
            result["all-reduce", ("data",), whole] += repeats * (2 if axes[0] == "vocab" or "theta" in name else 1)
    return result


def tensor_parallel(variant: str, run: Trained) -> collections.Counter:
    """Along model: `ONCE`, `PER_LAYER` for each layer, and what becomes of keys and values; in rows of one device.

    Mesh axes None are groups of devices within an axis.
    """
    tokens = ROWS // run.training.layout.mesh.shape["data"] * LENGTH
    result = collections.Counter()
    for times, table in ((1, ONCE), (DEPTH, PER_LAYER[variant])):
        for numbers, count in table.items():
            result["all-reduce", ("model",), tokens * numbers] += times * count
    heads, parts = KV_HEADS.get(variant), run.training.layout.mesh.shape["model"]
    if heads and heads % parts == 0:  # Keys and values are split as queries are.
        result["all-reduce", ("model",), tokens * WIDTH] += DEPTH * 2
    elif heads:  # Every device computes them whole; gradients come from the devices that share a head, and are joined.
        sharing = ("model",) if heads == 1 else None
        result["all-reduce", sharing, tokens * HEAD_DIM] += DEPTH * 2
        if heads > 1:
            result["all-gather", None, tokens * heads * HEAD_DIM] += DEPTH * 2
    return result


def test_adam_moments_and_averages_live_with_their_parameters():
    run = trained("gqa", "fsdp_tp", "adamw")
    layout, structure = run.training.layout, run.training.structure
    own = {row.name: row for row in layout.placements(structure.abstract_params)}
    copies = collections.Counter()
    for path, array in jax.tree_util.tree_leaves_with_path(run.state):
        name = next((name for name in own if f".{name_of(path)}".endswith(f".{name}")), None)
        if name is not None:
            shards = array.addressable_shards
            assert {shard.data.nbytes for shard in shards} == {own[name].bytes_per_device}, name_of(path)
            copies[name] += 1
    assert set(copies.values()) == {3} and set(copies) == set(own)  # Parameters and two moments.
    split = [row for row in own.values() if row.bytes_per_device < row.bytes]
    assert sum(row.bytes for row in split) > 0.99 * sum(row.bytes for row in own.values())
    assert all(row.bytes_per_device * 8 == row.bytes for row in split)
