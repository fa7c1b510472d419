"""Tests of optimal shapes: the dynamic program, the heap and the beam against all trees, and closed forms."""

import itertools

import numpy as np
import pytest
from brute_shapes import every_tree, random_rates, total_of, value_of

from jaxspec.lab.acceptance import AcceptanceTable
from jaxspec.lab.forest import beginnings, make_forest, shape_of
from jaxspec.lab.optimal import (
    beam,
    edge_sensitivity,
    expected_tokens,
    heap,
    path_value,
    solve,
)
from jaxspec.trees import StaticTree

ROW = [0.7, 0.1, 0.05, 0.03, 0.02, 0.01, 0.01, 0.005]


@pytest.mark.parametrize("seed", range(4))
def test_the_dynamic_program_finds_the_best_of_all_trees_whatever_the_order_of_ranks(seed: int):
    rng = np.random.default_rng(seed)
    depth, ranks = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    rate_DK = random_rates(rng, depth, ranks)
    found = solve(rate_DK, 9)
    for nodes in range(1, 10):
        best = max((total_of(tree, rate_DK) for tree in every_tree(nodes, depth, ranks)), default=-np.inf)
        assert found.value_M[nodes] == pytest.approx(best, abs=1e-12)
        if best > -np.inf:
            shape = found.shape(nodes)
            assert len(shape) == nodes - 1
            assert 1 + total_of(shape, rate_DK) == pytest.approx(best, abs=1e-12)
            assert StaticTree(shape).nodes == nodes


@pytest.mark.parametrize("seed", range(4))
def test_the_dynamic_program_that_may_skip_ranks_finds_the_best_of_all_trees(seed: int):
    rng = np.random.default_rng(10 + seed)
    depth, ranks = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    rate_DK = random_rates(rng, depth, ranks)
    found = solve(rate_DK, 6, skip=True)
    for nodes in range(1, 7):
        best = max((total_of(tree, rate_DK) for tree in every_tree(nodes, depth, ranks, skip=True)), default=-np.inf)
        assert found.value_M[nodes] == pytest.approx(best, abs=1e-12)
        if best > -np.inf:
            shape = found.shape(nodes)
            assert len(shape) == nodes - 1
            assert 1 + total_of(shape, rate_DK) == pytest.approx(best, abs=1e-12)


def test_ranks_that_rise_beat_the_heap_and_not_the_dynamic_program():
    rate_DK = np.tile([0.3, 0.05, 0.6], (3, 1))
    greedy = sum(value for _, value in heap(AcceptanceTable(rate_DK), 4))
    assert greedy == pytest.approx(1.44)
    assert solve(rate_DK, 4).value_M[4] == pytest.approx(1.95)
    assert solve(rate_DK, 4, skip=True).value_M[4] > 1.95


@pytest.mark.parametrize("seed", range(3))
def test_the_heap_is_the_dynamic_program_for_1_to_40_nodes_where_ranks_fall(seed: int):
    rng = np.random.default_rng(seed)
    rate_DK = random_rates(rng, int(rng.integers(1, 6)), int(rng.integers(1, 5)), falling=True)
    order = heap(AcceptanceTable(rate_DK), 40)
    best_M = solve(rate_DK, 40).value_M
    assert np.cumsum([value for _, value in order]) == pytest.approx(best_M[1 : len(order) + 1], abs=1e-12)
    # Depth and ranks hold no more.
    assert np.all(best_M[len(order) + 1 :] == -np.inf)


def test_every_beginning_of_the_heaps_list_is_a_tree_and_ties_go_to_the_shallower_then_the_earlier():
    order = [path for path, _ in heap(AcceptanceTable(np.full((3, 2), 0.5)), 9)]
    assert order[:3] == [(), (0,), (1,)]
    assert order[3:7] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    sure = [path for path, _ in heap(AcceptanceTable(np.array([[1.0, 0.0]] * 3)), 8)]
    assert sure[:4] == [(), (0,), (0, 0), (0, 0, 0)]
    for n in range(1, len(order) + 1):
        make_forest([shape_of(order[:n])])
    assert [*beginnings(order, (1, 2, 5, 9, 99))] == [shape_of(order[:n]) for n in (1, 2, 5, 9)]


def test_the_heap_is_best_for_rates_by_the_parents_rank_too():
    rng = np.random.default_rng(3)
    table = AcceptanceTable(random_rates(rng, 3, 3, falling=True), random_rates(rng, 3, 3, falling=True))
    sums = np.cumsum([value for _, value in heap(table, 7)])
    for nodes in range(1, 8):
        best = max(sum(path_value(table, path) for path in tree) for tree in every_tree(nodes, 3, 3))
        assert sums[nodes - 1] == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("width", [1, 2])
def test_the_beam_is_the_best_of_all_trees_that_expand_so_many_nodes_a_level(width: int):
    rng = np.random.default_rng(width)
    rate_DK = random_rates(rng, 4, 3, falling=True)
    for nodes in range(1, 9):
        fits = [
            total_of(tree, rate_DK)
            for tree in every_tree(nodes, 4, 3)
            if all(sum(len(p) == d and (*p, 0) in tree for p in tree) <= width for d in range(1, 4))
        ]
        found = sum(value for _, value in beam(AcceptanceTable(rate_DK), nodes, width))
        assert found == pytest.approx(max(fits), abs=1e-12)


def test_a_beam_wide_enough_is_the_heap():
    table = AcceptanceTable(np.tile(ROW, (4, 1)))
    wide, best = beam(table, 30, 64), heap(table, 30)
    assert [value for _, value in wide] == pytest.approx([value for _, value in best])


@pytest.mark.parametrize(("rate", "depth"), [(0.8, 5), (0.3, 3), (0.0, 2)])
def test_a_chain_makes_the_geometric_sum(rate: float, depth: int):
    table = AcceptanceTable(np.full((depth, 1), rate))
    chain = shape_of((0,) * d for d in range(1, depth + 1))
    assert expected_tokens(table, chain) == pytest.approx((1 - rate ** (depth + 1)) / (1 - rate))
    assert sum(value for _, value in heap(table, depth + 1)) == pytest.approx(expected_tokens(table, chain))


def test_a_full_tree_makes_the_powers_of_the_rows_sum():
    row = np.array([0.5, 0.2, 0.1])
    order = heap(AcceptanceTable(np.tile(row, (3, 1))), 1000)
    assert len(order) == 1 + 3 + 9 + 27
    assert sum(value for _, value in order) == pytest.approx(sum(row.sum() ** d for d in range(4)))


def test_the_sensitivity_is_the_slope_of_expected_tokens():
    rate_DK = random_rates(np.random.default_rng(5), 3, 3, falling=True)
    table = AcceptanceTable(rate_DK)
    shape = shape_of(path for path, _ in heap(table, 12))
    slope_DK = edge_sensitivity(table, shape)
    for depth, rank in itertools.product(range(3), range(3)):
        nudged = rate_DK.copy()
        nudged[depth, rank] += 1e-6
        slope = (expected_tokens(AcceptanceTable(nudged), shape) - expected_tokens(table, shape)) / 1e-6
        assert slope_DK[depth, rank] == pytest.approx(slope, abs=1e-5)
    assert edge_sensitivity(AcceptanceTable(np.zeros((1, 1))), ((0,),))[0, 0] == 1
    with pytest.raises(ValueError, match="by parent"):
        edge_sensitivity(AcceptanceTable(rate_DK, rate_DK), shape)


def test_the_values_of_a_forest_are_the_products_along_its_paths():
    rng = np.random.default_rng(6)
    rate_DK, second_KK = random_rates(rng, 3, 3), random_rates(rng, 3, 3)
    shapes = [shape_of(path for path, _ in heap(AcceptanceTable(rate_DK), n)) for n in (1, 5, 12)]
    forest = make_forest(shapes)
    for table in (AcceptanceTable(rate_DK), AcceptanceTable(rate_DK, second_KK)):
        assert forest.sums(table.values(forest)) == pytest.approx([expected_tokens(table, shape) for shape in shapes])
    assert path_value(AcceptanceTable(rate_DK), (1, 2)) == pytest.approx(value_of((1, 2), rate_DK))


def test_more_nodes_never_make_fewer_tokens():
    best_M = solve(random_rates(np.random.default_rng(7), 4, 3), 30, skip=True).value_M
    assert np.all(np.diff(best_M[1:]) >= -1e-12)


def test_one_node_no_levels_and_children_of_no_probability():
    assert solve(np.zeros((0, 3)), 4).value_M[1] == 1
    assert solve(np.zeros((0, 3)), 4).shape(1) == ()
    assert heap(AcceptanceTable(np.zeros((0, 3))), 4) == [((), 1.0)]
    assert beam(AcceptanceTable(np.zeros((0, 3))), 4, 2) == [((), 1.0)]
    # Ranks beyond a vocabulary of 2 are never accepted, and never come before those that are.
    table = AcceptanceTable(np.array([[0.6, 0.4, 0.0, 0.0]] * 2))
    assert {path for path, _ in heap(table, 7)} == {(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)}
    assert solve(table.rate_DK, 7).value_M[7] == pytest.approx(3)


def test_more_nodes_than_depth_and_ranks_hold_are_refused():
    found = solve(np.full((2, 2), 0.3), 9)
    assert len(found.shape(7)) == 6
    with pytest.raises(ValueError, match="8 nodes"):
        found.shape(8)
    assert len(heap(AcceptanceTable(np.full((2, 2), 0.3)), 99)) == 7


def test_a_forest_refuses_a_node_without_its_parent():
    with pytest.raises(ValueError, match="parent"):
        make_forest([((0,), (1, 0))])
    with pytest.raises(ValueError, match="parent"):
        make_forest([((0,), (1,)), ((0,), (1, 0))])
