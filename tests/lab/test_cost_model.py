"""Tests of the cost of a round: straight pieces between measured sizes, and what lies too far from them."""

import dataclasses

import numpy as np
import pytest
from lab_toys import cost_table, ridge_cost

from jaxspec.lab.cost_model import describe, greatest, grid, round_cost
from jaxspec.lab.costs import CostRow, CostTable
from jaxspec.lab.forest import make_forest, shape_of


def rows(part: str, points: dict[tuple[int, int, int], float]) -> list[CostRow]:
    """Returns rows of a part; keys are size, batch, context."""
    sizes = {s: (1, s) if part == "draft" else (s, 0) for s, _, _ in points}
    return [CostRow("measured", "cpu", part, *sizes[s], b, c, seconds) for (s, b, c), seconds in points.items()]


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


def test_a_step_of_nodes_is_paid_whole():
    table = small()
    cost = round_cost(dataclasses.replace(table, facts={"node_step": 8}), 1, 100)
    assert cost.verify_N[[1, 8]] == pytest.approx([1.2, 1.2])
    assert cost.verify_N[[9, 16]] == pytest.approx([2.2, 2.2])


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
