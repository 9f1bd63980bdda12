"""The contract suite under tensor parallelism: cases on 2, 4 and 8 devices are the cases on one, and communicate as
they declare."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sharding
from configs import base
from tests.contract.cases import WIDTH, Case, cases, inputs, one_of_each, two_documents

# Optimising tiny programs costs far more than running them.
QUICK = {"xla_backend_optimization_level": 0}
ROWS, LENGTH = 2, 13


def eight_heads(case: Case) -> Case:
    """The case with heads for eight devices; where key/value heads are shared, each still serves several."""
    kv_heads = {} if "kv_heads" not in case.options() else {"kv_heads": 2 * case.options()["kv_heads"]}
    kv_heads = {} if case.options().get("kv_heads") == 1 else kv_heads
    return Case(case.name, case.preset, case.changes + (("heads", 8), *kv_heads.items()))


CASES = pytest.mark.parametrize("case", [eight_heads(case) for case in cases()], ids=lambda case: case.name)
# A case of each layer on 2, 4 and 8 devices, the others on 8.
SPREAD = [(eight_heads(case), parts) for case in one_of_each() for parts in (2, 4)]
SPREAD += [(eight_heads(case), 8) for case in cases()]


def on_devices(parts: int) -> sharding.Layout:
    config = base.sharding()
    config.preset = "tp" if parts > 1 else "single"
    return sharding.build(config, jax.devices()[:parts])


def compiled(case: Case, parts: int, gradient: bool):
    """(program, its arguments placed): outputs, or gradients of x and of every parameter."""
    layer, layout = case.layer(), on_devices(parts)
    definition, state = nnx.split(layer)
    tokens = two_documents(6, 5, 2).map(lambda column: jnp.repeat(column, ROWS, axis=0))

    def outputs(state, x, tokens):
        with layout.activate():
            return nnx.merge(definition, state)(x, tokens).out

    def gradients(state, x, tokens):
        return jax.grad(lambda state, x: jnp.sum(jnp.sin(outputs(state, x, tokens))), (0, 1), allow_int=True)(state, x)

    places = (layout.param_shardings(state), layout.replicated(), layout.replicated())
    arguments = jax.device_put((state, inputs(LENGTH, ROWS), tokens), places)
    program = jax.jit(gradients if gradient else outputs, in_shardings=places)
    return program.lower(*arguments).compile(compiler_options=QUICK), arguments, layout


@functools.cache
def result(case: Case, parts: int, gradient: bool) -> list[np.ndarray]:
    program, arguments, _ = compiled(case, parts, gradient)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(program(*arguments)) if leaf.dtype == jnp.float32]


@pytest.mark.parametrize(("case", "parts"), SPREAD, ids=lambda each: getattr(each, "name", str(each)))
def test_outputs_and_communication(case: Case, parts: int):
    (alone,) = result(case, 1, False)
    program, arguments, layout = compiled(case, parts, False)
    np.testing.assert_allclose(program(*arguments), alone, rtol=0, atol=2e-5 * np.abs(alone).max())
    found = collections.Counter()
    for name, entries in sharding.collectives(program, layout.mesh).items():
        for one in entries:
            assert one.exact
            found[name, one.axes, math.prod(one.shape) / (ROWS * LENGTH)] += one.times
    declared = case.layer().all_reduces()
    assert declared[WIDTH] >= 1
    assert found == {("all-reduce", ("model",), numbers): times for numbers, times in declared.items()}


@CASES
def test_gradients_on_four_devices(case: Case):
    alone, together = result(case, 1, True), result(case, 4, True)
    assert len(alone) == len(together) > 3
    for one, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(many, one, rtol=0, atol=5e-5 * max(np.abs(one).max(), 1e-6))
