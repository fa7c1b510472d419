"""Reading compiled programs: shapes, loops, FLOPs of matmuls however XLA writes them, traffic, and messages."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxspec.parallel.mesh import make_mesh
from jaxspec.planning import hlo
from jaxspec.planning.cost import Cost, Message, cost_of, message_of
from jaxspec.planning.hlo import ArrayShape, Instruction

pytestmark = pytest.mark.usefixtures("compile_afresh", "compile_fully")

WIDTH, ROWS, TRIPS = 16, 8, 5


def cost(program: hlo.Program) -> Cost:
    return cost_of(program, flops_per_second=lambda _: 1e9, bytes_per_second=1e9)


def compiled(function, *shapes: tuple[int, ...]) -> hlo.Program:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text() or "")


def scan_layers(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def multiply_once_or_twice(flag, x, w):
    return jax.lax.cond(flag[0] > 0, lambda: x @ w @ w, lambda: x @ w)


def double_until_large(x):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < jnp.max(x) * 3, lambda x: x * 2, x)


def scale_by_each(x, w):
    return jax.lax.scan(lambda x, w: (x * w, x), x, w)


def test_a_loops_matmuls_count_by_its_trips():
    program = compiled(scan_layers, (ROWS, WIDTH), (TRIPS, WIDTH, WIDTH))
    assert cost(program).flops == TRIPS * 2 * ROWS * WIDTH * WIDTH


def test_a_conditional_counts_by_its_most_expensive_branch():
    program = compiled(multiply_once_or_twice, (1,), (ROWS, WIDTH), (WIDTH, WIDTH))
    assert cost(program).flops == 2 * 2 * ROWS * WIDTH * WIDTH


def test_a_loop_of_unknown_trips_is_refused():
    with pytest.raises(ValueError, match="its trips are not known before it runs"):
        cost(compiled(double_until_large, (ROWS,)))


@pytest.mark.parametrize(
    ("attributes", "left", "right", "out", "pairs"),
    [
        # A matmul of [512, 4096] and [4096, 8 x 6 x 128], as the TPU compiler writes it: a padded window of 8 x 6.
        (
            "window={size=8x6 pad=7_7x5_5 rhs_reversal=1x1}, dim_labels=bf01_i01o->b01f",
            (512, 4096, 1, 1), (4096, 8, 6, 128), (512, 8, 6, 128), 512 * 4096 * 8 * 6 * 128,
        ),
        # Eight matmuls [2048, 128] x [128, 512]: a batch as a dilated axis.
        (
            "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
            (8, 2048, 128), (8, 128, 512), (8, 2048, 512), 8 * 2048 * 128 * 512,
        ),
        ("window={size=3}, dim_labels=b0f_0io->b0f", (2, 7, 4), (3, 4, 6), (2, 5, 6), 2 * 5 * 3 * 4 * 6),
    ],
)  # fmt: skip
def test_convolutions_count_what_they_multiply(attributes: str, left, right, out, pairs: int):
    x, w = (Instruction(n, "parameter", (ArrayShape("bf16", s, 0),), (), "") for n, s in (("x", left), ("w", right)))
    y = Instruction("y", "convolution", (ArrayShape("bf16", out, 0),), ("x", "w"), attributes)
    assert cost(hlo.Program({"main": (x, w, y)}, "main")).flops == 2 * pairs


@pytest.mark.parametrize("rows", [(), (2,)])
@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize(("name", "matmuls"), [("fwd", 2), ("dq", 3), ("dkv", 4), ("dkv fused", 5)])
def test_an_opaque_splash_kernel_counts_half_the_scores_of_its_matmuls(
    name: str, matmuls: int, parts: int, rows: tuple[int, ...]
):
    """Of per-query keys, as many as there are queries for each part, it counts the blocks on the diagonal."""
    heads, kv_heads, length, channels, block = 8, 4, 64, 16, 32
    queries = (ArrayShape("bf16", (*rows, heads, length, channels), 0),)
    keys = (ArrayShape("bf16", (*rows, kv_heads, (1 + parts) * length, channels), 0),)
    shapes = {"next": (ArrayShape("s8", (1, 4, 9), 0),), "q": queries, "k": keys, "v": keys}
    shapes["mask"] = (ArrayShape("s32", (1, block, block), 0),)
    given = [Instruction(n, "parameter", shape, (), "") for n, shape in shapes.items()]
    result = (ArrayShape("bf16", (2, *shapes["q"][0].dims), 0), *keys, *keys) if "fused" in name else keys
    call = (f"splash_mha_{name.split()[0]}_segmented.7", "custom-call", result, tuple(shapes), '"tpu_custom_call"')
    assert cost(hlo.Program({"main": (*given, Instruction(*call))}, "main")).flops == (
        matmuls * 2 * math.prod(rows) * heads * channels * length * (length / 2 + parts * block)
    )


def test_a_collective_whose_groups_cannot_be_read_is_refused():
    i = Instruction(
        "r", "all-reduce", (ArrayShape("f32", (10,), 0),), ("x",), "replica_groups=<new way>, to_apply=%add"
    )
    with pytest.raises(ValueError, match="written in a way that is not known: replica_groups=<new way>"):
        message_of(i, 4)


def test_a_slice_of_stacked_weights_reads_that_slice_alone():
    """So a scan over layers reads every weight once, and writes an array of results once."""
    size = 4 * 4096
    moved = cost(compiled(scale_by_each, (4096,), (100, 4096))).bytes
    assert 100 * 4 * size <= moved <= 1.01 * 100 * 8 * size


RESHAPED = """HloModule drawn_by_hand
%view (w: f32[4096]) -> f32[64,64] {
  %w = f32[4096]{0} parameter(0)
  ROOT %b = f32[64,64]{1,0} bitcast(%w)
}
%multiply (x: f32[8,64], v: f32[4096]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %v = f32[4096]{0} parameter(1)
  %again = f32[64,64]{1,0} fusion(%v), kind=kLoop, calls=%view
  ROOT %d = f32[8,64]{1,0} dot(%x, %again), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
ENTRY %main (a: f32[8,64], c: f32[4096]) -> f32[8,64] {
  %a = f32[8,64]{1,0} parameter(0)
  %c = f32[4096]{0} parameter(1)
  ROOT %f = f32[8,64]{1,0} fusion(%a, %c), kind=kOutput, calls=%multiply
}
"""


def test_a_weight_that_a_fusion_takes_by_another_shape_is_read_whole():
    assert cost(hlo.parse(RESHAPED)).bytes == 4 * (4096 + 2 * 8 * 64)


def test_an_instruction_takes_at_least_its_own_seconds():
    program = hlo.parse(RESHAPED)
    found = cost_of(program, flops_per_second=lambda _: 1e9, bytes_per_second=1e9, busy_seconds=lambda _: 1.0)
    assert (found.computing, found.moving, found.behind) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups={}", (0, 1, 2, 3)),
        ("replica_groups=[2,2]<=[4]", (0, 1)),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([4]) {'a','b'}", (0, 2)),
    ],
)
def test_groups_are_read_however_they_are_written(groups: str, found: tuple[int, ...]):
    i = Instruction("r", "all-reduce", (ArrayShape("f32", (10,), 0),), ("x",), f"channel_id=1, {groups}, to_apply=%add")
    share = (len(found) - 1) / len(found)
    assert message_of(i, 4) == Message("all-reduce", found, round(2 * 40 * share), i.result[0])


def test_a_gather_sends_all_but_its_own_part_and_a_scatter_too():
    whole, part = ArrayShape("bf16", (8, 100), 0), ArrayShape("bf16", (2, 100), 0)
    gather = Instruction("g", "all-gather-start", (part, whole), ("x",), "replica_groups=[1,4]<=[4], dimensions={0}")
    scatter = Instruction("s", "reduce-scatter", (part,), ("x",), "replica_groups=[1,4]<=[4], dimensions={0}")
    for i in (gather, scatter):
        message = message_of(i, 4)
        assert message is not None and message.bytes == 1600 * 3 / 4
    alone = Instruction("r", "all-reduce", (part,), ("x",), "replica_groups=[4,1]<=[4]")
    assert message_of(alone, 4) is None


def gathered_layer(mesh, x, w):
    w = jax.lax.with_sharding_constraint(w, jax.NamedSharding(mesh, P()))
    return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), jax.NamedSharding(mesh, P("fsdp"))), None


def test_messages_of_a_compiled_loop_count_by_its_trips():
    mesh = make_mesh(1, 4, 2)
    rows = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=jax.NamedSharding(mesh, P("fsdp")))
    weights = jax.ShapeDtypeStruct(
        (TRIPS, WIDTH, WIDTH), jnp.float32, sharding=jax.NamedSharding(mesh, P(None, "fsdp"))
    )
    layer = functools.partial(gathered_layer, mesh)
    loop = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0])
    found = cost(hlo.parse(loop.lower(rows, weights).compile().as_text() or ""))
    gathered = Counter({m.group: m.bytes * n for m, n in found.sent.items() if m.kind == "all-gather"})
    assert gathered == {(0, 2, 4, 6): TRIPS * 4 * WIDTH * WIDTH * 3 / 4}
    assert found.flops == TRIPS * 2 * (ROWS / 4) * WIDTH * WIDTH
