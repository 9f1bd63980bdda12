"""Counting collectives: programs whose collectives are known by construction, and the text of other compilers."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.collectives import collectives, summary

MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
RING = [(i, (i + 1) % 4) for i in range(4)]


SPEC = P("data", "model")


def programs(body, *shape, dtype=jnp.float32):
    """The compiled and the lowered form of `body` run by shard_map on an array of that global shape."""
    mapped = jax.shard_map(body, mesh=MESH, in_specs=SPEC, out_specs=SPEC, check_vma=False)
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, SPEC))
    lowered = jax.jit(mapped).lower(x)
    return {"compiled": lowered.compile(), "lowered": lowered}


def listed(program):
    found = collectives(program, MESH)
    return {(c.name, c.shape, c.bytes, c.times, c.axes) for entries in found.values() for c in entries}


@pytest.mark.parametrize("form", ["compiled", "lowered"])
@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        # One device holds [8, 4] of float32, 128 bytes.
        (lambda x: jax.lax.psum(x, "model"), ("all-reduce", (8, 4), 128, 1, ("model",))),
        (lambda x: jax.lax.pmax(x, "data"), ("all-reduce", (8, 4), 128, 1, ("data",))),
        (lambda x: jax.lax.psum(x, ("data", "model")), ("all-reduce", (8, 4), 128, 1, ("data", "model"))),
        (lambda x: jax.lax.all_gather(x, "data", tiled=True), ("all-gather", (32, 4), 512, 1, ("data",))),
        (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), ("reduce-scatter", (2, 4), 32, 1, ("data",))),
        (lambda x: jax.lax.ppermute(x, "data", RING), ("collective-permute", (8, 4), 128, 1, ("data",))),
        (lambda x: jax.lax.pmin(x, ("data", "model")), ("all-reduce", (8, 4), 128, 1, ("data", "model"))),
    ],
)
def test_each_collective(operation, expected, form):
    assert listed(programs(operation, 32, 8)[form]) == {expected}


@pytest.mark.parametrize("form", ["compiled", "lowered"])
def test_all_to_all_is_one_array(form):
    program = programs(lambda x: jax.lax.all_to_all(x, "data", 0, 1, tiled=True), 32, 8)[form]
    (one,) = collectives(program, MESH)["all-to-all"]
    assert (one.bytes, one.axes, one.sent) == (128, ("data",), 96)


@pytest.mark.parametrize("form", ["compiled", "lowered"])
def test_loops_multiply(form):
    def inner(x, _):
        return jax.lax.ppermute(x, "data", RING), None

    def outer(x, _):
        x = x + jax.lax.psum(x, "model")
        return jax.lax.scan(inner, x, None, length=3)[0], None

    program = programs(lambda x: jax.lax.scan(outer, x, None, length=5)[0], 32, 8)[form]
    assert summary(collectives(program, MESH)) == {
        ("all-reduce", ("model",)): (5, 5 * 128),
        ("collective-permute", ("data",)): (15, 15 * 128),
    }


@pytest.mark.parametrize("form", ["compiled", "lowered"])
def test_a_loop_of_unknown_length_is_marked(form):
    def body(x):
        return jax.lax.while_loop(lambda y: jnp.all(y < 9), lambda y: jax.lax.psum(y, "data"), x)

    (one,) = collectives(programs(body, 32, 8)[form], MESH)["all-reduce"]
    assert (one.times, one.exact) == (1, False)


@pytest.mark.parametrize("form", ["compiled", "lowered"])
def test_a_loop_with_a_step(form):
    def body(x):
        return jax.lax.while_loop(lambda s: s[0] < 10, lambda s: (s[0] + 3, jax.lax.psum(s[1], "data")), (1, x))[1]

    (one,) = collectives(programs(body, 32, 8)[form], MESH)["all-reduce"]
    assert (one.times, one.exact) == (3, True)


@pytest.mark.parametrize("form", ["compiled", "lowered"])
def test_both_branches_count(form):
    def body(x):
        return jax.lax.cond(x[0, 0] > 0, lambda y: jax.lax.pmax(y, "data"), lambda y: jax.lax.psum(y, "model"), x)

    assert {(c[0], c[4]) for c in listed(programs(body, 32, 8)[form])} == {
        ("all-reduce", ("data",)),
        ("all-reduce", ("model",)),
    }


def test_merged_operations_are_counted_one_by_one():
    def body(x):
        return jax.lax.psum(x, "data") + jnp.sum(jax.lax.psum(x[:2] * 2, "data"))

    compiled = programs(body, 32, 8)["compiled"]
    text = compiled.as_text()
    assert sum(" all-reduce(" in line for line in text.splitlines()) == 1  # XLA put both in one.
    assert sorted(c.shape for c in collectives(text)["all-reduce"]) == [(2, 4), (8, 4)]


def test_lowered_programs_keep_the_types_that_were_written():
    forms = programs(functools.partial(jax.lax.psum, axis_name="data"), 32, 8, dtype=jnp.bfloat16)
    assert [(c.dtype, c.bytes) for c in collectives(forms["lowered"])["all-reduce"]] == [("bf16", 64)]
    # The trap this is for: the CPU compiler widens bf16 sums.
    assert [(c.dtype, c.bytes) for c in collectives(forms["compiled"])["all-reduce"]] == [("f32", 128)]


def test_what_the_partitioner_puts_in_is_seen():
    rows, columns = NamedSharding(MESH, P(None, "model")), NamedSharding(MESH, P("model", None))
    a = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=rows)
    b = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=columns)
    matmul = jax.jit(jnp.matmul, out_shardings=NamedSharding(MESH, P())).lower(a, b)
    assert listed(matmul.compile()) == {("all-reduce", (16, 4), 256, 1, ("model",))}
    assert collectives(matmul) == {}


def test_a_program_without_collectives():
    assert collectives(jax.jit(jnp.sin).lower(1.0).compile()) == {}


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no compiled program"):
        collectives("all-reduce(x)")


FUSED = [("all-reduce", (8, 128), 2048, ("model",))]


def hlo(line: str) -> str:
    return f"""HloModule m, entry_computation_layout={{()->f32[]}}, num_partitions=8

%fused (p: bf16[8,128]) -> bf16[8,128] {{
  %p = bf16[8,128]{{1,0}} parameter(0)
  ROOT %r = bf16[8,128]{{1,0:T(8,128)(2,1)}} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add
}}

ENTRY %main.1 (x: bf16[8,128]) -> f32[] {{
  %x = bf16[8,128]{{1,0}} parameter(0)
  {line}
}}
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # Forms of the GPU and TPU compilers: asynchronous pairs, tiled layouts, fusions, groups as a sequence.
        (
            "%g = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[4,2]T(1,0)",
            [("all-gather", (8, 8), 256, ("data",))],
        ),
        ("%d = f32[8,8]{1,0} all-gather-done(%g)", []),
        (
            "%p = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
            [("collective-permute", (4,), 16, ("model",))],
        ),
        ("%f = bf16[8,128]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%fused", FUSED),
        ("%a = ((bf16[8,128]), bf16[8,128]) async-start(%x), calls=%fused", FUSED),
        ("%b = bf16[8,128] async-done(%a), calls=%fused", []),
        (
            "%r = s4[6]{0} reduce-scatter(%x), replica_groups={}, to_apply=%add",
            [("reduce-scatter", (6,), 3, ("data", "model"))],
        ),
        (
            "%r = pred[6]{0} all-reduce(%x), replica_groups=mesh['data'=4,'model'=2] {'model'}",
            [("all-reduce", (6,), 6, ("model",))],
        ),
        (
            "%r = f32[6]{0} all-reduce(%x), replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}",
            [("all-reduce", (6,), 24, ("model",))],
        ),
        (
            "%r = f32[6]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
            [("all-reduce", (6,), 24, ("data",))],
        ),
        (
            "%r = f32[6]{0} all-reduce(%x), replica_groups=mesh['a'=1,'b'=8] {'b':(4)2}",
            [("all-reduce", (6,), 24, ("model",))],
        ),
        (
            "%r = f32[6]{0} all-reduce(%x), replica_groups=mesh['b'=8] {'b':(1)4}",
            [("all-reduce", (6,), 24, ("data",))],
        ),
        ("%r = f8e4m3fn[6]{0} all-reduce(%x), replica_groups={{0,3},{1,2}}", [("all-reduce", (6,), 6, None)]),
        ('%r = f32[] add(%x, %x), metadata={op_name="all-reduce("}', []),
    ],
)
def test_text_of_other_compilers(line, expected):
    found = collectives(hlo(line), MESH)
    assert [(c.name, c.shape, c.bytes, c.axes) for entries in found.values() for c in entries] == expected


@pytest.mark.parametrize(
    "groups", ["@somewhere", "mesh['a'=8] {'a':(1)2,'a':(4)2}", "mesh['a'=8], device_ids=(7,6,5) {'a'}"]
)
def test_groups_in_an_unknown_form_are_refused(groups):
    with pytest.raises(ValueError, match="cannot read the groups"):
        collectives(hlo(f"%r = f32[6] all-reduce(%x), replica_groups={groups}, to_apply=%add"))


@pytest.mark.parametrize(
    ("operation", "sent"),
    [
        # A ring of four devices, 128 bytes each: sums go round twice, three quarters at a time.
        (lambda x: jax.lax.psum(x, "data"), 192),
        (lambda x: jax.lax.all_gather(x, "data", tiled=True), 384),
        (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), 96),
        (lambda x: jax.lax.ppermute(x, "data", RING), 128),
    ],
)
def test_bytes_on_the_wire(operation, sent):
    ((one,),) = collectives(programs(operation, 32, 8)["compiled"], MESH).values()
    assert one.sent == sent
