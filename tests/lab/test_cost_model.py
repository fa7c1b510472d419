"""Tests of the cost of a round: straight pieces between measured sizes, and what lies too far from them."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab_toys import cost_table, ridge_cost

from jaxspec.lab.cost_model import describe, greatest, grid, round_cost
from jaxspec.lab.costs import CostRow, CostTable, load_costs
from jaxspec.lab.forest import make_forest, shape_of
from jaxspec.lab.row_steps import known_steps
from jaxspec.nn.matmul import multiply_left


def rows(part: str, points: dict[tuple[int, int, int], float]) -> list[CostRow]:
    """Returns rows of a part; keys are size, batch, context."""
    sizes = {s: (1, s) if part == "draft" else (s, 0) for s, _, _ in points}
    return [CostRow("measured", "toy", part, *sizes[s], b, c, seconds) for (s, b, c), seconds in points.items()]


def small(**more: dict[tuple[int, int, int], float]) -> CostTable:
    """Returns a small table; `more` replaces or adds parts."""
    verify = {(n, b, c): 1.0 + (n > 8) + 0.1 * b + c / 1000 for n in (1, 8, 16) for b in (1, 3) for c in (100, 300)}
    draft = {(w, b, c): 0.1 + 0.1 * w for w in (1, 4) for b in (1, 3) for c in (100, 300)}
    parts = {"verify": verify, "draft": draft} | more
    return CostTable(tuple(row for part, points in parts.items() for row in rows(part, points)), {})


def test_at_sizes_of_the_table_the_cost_is_that_of_the_table():
    cost = round_cost(small(), 3, 300)
    assert cost.verify_N[[1, 8, 16]] == pytest.approx([1.6, 1.6, 2.6])
    cost = round_cost(small(), 1, 100)
    assert cost.level_W[[0, 1, 4]] == pytest.approx([0, 0.2, 0.5])


def test_between_sizes_the_cost_is_the_straight_line_of_their_two_neighbours_alone():
    cost = round_cost(small(), 2, 200)
    # Flat to 8: the step behind it does not reach in.
    assert cost.verify_N[1:9] == pytest.approx([1.4] * 8)
    assert cost.verify_N[12] == pytest.approx(1.9)
    assert cost.level_W[2] == pytest.approx(0.3)


def of_device(table: CostTable, source: str, device: str, **facts: object) -> CostTable:
    """Returns the table as one of another source and device."""
    return CostTable(tuple(row._replace(source=source, device=device) for row in table.rows), facts)


def test_within_a_step_of_padded_rows_a_call_costs_the_same():
    measured = of_device(small(), "measured", "cpu")
    cost = round_cost(measured, 1, 100)
    # 1, 4 and 8 rows are the ends of steps; 16 is the next one, and nothing lies between.
    assert cost.verify_N[[1, 5, 8]] == pytest.approx([1.2, 1.2, 1.2])
    assert cost.verify_N[[9, 12, 16]] == pytest.approx([2.2, 2.2, 2.2])
    # The same of a level: two to four rows are four.
    assert cost.level_W[[1, 2, 3, 4]] == pytest.approx([0.2, 0.5, 0.5, 0.5])


def test_steps_are_of_all_rows_of_a_call():
    verify = {(n, 3, 100): seconds for n, seconds in ((1, 1.0), (5, 2.0), (10, 3.0))}
    cost = round_cost(of_device(small(verify=verify), "measured", "cpu"), 3, 100)
    # Rows are 3, 6, ..., 30; they are padded to 4, 8, 16 (up to 5 nodes), 20, 24 and 32 (from 9 nodes on).
    assert cost.verify_N[[4, 5]] == pytest.approx([2.0, 2.0])
    assert cost.verify_N[[9, 10]] == pytest.approx([3.0, 3.0])
    # 8 rows lie between the measured 4 and 16, 20 and 24 between 16 and 32: on the lines of these ends.
    assert cost.verify_N[[2, 6, 7, 8]] == pytest.approx([4 / 3, 2.25, 2.5, 2.5])


def test_between_batches_a_call_is_priced_by_its_padded_rows():
    verify = {(n, b, 100): t for (n, b), t in {(1, 4): 1.0, (1, 8): 2.0, (5, 4): 5.0, (5, 8): 7.0}.items()}
    draft = {(w, b, 100): 0.1 for w in (1, 4) for b in (4, 8)}
    plain = {(1, 4, 100): 1.0, (1, 8, 100): 2.0}
    cost = round_cost(of_device(small(verify=verify, draft=draft, plain=plain), "measured", "cpu"), 6, 100)
    # Six rows run as eight, and thirty as thirty-two of the twenty and forty.
    assert cost.plain == pytest.approx(2.0)
    assert cost.verify_N[5] == pytest.approx(5 + 2 * 12 / 20)


def test_in_one_step_batches_differ_by_their_caches():
    verify = {(2, b, 100): t for b, t in ((5, 1.0), (8, 1.6))}
    draft = {(w, b, 100): 0.1 for w in (1, 4) for b in (5, 8)}
    cost = round_cost(of_device(small(verify=verify, draft=draft), "measured", "cpu"), 7, 100)
    assert cost.verify_N[2] == pytest.approx(1.4)


def test_compiled_calls_of_tpus_rise_by_eight_rows_and_one_row_is_its_own():
    verify = {(n, 1, 100): seconds for n, seconds in ((1, 1.0), (8, 1.5), (32, 3.0))}
    cost = round_cost(of_device(small(verify=verify), "compiled", "v5e:2x2"), 1, 100)
    assert cost.verify_N[[1, 2, 8]] == pytest.approx([1.0, 1.5, 1.5])
    assert cost.verify_N[[9, 16, 17, 24]] == pytest.approx([2.0, 2.0, 2.5, 2.5])


@pytest.mark.parametrize(("source", "device"), [("roofline", "cpu"), ("roofline", "v6e"), ("measured", "v6e")])
def test_where_no_steps_are_known_lines_go_from_size_to_size(source: str, device: str):
    assert round_cost(of_device(small(), source, device), 1, 100).verify_N[12] == pytest.approx(1.7)


def test_steps_that_a_file_names_go_before_those_of_its_device():
    table = of_device(small(), "measured", "cpu", row_steps={"ends": [], "every": 12})
    assert round_cost(table, 1, 100).verify_N[[8, 12, 13, 16]] == pytest.approx([1.2, 1.2, 2.2, 2.2])


def straight(known: dict[int, float], at: int) -> float:
    """Returns the line from size to size."""
    return float(np.interp(at, list(known), list(known.values())))


def test_sizes_that_a_measured_table_lacks_are_nearer_than_straight_lines():
    """The committed costs have 5 and 9 nodes, the first of two steps on a CPU; the sizes of the defaults have not."""
    table = load_costs(Path(__file__).parents[2] / "docs/results/trees/costs_check_smollm2.json")
    steps, lines = [], []
    for batch in (1, 2, 4):
        known = {r.nodes: r.seconds for r in table.rows if r.part == "verify" and r.batch == batch}
        for left_out in (5, 9):
            fewer = {n: seconds for n, seconds in known.items() if n != left_out}
            rows = tuple(row for row in table.rows if row.part != "verify" or row.nodes != left_out)
            found = round_cost(dataclasses.replace(table, rows=rows), batch, 128).verify_N[left_out]
            steps.append(abs(found / known[left_out] - 1))
            lines.append(abs(straight(fewer, left_out) / known[left_out] - 1))
    assert np.median(lines) > 0.15 and np.median(steps) < 0.1
    assert max(steps) < max(lines) - 0.04
    # At batch 1 both sizes are in steps that the table has.
    assert max(steps[:2]) < 0.06


def test_a_grid_has_the_first_of_the_steps_that_its_sizes_pass_over():
    cpu = known_steps("measured", "cpu", "float32")
    sizes = (1, 2, 4, 8, 16, 32, 64)
    assert cpu.with_jumps(sizes, 1) == [1, 2, 4, 8, 16, 20, 32, 40, 64]
    assert cpu.with_jumps(sizes, 2) == [1, 2, 4, 8, 10, 16, 20, 32, 64]
    # Of four rows, 5 nodes are 20 and 10 are 40; beyond 64 rows nothing is padded.
    assert cpu.with_jumps(sizes, 4) == [1, 2, 4, 5, 8, 10, 16, 32, 64]
    assert cpu.with_jumps((1, 2, 4, 8, 16), 1) == [1, 2, 4, 8, 16]
    assert known_steps("compiled", "v6e", "bfloat16").with_jumps(sizes, 1) == list(sizes)


def test_rows_are_padded_as_products_are():
    row = np.arange(1, 100)
    padded = known_steps("measured", "cpu", "float32").padded(row)
    for rows, to in zip(row, padded, strict=True):
        x = jax.ShapeDtypeStruct((1, rows, 8), jnp.float32)
        text = str(jax.make_jaxpr(functools.partial(multiply_left, jnp.zeros((16, 8))))(x))
        assert f"f32[16,{to}]" in text or (to == rows and f"f32[1,{rows},16]" in text)
    assert known_steps("measured", "cpu", "bfloat16").padded(row)[[0, 7, 8]].tolist() == [8, 8, 9]
    assert known_steps("compiled", "tpu7x", "bfloat16").padded(row)[[0, 1, 8]].tolist() == [1, 8, 16]


def test_a_round_is_the_levels_the_call_and_the_rest_and_one_node_is_plain_decoding():
    extend = {(2, 1, 100): 0.3, (8, 1, 100): 0.9}
    table = small(extend=extend, rest={(1, 1, 0): 0.05}, plain={(1, 1, 100): 0.9})
    cost = round_cost(table, 1, 100)
    shape = shape_of([(0,), (1,), (0, 0), (1, 0), (0, 0, 0)])
    forest = make_forest([(), shape])
    assert forest.width_SD.tolist() == [[0, 0], [2, 1]]
    found = cost.round_seconds(forest.nodes_S, forest.width_SD)
    # The longest path has four nodes.
    assert found == pytest.approx([0.9, cost.verify_N[6] + 0.5 + 0.05 + cost.level_W[2] + cost.level_W[1]])
    once = dataclasses.replace(cost, one_pass=True).round_seconds(forest.nodes_S, forest.width_SD)
    assert once == pytest.approx([0.9, cost.verify_N[6] + 0.5 + 0.05 + cost.level_W[2]])


def test_plain_decoding_is_the_cheapest_that_was_costed():
    assert round_cost(small(plain={(1, 1, 100): 0.9, (8, 1, 100): 0.4}), 1, 100).plain == pytest.approx(0.4)


def test_an_extend_of_one_size_is_of_any_path():
    cost = round_cost(small(extend={(1, 1, 100): 0.3}), 1, 100)
    assert cost.extend_P[[1, 9, 40]] == pytest.approx([0.3] * 3)


def test_plain_decoding_without_rows_is_the_call_on_one_node_and_the_rest():
    assert round_cost(small(rest={(1, 1, 0): 0.05}), 1, 100).plain == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("batch", "context", "named"), [(1, 601, "context of 601"), (1, 49, "context of 49"), (7, 100, "batch of 7")]
)
def test_sizes_far_from_the_table_are_refused_by_name(batch: int, context: int, named: str):
    with pytest.raises(ValueError, match=named):
        round_cost(small(), batch, context)


def test_sizes_a_little_beyond_the_table_go_on_straight():
    cost = round_cost(small(), 1, 400)
    assert cost.verify_N[1] == pytest.approx(1.5)
    assert cost.level_W[[4, 8]] == pytest.approx([0.5, 0.9])
    assert len(cost.level_W) == 9 and cost.most_nodes == 16


def test_one_batch_says_nothing_of_another():
    table = CostTable(tuple(row for row in small().rows if row.batch == 1), {})
    with pytest.raises(ValueError, match="batch 1 alone"):
        round_cost(table, 2, 100)


def test_missing_parts_and_mixed_devices_are_refused():
    table = small()
    with pytest.raises(ValueError, match="part draft"):
        round_cost(CostTable(tuple(r for r in table.rows if r.part != "draft"), {}), 1, 100)
    with pytest.raises(ValueError, match="part verify"):
        round_cost(CostTable(tuple(r for r in table.rows if r.part != "verify"), {}), 1, 100)
    other = table.rows[0]._replace(device="tpu")
    with pytest.raises(ValueError, match="several devices"):
        round_cost(CostTable((*table.rows, other), {}), 1, 100)


def test_a_one_pass_drafter_has_levels_without_cost():
    table = CostTable(tuple(r for r in small().rows if r.part != "draft"), {"one_pass": True})
    cost = round_cost(table, 1, 100)
    assert not cost.level_W.any() and len(cost.level_W) > 16


def test_sizes_beyond_a_cost_are_refused():
    cost = ridge_cost(240, 1, nodes=16)
    for nodes, widths in ((17, [1]), (4, [65]), (12, [1] * 8)):
        with pytest.raises(ValueError, match=f"{nodes} nodes"):
            cost.round_seconds(np.array([nodes]), np.array([widths]))
    assert cost.known(np.array([1, 16]), np.array([[0], [2]])).all()


def test_parts_are_scaled_apart():
    cost = ridge_cost(240, 1)
    more = cost.scaled(draft=2, target=3, other=5)
    assert more.plain == pytest.approx(3 * cost.plain)
    assert more.verify_N == pytest.approx(3 * cost.verify_N)
    assert more.level_W == pytest.approx(2 * cost.level_W)
    assert more.extend_P == pytest.approx(2 * cost.extend_P)
    assert more.rest == pytest.approx(5 * cost.rest)


def test_a_table_tells_its_grid_and_where_it_is_from():
    table = cost_table()
    assert grid(table) == ((1, 4, 16), (512, 2048))
    assert greatest(table, "verify") == 64 and greatest(table, "draft") == 8 and greatest(table, "none") == 0
    assert describe(table)["device"] == "toy"
