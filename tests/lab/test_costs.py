"""Costs of a round's parts: identities of the roofline, prices of programs, ledgers, comparisons."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drafter_toys import KINDS, VOCAB, WIDTH

from jaxspec.console.progress import Progress
from jaxspec.lab.compiled import (
    CompiledBench,
    Machine,
    Priced,
    cpu_machine,
    cycles_of,
    gpu_machine,
    matmul_rows,
    price,
    price_compiled,
    price_totals,
    seconds_of_layers,
)
from jaxspec.lab.costs import PARTS, CostRow, CostTable, differences, load_costs
from jaxspec.lab.cpu_rates import CpuRates, median_rates, rate_programs, rates_of_json
from jaxspec.lab.devices import DevicePeaks, check_device, peaks_of
from jaxspec.lab.measured import RoundBench
from jaxspec.lab.pricing import Ledger, Watch, price_points, rows_of
from jaxspec.lab.roofline import LOGIT_BYTES, Roofline
from jaxspec.lab.round_parts import Grid, PartPrograms, Point, branched_tree, reference_parts, reference_tree
from jaxspec.lab.shapes import LAB_SHAPES, abstract_models, filled, layer_period, shortened, with_layers
from jaxspec.nn.options import Options
from jaxspec.planning import hlo
from jaxspec.planning.cost import Cost
from jaxspec.planning.decode_program import abstract_state
from jaxspec.planning.work import matmul_weights, touched_experts
from jaxspec.targets.decoder import DecoderConfig, LlamaConfig

TOY = LlamaConfig(VOCAB, WIDTH, 4, 4, 2, 8, 32)
"""A target for the toy drafters."""
GRID = Grid((1, 8), (1, 2), (2,), (24,), paths=(2,))
PEAKS = DevicePeaks("toy", 1e15, 1e9)
"""A device whose memory binds everything."""


@functools.cache
def toy(kind: str = "eagle") -> Any:
    return abstract_models(TOY, KINDS[kind], dtype=jnp.float32)


def llama(**options: Any) -> Roofline:
    models = abstract_models(LAB_SHAPES["llama3-8b"], None, dtype=jnp.bfloat16)
    return Roofline(models, GRID, PEAKS, **options)


# The roofline.


def test_one_token_takes_the_weights_by_the_bandwidth_where_memory_binds():
    line = llama()
    _, size = matmul_weights(line.models.weights.target)
    assert size == pytest.approx(15.01e9, rel=0.01)
    seconds = line.measure(Point("plain", 1, 0, 1, 0))
    assert seconds == pytest.approx((size + LOGIT_BYTES * 128256) / PEAKS.bandwidth, rel=1e-12)


def test_a_tied_head_is_read_as_a_matmul():
    """Of weights in a CPU's layout too."""
    tied = dataclasses.replace(TOY, tied=True)
    models = [abstract_models(shape, None, dtype=jnp.float32, for_cpu=True) for shape in (tied, TOY)]
    one, other = (Roofline(m, GRID, PEAKS).work(Point("plain", 1, 0, 1, 16)) for m in models)
    assert one == other


@pytest.mark.parametrize("batch", [1, 8])
def test_a_token_of_context_adds_its_keys_and_values_for_every_row(batch: int):
    """Of Llama-3-8B in bf16, 131,072 bytes."""
    line = llama()
    near, far = (line.work(Point("verify", 8, 0, batch, context)).bytes for context in (512, 4096))
    assert (far - near) / (4096 - 512) / batch == 131072


def test_overhead_is_added_to_every_part():
    point = Point("verify", 8, 0, 1, 512)
    assert llama(overhead=1e-3).measure(point) == pytest.approx(llama().measure(point) + 1e-3)


def test_many_nodes_are_bound_by_arithmetic():
    models = llama().models
    line = Roofline(models, GRID, peaks_of("v5e"))
    few, many = (line.measure(Point("verify", nodes, 0, 8, 512)) for nodes in (8, 256))
    work = line.work(Point("verify", 256, 0, 8, 512))
    assert many == pytest.approx(work.flops / 197e12) and many > 5 * few


@pytest.mark.parametrize(("tokens", "expected"), [(1, 8), (8, 52), (16, 82), (32, 112)])
def test_uniform_routing_reaches_as_many_experts_as_a_simulation(tokens: int, expected: int):
    rng = np.random.default_rng(tokens)
    drawn = [
        len(np.unique(np.concatenate([rng.choice(128, 8, replace=False) for _ in range(tokens)]))) for _ in range(200)
    ]
    assert touched_experts(128, 8, tokens) == pytest.approx(float(np.mean(drawn)), rel=0.02)
    assert round(touched_experts(128, 8, tokens)) == expected


def test_a_routed_roofline_reads_the_experts_of_one_token_and_all_of_many():
    shape = LAB_SHAPES["qwen3-30b-a3b"]
    models = abstract_models(with_layers(shape, 2), None, dtype=jnp.bfloat16)
    whole, routed = Roofline(models, GRID, PEAKS), Roofline(models, GRID, PEAKS, routed=True)
    one, many = Point("verify", 1, 0, 1, 16), Point("verify", 64, 0, 64, 16)
    expert = 3 * shape.width * shape.options.expert_mlp * 2
    assert whole.work(one).bytes - routed.work(one).bytes == pytest.approx(2 * 120 * expert, rel=1e-4)
    assert routed.work(many).bytes == pytest.approx(whole.work(many).bytes, rel=1e-6)
    assert routed.work(one).flops == whole.work(one).flops


def test_a_level_of_a_one_pass_drafter_reads_an_lm_head_alone():
    line, width = Roofline(toy("medusa sharing the head"), GRID, PEAKS), WIDTH
    work = line.work(Point("draft", 1, 2, 2, 24))
    levels = KINDS["medusa sharing the head"].deepest - 1
    assert work.bytes == 4 * VOCAB * width + LOGIT_BYTES * 2 * levels * VOCAB


def test_the_parts_of_a_round_have_the_flops_of_the_round():
    """Attention between a level's nodes aside, whose slots differ."""
    line = Roofline(toy(), Grid((1, 8), (1, 4), (2,), (24,), paths=(4,)), PEAKS)
    whole = line._flops(Point("round", 1, 0, 2, 24))
    parts = sum(line._flops(part) for part in reference_parts(line.models.engine, 2, 24))
    assert parts == pytest.approx(whole, rel=0.02)


# Layers.


def test_extrapolation_in_layers_is_exact_on_the_roofline():
    shape = LAB_SHAPES["llama3-8b"]
    models = abstract_models(shape, None, dtype=jnp.bfloat16)
    point = Point("verify", 8, 0, 2, 512)
    work = {n: Roofline(shortened(models, n), GRID, PEAKS).work(point) for n in (2, 4, 32)}
    priced = {n: Priced(Cost(w.flops, w.bytes, 0.0, w.bytes / PEAKS.bandwidth)) for n, w in work.items()}
    seconds = seconds_of_layers(priced[2], priced[4], (2, 4, 32), PEAKS.bandwidth)
    assert seconds == pytest.approx(priced[32].seconds(PEAKS.bandwidth), rel=1e-9)


def test_layers_that_alternate_are_compiled_by_whole_periods():
    windows = (4, None, 4, None, 4, None, 4, None)
    shape = DecoderConfig(VOCAB, WIDTH, 8, 4, 2, 8, 32, options=Options(windows=windows))
    assert layer_period(shape) == 2 and layer_period(TOY) == 1
    assert with_layers(shape, 4).options.windows == windows[:4]
    odd = dataclasses.replace(shape, options=Options(windows=(4,) * 7 + (None,)))
    assert layer_period(odd) == 8
    machine = Machine("toy", 1e9, lambda i: 1e9)
    assert CompiledBench(abstract_models(odd, None, dtype=jnp.float32), GRID, machine).layers == (8, 8)


# Programs.


DRAFTING = ("draft", "extend", "commit", "round")


@pytest.mark.parametrize("kind", ["eagle", "fspad", "eagle3", "medusa", "parallelspec", "peagle", "draft_lm"])
def test_every_part_of_every_drafter_is_a_program_that_keeps_the_state(kind: str):
    models = toy(kind)
    state = abstract_state(models.engine, models.weights, batch=2, capacity=40, slots=64)
    zero = jax.ShapeDtypeStruct((), jnp.int32)
    for part in (*DRAFTING, "plain", "verify") if kind == "eagle" else DRAFTING:
        point = Point(part, 8 if part in ("plain", "verify") else 2, 2 if part == "draft" else 0, 2, 24)
        program = PartPrograms(models).program(point, state)
        after, _ = jax.eval_shape(program.step, models.weights, state, program.given, zero)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)


@pytest.mark.parametrize("nodes", [1, 2, 8, 61, 256])
@pytest.mark.parametrize("deepest", [None, 1, 3])
def test_a_branched_tree_has_its_nodes_and_is_not_too_deep(nodes: int, deepest: int | None):
    tree = branched_tree(nodes, deepest)
    assert tree.nodes == nodes and (deepest is None or tree.depth <= deepest)


def test_the_reference_tree_is_as_deep_as_the_drafter():
    assert (reference_tree(None).depth, reference_tree(2).depth) == (3, 2)
    assert reference_tree(None).nodes == reference_tree(1).nodes == 16


def test_the_grid_holds_the_parts_of_the_reference_round():
    points = GRID.points(toy().engine, 2, 24)
    assert set(reference_parts(toy().engine, 2, 24)) <= set(points)
    assert len(points) == len(set(points))
    assert {p.nodes for p in points if p.part == "plain"} == {1, 8}
    plain = abstract_models(TOY, None, dtype=jnp.float32)
    assert {p.part for p in GRID.points(plain.engine, 2, 24)} == {"plain", "verify"}


# Prices.

HLO = """HloModule drawn_by_hand
ENTRY %main (p: bf16[1024,1024]) -> bf16[1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  %fetch = (bf16[1024,1024]{1,0:S(1)}, bf16[1024,1024]{1,0}, u32[]) copy-start(%p)
  %busy = bf16[1024]{0:S(1)} fusion(%q), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"3000"}
  ROOT %end = bf16[1024,1024]{1,0:S(1)} copy-done(%fetch)
}
%f (x: bf16[1024]) -> bf16[1024] {
  ROOT %x = bf16[1024]{0:S(1)} parameter(0)
}
"""


@pytest.mark.parametrize(("bandwidth", "expected"), [(2 * 2**20 / 1e-6, 3e-6), (2 * 2**20 / 9e-6, 9e-6)])
def test_a_copy_hides_behind_arithmetic_until_memory_is_the_limit(bandwidth: float, expected: float):
    """3,000 cycles at 1 GHz, and a copy of 2 MiB."""
    machine = Machine("toy", bandwidth, lambda i: 1e12, clock=1e9)
    assert price(hlo.parse(HLO), machine).seconds(bandwidth) == pytest.approx(expected)


def test_cycles_are_read_from_what_the_compiler_says():
    entry = hlo.parse(HLO).computations["main"]
    assert [cycles_of(i) for i in entry] == [0, 0, 3000, 0]


def test_few_rows_are_priced_at_the_rate_of_few_rows():
    rates = CpuRates(1e9, {1: 1e9, 8: 4e9, 64: 16e9})
    machine = cpu_machine(rates)
    text = "HloModule m\nENTRY %e (a: f32[8,9], b: f32[9,32]) -> f32[8,32] {\n"
    text += "  %a = f32[8,9]{1,0} parameter(0)\n  %b = f32[9,32]{1,0} parameter(1)\n"
    text += "  ROOT %d = f32[8,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n"
    dot = hlo.parse(text).computations["e"][-1]
    assert matmul_rows(dot) == 8 and machine.flops(dot) == 4e9
    assert rates.peak == 16e9 and rates_of_json(rates.as_json()) == rates
    assert median_rates([rates.as_json()] * 3) == rates


def test_the_rates_of_this_machine_are_above_zero():
    rates = rate_programs(jnp.float32, width=32, matrices=2).measure(repeats=1)
    assert rates.bytes_per_second > 0 and min(rates.flops_per_second.values()) > 0


def test_programs_for_this_cpu_are_priced_and_none_is_run():
    models = abstract_models(TOY, KINDS["eagle"], dtype=jnp.float32, for_cpu=True)
    machine = cpu_machine(CpuRates(1e9, {1: 1e9, 64: 1e10}))
    bench = CompiledBench(models, GRID, machine)
    whole, parts = Point("round", 1, 0, 2, 24), reference_parts(models.engine, 2, 24)
    assert bench.layers == (4, 4) and {whole, *parts} <= set(bench.points(2, 24))
    seconds = {point: bench.measure(point) for point in dict.fromkeys([whole, *parts])}
    assert min(seconds.values()) > 0
    assert sum(seconds[p] for p in parts) == pytest.approx(seconds[whole], rel=0.35)


def test_what_the_parts_leave_of_a_whole_round_is_the_rest_at_every_place():
    engine = toy().engine
    grid = GRID._replace(batches=(2, 3))
    machine = cpu_machine(CpuRates(1e9, {1: 1e9, 64: 1e10}))
    points = [p for place in grid.places() for p in CompiledBench(toy(), grid, machine).points(*place)]
    seconds = dict.fromkeys(points, 1e-3)
    parts = {batch: len(reference_parts(engine, batch, 24)) for batch in (2, 3)}
    seconds |= {p: 1e-3 * parts[p.batch] + 2e-3 for p in points if p.part == "round"}
    found = rows_of(seconds, engine, "compiled", "cpu")
    assert [(r.batch, r.seconds) for r in found.rows if r.part == "rest"] == [
        (2, pytest.approx(2e-3)),
        (3, pytest.approx(2e-3)),
    ]
    # Rows of a round and its parts add up to it, so no round is dearer than its parts.
    assert len(found.rounds) == 2
    # A round that costs less than its parts leaves nothing; where none is priced, the commit is known at least.
    shorter = rows_of(seconds | {p: 0.0 for p in points if p.part == "round"}, engine, "compiled", "cpu")
    assert all(r.seconds == 0 for r in shorter.rows if r.part == "rest")
    alone = {p: s for p, s in seconds.items() if p.part != "round"} | {Point("commit", 1, 0, 2, 24): 5e-4}
    assert [r.seconds for r in rows_of(alone, engine, "compiled", "cpu").rows if r.part == "rest"] == [5e-4]


def test_a_program_is_priced_by_the_totals_that_its_compiler_counts():
    """This CPU's compiled program stands in for a GPU's."""
    machine = gpu_machine(DevicePeaks("h100", 1e12, 1e9))

    def three(x, w):
        return x @ w @ w @ w

    x, w = jax.ShapeDtypeStruct((64, 512), jnp.float32), jax.ShapeDtypeStruct((512, 512), jnp.float32)
    compiled = jax.jit(three).lower(x, w).compile()
    priced = price_compiled(compiled, machine)
    assert priced.cost.flops == pytest.approx(3 * 2 * 64 * 512 * 512, rel=0.01)
    read = 4 * (512 * 512 + 64 * 512)
    assert priced.cost.bytes >= read and priced.seconds(1e9) == pytest.approx(priced.cost.bytes / 1e9)
    # Where memory is no limit the FLOPs are.
    assert priced.seconds(1e15) == pytest.approx(priced.cost.flops / 1e12)
    assert "cost analysis" in machine.method and "peak" in machine.method

    def looped(x, w):
        return jax.lax.fori_loop(0, 3, lambda i, x: x @ w, x)

    with pytest.raises(ValueError, match="counts the body of a loop once"):
        price_compiled(jax.jit(looped).lower(x, w).compile(), machine)
    for totals in ({}, {"flops": 1.0}, {"flops": -1.0, "bytes accessed": 2.0}):
        with pytest.raises(ValueError, match="neither FLOPs nor bytes"):
            price_totals(totals, 1e12)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_parts_of_a_round_are_priced_by_the_compilers_totals_near_their_work(temperature: float):
    models = abstract_models(TOY, KINDS["eagle"], dtype=jnp.float32)
    bench = CompiledBench(models, GRID, gpu_machine(PEAKS), temperature=temperature)
    line = Roofline(models, GRID, DevicePeaks("toy", 1e15, 1e9))
    for point in (Point("verify", 8, 0, 2, 24), Point("extend", 2, 0, 2, 24)):
        assert bench.measure(point) > 0.9 * line.measure(point)


# Measuring.


def test_measured_parts_of_a_toy_become_rows_of_every_part():
    models = filled(abstract_models(TOY, KINDS["eagle"], dtype=jnp.float32, for_cpu=True))
    rates = rate_programs(jnp.float32, width=16, matrices=1)
    bench = RoundBench(models, GRID, at_least=0.0, rates=rates.programs)
    found = bench.measure(2, 24, repeats=1)
    rest = Point("rest", 1, 0, 2, 24)
    assert set(found.parts) == {rest, *bench.points(2, 24)}
    assert min(seconds for point, seconds in found.parts.items() if point != rest) > 0
    assert set(found.rates) == set(rates.programs)
    result = rows_of(found.parts, models.engine, "measured", "cpu")
    assert {row.part for row in result.rows} == set(PARTS)
    assert result.rounds[0]["round_seconds"] == found.parts[Point("round", 1, 0, 2, 24)]
    assert all(row.seconds >= 0 and (row.batch, row.context) == (2, 24) for row in result.rows)


def test_caches_that_memory_does_not_hold_are_refused():
    models = filled(abstract_models(TOY, KINDS["eagle"], dtype=jnp.float32, for_cpu=True))
    bench = RoundBench(models, GRID._replace(contexts=(2**30,)))
    with pytest.raises(ValueError, match="GB are free: give smaller --batches or --contexts"):
        bench.measure(2, 2**30, repeats=1)


# Tables and ledgers.


def row(part: str, seconds: float, nodes: int = 1) -> CostRow:
    return CostRow("compiled", "v5e", part, nodes, 0, 1, 512, seconds)


def test_differences_are_by_part_over_the_rows_that_both_have():
    mine = [row("verify", 1.0), row("verify", 3.0, 8), row("verify", 9.0, 16), row("rest", 1.0)]
    theirs = [row("verify", 2.0), row("verify", 2.0, 8), row("plain", 1.0), row("rest", 0.0)]
    (found,) = differences(mine, theirs)
    assert (found.part, found.points, found.ratio, found.median_error) == ("verify", 2, 1.0, 0.5)
    assert abs(found.worst_error) == 0.5


def test_a_table_keeps_figures_that_fall_with_the_nodes(tmp_path: Path):
    """Another fusion may be faster: nothing is smoothed."""
    rows = (row("verify", 3.99e-4, 256), row("verify", 3.29e-4, 512))
    CostTable(rows, {"device": "v5e"}).save(tmp_path / "costs.json")
    assert load_costs(tmp_path / "costs.json") == CostTable(rows, {"device": "v5e"})


BAR = Progress("pricing", 4, "parts", None)


class Counted:
    """Prices a part by its nodes, and refuses 3."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def points(self, batch: int, context: int) -> list[Point]:
        return [Point("verify", n, 0, batch, context) for n in (1, 2, 3, 4)]

    def measure(self, point: Point) -> float:
        self.asked.append(point.nodes)
        if point.nodes == 3:
            raise ValueError("does not fit the device")
        return float(point.nodes)


def test_a_ledger_continues_where_it_was_stopped(tmp_path: Path):
    out, bench = tmp_path / "costs.json", Counted()
    points = bench.points(1, 8)
    first = Ledger(out, {"device": "v5e"})
    first.add({points[0]: 1.0})
    again = Ledger(out, {"device": "v5e"})
    assert price_points(bench, points, again, Watch(float("inf")), BAR) == []
    assert bench.asked == [2, 3, 4]
    assert Ledger(out, {"device": "v5e"}).seconds == {points[0]: 1.0, points[1]: 2.0, points[3]: 4.0}
    assert again.failed == {points[2]: "does not fit the device"}
    with pytest.raises(ValueError, match=r"costs\.json"):
        Ledger(out, {"device": "v6e"})


def test_what_does_not_fit_the_time_is_left():
    bench = Counted()
    times = iter([0.0, 0.0, 5.0, 10.0, 15.0])
    watch = Watch(12.0, lambda: next(times))
    left = price_points(bench, bench.points(1, 8), Ledger(None, {}), watch, BAR)
    assert bench.asked == [1, 2] and [p.nodes for p in left] == [3, 4]


@pytest.mark.parametrize("device", ["v7", "tpu", "v5e:", "v5e:0x2", "geforce"])
def test_a_device_that_is_not_known_is_refused(device: str):
    with pytest.raises(ValueError):
        check_device(device)


def test_peaks_are_of_one_device_or_of_a_whole_slice():
    assert peaks_of("v5e").flops == 197e12 and peaks_of("v5e:2x4").bandwidth == 8 * 819e9
    assert peaks_of("tpu7x").flops == 2307e12 / 2 and peaks_of("tpu7x:2x2x1").flops == 4 * 2307e12
    assert peaks_of("h200").bandwidth == 4.8e12
