"""Reading compiled programs: shapes, loops, FLOPs of matmuls however XLA writes them, traffic, and messages."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxspec.parallel.mesh import make_mesh
from jaxspec.planning import hlo
from jaxspec.planning.hlo import Cost, Instruction, Message, Shape

pytestmark = pytest.mark.usefixtures("compile_fully")

WIDTH, ROWS, TRIPS = 16, 8, 5


def cost(program: hlo.Program) -> Cost:
    return hlo.cost_of(program, flops_per_second=lambda _: 1e9, bytes_per_second=1e9)


def compiled(function, *shapes: tuple[int, ...]) -> hlo.Program:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text() or "")


def test_a_loops_matmuls_count_by_its_trips():
    def loop(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    program = compiled(loop, (ROWS, WIDTH), (TRIPS, WIDTH, WIDTH))
    assert cost(program).flops == TRIPS * 2 * ROWS * WIDTH * WIDTH


def test_a_conditional_counts_by_its_dearest_branch():
    def either(flag, x, w):
        return jax.lax.cond(flag[0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert cost(compiled(either, (1,), (ROWS, WIDTH), (WIDTH, WIDTH))).flops == 2 * 2 * ROWS * WIDTH * WIDTH


def test_a_loop_of_unknown_trips_is_refused():
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < jnp.max(x) * 3, lambda x: x * 2, x)

    with pytest.raises(ValueError, match="its trips are not known before it runs"):
        cost(compiled(until, (ROWS,)))


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
    def line(name: str, opcode: str, dims: tuple[int, ...], *operands: str, more: str = "") -> Instruction:
        return Instruction(name, opcode, (Shape("bf16", dims, 0),), operands, more)

    whole = (line("a", "parameter", left), line("b", "parameter", right))
    program = hlo.Program({"main": (*whole, line("c", "convolution", out, "a", "b", more=attributes))}, "main")
    assert cost(program).flops == 2 * pairs


@pytest.mark.parametrize("rows", [(), (2,)])
@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize(("name", "matmuls"), [("fwd", 2), ("dq", 3), ("dkv", 4), ("dkv fused", 5)])
def test_an_opaque_splash_kernel_counts_half_the_scores_of_its_matmuls(
    name: str, matmuls: int, parts: int, rows: tuple[int, ...]
):
    """And of keys of the queries' own, as many as there are queries for each part, the blocks on the diagonal."""
    heads, kv_heads, length, channels, block = 8, 4, 64, 16, 32

    def of(heads: int, length: int) -> tuple[Shape]:
        return (Shape("bf16", (*rows, heads, length, channels), 0),)

    keys = of(kv_heads, (1 + parts) * length)
    shapes = {"next": (Shape("s8", (1, 4, 9), 0),), "q": of(heads, length), "k": keys, "v": keys}
    shapes["mask"] = (Shape("s32", (1, block, block), 0),)
    given = [Instruction(n, "parameter", shape, (), "") for n, shape in shapes.items()]
    result = (Shape("bf16", (2, *shapes["q"][0].dims), 0), *keys, *keys) if "fused" in name else keys
    call = (f"splash_mha_{name.split()[0]}_segmented.7", "custom-call", result, tuple(shapes), '"tpu_custom_call"')
    assert cost(hlo.Program({"main": (*given, Instruction(*call))}, "main")).flops == (
        matmuls * 2 * math.prod(rows) * heads * channels * length * (length / 2 + parts * block)
    )


def test_a_collective_whose_groups_cannot_be_read_is_refused():
    i = Instruction("r", "all-reduce", (Shape("f32", (10,), 0),), ("x",), "replica_groups=<new way>, to_apply=%add")
    with pytest.raises(ValueError, match="written in a way that is not known: replica_groups=<new way>"):
        hlo.message_of(i, 4)


def test_a_slice_of_stacked_weights_reads_that_slice_alone():
    """So a scan over layers reads every weight once, and writes an array of results once."""

    def loop(x, w):
        return jax.lax.scan(lambda x, w: (x * w, x), x, w)

    size = 4 * 4096
    moved = cost(compiled(loop, (4096,), (100, 4096))).bytes
    assert 100 * 4 * size <= moved <= 1.01 * 100 * 8 * size


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups={}", (0, 1, 2, 3)),
        ("replica_groups=[2,2]<=[4]", (0, 1)),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", (0, 1, 2, 3)),
    ],
)
def test_groups_are_read_however_they_are_written(groups: str, found: tuple[int, ...]):
    i = Instruction("r", "all-reduce", (Shape("f32", (10,), 0),), ("x",), f"channel_id=1, {groups}, to_apply=%add")
    share = (len(found) - 1) / len(found)
    assert hlo.message_of(i, 4) == Message("all-reduce", found, round(2 * 40 * share), i.result[0])


def test_a_gather_sends_all_but_its_own_part_and_a_scatter_too():
    whole, part = Shape("bf16", (8, 100), 0), Shape("bf16", (2, 100), 0)
    gather = Instruction("g", "all-gather-start", (part, whole), ("x",), "replica_groups=[1,4]<=[4], dimensions={0}")
    scatter = Instruction("s", "reduce-scatter", (part,), ("x",), "replica_groups=[1,4]<=[4], dimensions={0}")
    for i in (gather, scatter):
        message = hlo.message_of(i, 4)
        assert message is not None and message.bytes == 1600 * 3 / 4
    alone = Instruction("r", "all-reduce", (part,), ("x",), "replica_groups=[4,1]<=[4]")
    assert hlo.message_of(alone, 4) is None


def test_messages_of_a_compiled_loop_count_by_its_trips():
    mesh = make_mesh(1, 4, 2)
    rows = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=jax.NamedSharding(mesh, P("fsdp")))
    weights = jax.ShapeDtypeStruct(
        (TRIPS, WIDTH, WIDTH), jnp.float32, sharding=jax.NamedSharding(mesh, P(None, "fsdp"))
    )

    def loop(x, w):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, jax.NamedSharding(mesh, P()))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), jax.NamedSharding(mesh, P("fsdp"))), None

        return jax.lax.scan(layer, x, w)[0]

    found = cost(hlo.parse(jax.jit(loop).lower(rows, weights).compile().as_text() or ""))
    gathered = Counter({m.group: m.bytes * n for m, n in found.sent.items() if m.kind == "all-gather"})
    assert gathered == {(0, 2, 4, 6): TRIPS * 4 * WIDTH * WIDTH * 3 / 4}
    assert found.flops == TRIPS * 2 * (ROWS / 4) * WIDTH * WIDTH
