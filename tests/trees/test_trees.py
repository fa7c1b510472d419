"""Trees: the dynamic one against EAGLE-2 written out in NumPy, the static ones against their paths."""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Tables, code_of, draft_from, grow, likely, node_paths, path_tables

from jaxspec.base import ROOT, Children, Frontier, Tree, TreePolicy
from jaxspec.trees import (
    EAGLE1_PATHS,
    BestFirstTree,
    DynamicTree,
    StaticTree,
    chain,
    cut_tree,
    parse_paths,
    parse_tree,
)


@functools.partial(jax.jit, static_argnums=0)
def grow_jitted(policy: TreePolicy, tables: Tables, root: int = 7) -> Tree:
    return grow(policy, tables, root)


def quantised(tables: Tables, values: tuple[float, ...], seed: int = 0) -> Tables:
    """Returns tables in which every logit is one of a few values, so that most scores tie."""
    rng = np.random.default_rng(seed)
    return [rng.choice(np.asarray(values, np.float32), size=x.shape) for x in tables]


def log_probabilities(tables: Tables) -> Tables:
    """Returns log-probabilities by the library's log-softmax, so that equal scores tie in both implementations."""
    return jax.device_get(log_softmax_each(tables))


log_softmax_each = jax.jit(lambda tables: [jax.nn.log_softmax(x) for x in tables])


def best(scores: list[np.float32], count: int) -> list[int]:
    """Returns the indices of the greatest scores; of equal ones the earlier comes first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def best_children(logp: Tables, row: int, count: int, path: tuple[int, ...], score: np.float32):
    """Returns `(path, score)` of the likeliest children of a path."""
    step = logp[len(path)][row, code_of(path, logp[0].shape[-1])]
    return [((*path, int(t)), np.float32(score + step[t])) for t in best(list(step), count)]


def eagle2(logp: Tables, row: int, nodes: int, depth: int, beam: int):
    """Returns `(path, score)` of each kept node, in the order of drafting (EAGLE-2, expansion and rerank)."""
    children = functools.partial(best_children, logp, row, beam)
    level = children((), np.float32(0))
    pool, frontier = list(level), level
    for _ in range(1, depth):
        level = [c for path, score in frontier for c in children(path, score)]
        pool += level
        frontier = [level[i] for i in best([s for _, s in level], beam)]
    return [pool[i] for i in sorted(best([s for _, s in pool], nodes - 1))]


KINDS = {
    "smooth": lambda t: t,
    "peaked": lambda t: [8 * x for x in t],
    "flat": lambda t: [np.zeros_like(x) for x in t],
    "two values": lambda t: quantised(t, (0.0, -200.0)),
    "certain": lambda t: quantised(t, (0.0, -200.0, -200.0, -200.0), 1),
    "impossible": lambda t: [np.where(x < -1, -np.inf, x) for x in t],
}
SIZES = [(1, 1, 1), (3, 1, 2), (4, 3, 1), (9, 3, 2), (22, 3, 3), (17, 4, 5)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dynamic_tree_is_eagle_2s(kind: str, size: tuple[int, int, int]):
    nodes, depth, beam = size
    batch, vocab = 4, 5
    tables = KINDS[kind](path_tables(nodes, vocab, depth, batch))
    tree = jax.device_get(grow_jitted(DynamicTree(*size), tables))
    logp = log_probabilities(tables)
    for b in range(batch):
        want = eagle2(logp, b, nodes, depth, beam)
        real = [(p, s) for p, s in want if s > -np.inf]
        assert tree.token_BN[b, 0] == 7 and tree.score_BN[b, 0] == 0 and tree.parent_BN[b, 0] == ROOT
        assert tree.valid_BN[b].tolist() == [True, *(s > -np.inf for _, s in want)]
        found = [p for p in node_paths(tree, b) if p is not None][1:]
        assert found == [p for p, _ in real]
        np.testing.assert_allclose(tree.score_BN[b, 1:][tree.valid_BN[b, 1:]], [s for _, s in real], rtol=2e-6)
        assert tree.depth_BN[b, tree.valid_BN[b]].tolist() == [0, *(len(p) for p, _ in real)]


@pytest.mark.parametrize("kind", ["smooth", "two values", "flat", "certain"])
def test_a_kept_nodes_parent_is_kept_and_stands_before_it(kind: str):
    batch, policy = 200, DynamicTree(12, 4, 3)
    tables = KINDS[kind](path_tables(5, 4, 4, batch))
    tree = jax.device_get(grow_jitted(policy, tables))
    for b in range(batch):
        paths = node_paths(tree, b)
        assert len(set(paths)) == policy.nodes, "a path stands twice"
        for n in range(1, policy.nodes):
            parent = tree.parent_BN[b, n]
            assert 0 <= parent < n
            assert tree.depth_BN[b, n] == tree.depth_BN[b, parent] + 1
            assert tree.score_BN[b, n] <= tree.score_BN[b, parent]


def ranked(logits_BWV: jax.Array, count: int, slot: int) -> Children:
    """The first tokens, with the logits for log-probabilities: quarters, whose sums are exact."""
    logp_BWR = logits_BWV[..., :count]
    return Children(jnp.broadcast_to(jnp.arange(count), logp_BWR.shape), logp_BWR, logp_BWR)


@functools.partial(jax.jit, static_argnums=0)
def pop_best(policy: BestFirstTree, logp_BTR: jax.Array) -> Tree:
    """The best-first tree of these distributions, a depth each."""
    root_B = jnp.full(logp_BTR.shape[0], 7)
    return policy.grow(lambda s, f: (logp_BTR[:, f.depth, None], s), ranked, None, logp_BTR[:, 0], root_B)


def pushed_and_popped(logp_TR: np.ndarray, nodes: int) -> list[tuple[int, int, float]]:
    """`(parent, rank, score)` of the nodes below the root, from a heap with the children of all that was popped."""
    heap = [(-score, 1, 0, rank) for rank, score in enumerate(logp_TR[0])]
    heapq.heapify(heap)
    taken = []
    while heap and len(taken) < nodes - 1:
        score, depth, parent, rank = heapq.heappop(heap)
        if score == np.inf:
            break
        taken.append((parent, rank, -score))
        if depth < len(logp_TR):
            for r, step in enumerate(logp_TR[depth]):
                heapq.heappush(heap, (score - step, depth + 1, len(taken), r))
    return taken


LAWS = {
    "few ties": lambda rng, shape: -rng.integers(0, 400, shape),
    "many ties": lambda rng, shape: -rng.integers(0, 3, shape),
    "all equal": lambda rng, shape: np.zeros(shape),
    "impossible tokens": lambda rng, shape: np.where(rng.random(shape) < 0.6, -np.inf, -rng.integers(0, 9, shape)),
}


@pytest.mark.parametrize("size", [(1, 1, 1), (4, 3, 1), (14, 3, 2), (15, 3, 2), (40, 6, 4)], ids=str)
@pytest.mark.parametrize("kind", LAWS)
def test_a_best_first_tree_is_what_a_heap_pops(kind: str, size: tuple[int, int, int]):
    nodes, depth, width = size
    batch = 20
    quarters = LAWS[kind](np.random.default_rng(nodes), (batch, depth, width))
    logp_BTR = (-np.sort(-quarters / 4, axis=-1)).astype(np.float32)
    tree = jax.device_get(pop_best(BestFirstTree(*size), logp_BTR))
    for b in range(batch):
        want = pushed_and_popped(logp_BTR[b], nodes)
        real = len(want) + 1
        assert tree.valid_BN[b].tolist() == [n < real for n in range(nodes)]
        found = zip(tree.parent_BN[b, 1:real], tree.token_BN[b, 1:real], tree.score_BN[b, 1:real], strict=True)
        assert [*found] == want
        assert all(tree.parent_BN[b, n] < n for n in range(nodes)) and (tree.parent_BN[b, real:] == ROOT).all()
        assert (tree.score_BN[b, real:] == -np.inf).all()
        above = tree.parent_BN[b, 1:real]
        np.testing.assert_array_equal(tree.depth_BN[b, 1:real], tree.depth_BN[b, above] + 1)
        np.testing.assert_array_equal(tree.ancestors_BNN[b], brute_ancestors(tree.parent_BN[b]))


@pytest.mark.parametrize("nodes", [2, 7, 16, 40])
def test_a_best_first_tree_holds_the_likeliest_of_all_paths(nodes: int):
    """Under the laws of the depths, made of logits in the library's own way."""
    depth, width, vocab, batch = 3, 3, 6, 8
    distributions = np.random.default_rng(nodes).normal(0, 2, (depth, batch, vocab)).astype(np.float32)
    tables = [
        np.broadcast_to(distribution[:, None], (batch, vocab**d, vocab)) for d, distribution in enumerate(distributions)
    ]
    tree = jax.device_get(grow_jitted(BestFirstTree(nodes, depth, width), tables))
    logp = [step[:, 0] for step in log_probabilities(tables)]
    for b in range(batch):
        tokens = [best(list(step[b]), width) for step in logp]
        paths = [p for d in range(1, depth + 1) for p in itertools.product(*tokens[:d])]
        scores = {p: sum(logp[d][b, t] for d, t in enumerate(p)) for p in paths}
        likeliest = sorted(paths, key=lambda p: -scores[p])[: nodes - 1]
        assert set(node_paths(tree, b)) == {(), *likeliest}
        np.testing.assert_allclose(tree.score_BN[b, 1:], [scores[p] for p in likeliest], rtol=1e-5)


def test_where_children_depend_on_the_node_a_best_first_tree_takes_those_along_the_likeliest_chain():
    tables = path_tables(6, 4, 4, 3)
    a, b = (jax.device_get(grow_jitted(tree, tables)) for tree in (BestFirstTree(5, 4, 1), chain(4)))
    for x, y in zip(a[:-1], b[:-1], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def brute_ancestors(parent: np.ndarray) -> np.ndarray:
    mask = np.eye(len(parent), dtype=bool)
    for n in range(len(parent)):
        above = parent[n]
        while above != ROOT:
            mask[n, above] = True
            above = parent[above]
    return mask


POLICIES: list[TreePolicy] = [
    chain(0),
    chain(1),
    chain(5, rows=8),
    StaticTree(parse_paths(EAGLE1_PATHS)),
    StaticTree(((0,), (2,), (2, 1), (2, 1, 0), (2, 1, 3)), rows=9),
    DynamicTree(1, 1, 1),
    DynamicTree(6, 5, 1),
    DynamicTree(11, 4, 3),
    DynamicTree(30, 6, 3),
    BestFirstTree(1, 1, 1),
    BestFirstTree(20, 4, 3),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_attention_mask_is_the_nodes_and_their_ancestors(policy: TreePolicy):
    tree = jax.device_get(grow_jitted(policy, path_tables(1, 5, policy.depth, 3)))
    assert tree.token_BN.shape == (3, policy.nodes)
    assert tree.depth_BN.max() <= policy.depth
    for b in range(3):
        np.testing.assert_array_equal(tree.ancestors_BNN[b], brute_ancestors(tree.parent_BN[b]))
        assert all(tree.parent_BN[b, n] < n for n in range(policy.nodes))
        assert tree.ancestors_BNN[b, tree.valid_BN[b], 0].all()


class WatchedDrafter(NamedTuple):
    """A drafter that notes the frontiers it drafts from."""

    draft: Callable[..., Any]
    seen: list[tuple]
    """Tokens, parents and visible slots of each frontier."""
    places: list[tuple]
    """Depth and first slot of each frontier."""

    def __call__(self, scratch: Any, frontier: Frontier) -> Any:
        self.seen.append((frontier.token_BW, frontier.parent_BW, frontier.visible_BWM))
        self.places.append((frontier.depth, frontier.slot))
        return self.draft(scratch, frontier)


def frontiers(policy: TreePolicy, places: list[tuple], tables: Tables) -> list[tuple]:
    """Returns the frontiers of a tree, and appends their places to `places`."""
    watched = WatchedDrafter(draft_from(tables), [], places)
    scratch = jnp.full((2, policy.slots), -1)
    policy.grow(watched, likely, scratch, jnp.asarray(tables[0])[:, 0], jnp.zeros(2, jnp.int32))
    return watched.seen


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_level_sees_its_drafted_ancestors_and_itself(policy: TreePolicy):
    """Slots are filled in order, and a node's visible slots hold exactly the prefixes of its path."""
    depths_and_slots: list[tuple] = []
    grown = jax.jit(functools.partial(frontiers, policy, depths_and_slots))
    found = jax.device_get(grown(path_tables(2, 5, policy.depth, 2)))
    paths: list[list[tuple[int, ...]]] = [[], []]
    for level, (token_BW, parent_BW, visible_BWM) in enumerate(found, start=1):
        begin = len(paths[0])
        assert depths_and_slots[level - 1] == (level, begin)
        for b in range(2):
            for token, parent in zip(token_BW[b], parent_BW[b], strict=True):
                paths[b].append((*(() if parent == ROOT else paths[b][parent]), int(token)))
        for b in range(2):
            assert len({*paths[b]}) == len(paths[b])
            for path, visible in zip(paths[b][begin:], visible_BWM[b], strict=True):
                assert len(path) == level
                assert visible.tolist() == [path[: len(p)] == p for p in paths[b]]
    assert len(paths[0]) == policy.slots


@pytest.mark.parametrize("paths", [EAGLE1_PATHS, "0 1 2 00 02 10 020", "3 1 30 31 310 3100"])
def test_a_static_tree_holds_the_ranked_tokens_of_its_paths(paths: str):
    policy = StaticTree(parse_paths(paths))
    tables = path_tables(4, 5, policy.depth, 2)
    logp = log_probabilities(tables)
    tree = jax.device_get(grow_jitted(policy, tables))
    for b in range(2):
        want = {}
        for ranks in sorted(policy.paths, key=len):
            above, score = want[ranks[:-1]] if ranks[:-1] else ((), 0.0)
            step = logp[len(above)][b, code_of(above, 5)]
            token = best(list(step), 5)[ranks[-1]]
            want[ranks] = ((*above, token), score + step[token])
        scores = dict(zip(node_paths(tree, b), tree.score_BN[b], strict=True))
        assert set(scores) == {(), *(p for p, _ in want.values())}
        for path, score in want.values():
            np.testing.assert_allclose(scores[path], score, rtol=1e-5)


def test_eagle_1s_tree_has_its_25_drafts_in_five_levels_and_15_leaves():
    policy = StaticTree(parse_paths(EAGLE1_PATHS))
    lengths = [len(p) for p in policy.paths]
    inner = {p[:-1] for p in policy.paths} - {()}
    assert policy.nodes == 26
    assert [lengths.count(d) for d in range(1, 7)] == [4, 8, 8, 3, 2, 0]
    assert [sum(len(p) == d for p in inner) for d in range(1, 6)] == [4, 4, 1, 1, 0]
    assert len(set(policy.paths) - inner) == 15 and policy.slots == len(inner)


def test_a_chain_is_the_greedy_path():
    tables = path_tables(6, 4, 4, 3)
    tree = jax.device_get(grow_jitted(chain(4), tables))
    np.testing.assert_array_equal(tree.parent_BN, np.broadcast_to(np.arange(-1, 4), (3, 5)))
    for b in range(3):
        path: tuple[int, ...] = ()
        for d in range(4):
            path = (*path, int(np.argmax(tables[d][b, code_of(path, 4)])))
        assert tuple(tree.token_BN[b, 1:]) == path


def test_a_chain_is_a_beam_of_one():
    tables = path_tables(8, 5, 4, 3)
    for x, y in zip(grow_jitted(chain(4), tables)[:-1], grow_jitted(DynamicTree(5, 4, 1), tables)[:-1], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_a_tree_without_drafts_calls_no_drafter():
    refuse = Mock(side_effect=AssertionError("drafted"))
    for policy in (chain(0), chain(1), DynamicTree(1, 1, 2), DynamicTree(3, 1, 2), BestFirstTree(3, 1, 2)):
        tree = jax.jit(lambda root, p=policy: p.grow(refuse, likely, None, jnp.ones((2, 4)), root))(jnp.array([3, 1]))
        assert tree.token_BN[:, 0].tolist() == [3, 1] and tree.token_BN.shape == (2, policy.nodes)


def test_padding_rows_are_invalid_and_see_only_themselves():
    tables = path_tables(1, 5, 2, 2)
    bare, padded = (jax.device_get(grow_jitted(chain(2, rows=r), tables)) for r in (0, 7))
    for name in ("token_BN", "parent_BN", "depth_BN", "score_BN"):
        np.testing.assert_array_equal(getattr(padded, name)[:, :3], getattr(bare, name))
    assert not padded.valid_BN[:, 3:].any() and (padded.score_BN[:, 3:] == -np.inf).all()
    assert (padded.ancestors_BNN[:, 3:] == np.eye(7, dtype=bool)[3:]).all()
    assert (padded.parent_BN[:, 3:] == ROOT).all()


ROUND_TRIPS = [
    "none",
    "chain:1",
    "chain:4",
    "static:0,1,00,01",
    "static:1,10",
    "static:0,12.,12.0,12.11",
    "static:0,15.",
    "dynamic:60x6x10",
    "dynamic:8x3x3",
    "best_first:60x4x10",
    "best_first:9x15x2",
    "lookup:7",
    "lookup:15+dynamic:16x4x4",
]


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_a_tree_reads_back_what_it_writes(text: str):
    tree = parse_tree(text)
    assert tree.spec == text
    assert parse_tree(tree.spec) == tree


def test_tree_names_stand_for_the_papers_trees():
    assert parse_tree("static:eagle1") == StaticTree(parse_paths(EAGLE1_PATHS))
    assert parse_tree("dynamic") == DynamicTree(60, 6, 10)
    assert parse_tree("best_first") == BestFirstTree(60, 4, 10)
    assert parse_tree(" none ") == chain(0)
    assert parse_tree(parse_tree("static:eagle1").spec) == parse_tree("static:eagle1")


@pytest.mark.parametrize(
    "text",
    [
        "", "tree", "chain", "chain:", "chain:-1", "chain:x", "chain:²", "none:3", "static", "static:", "static:00",
        "static:0,0", "static:a", "static:0..1", "static:.", "dynamic:60x6", "dynamic:8x3x3x3", "dynamic:8x3x3xfoo",
        "dynamic:8x-3x3", "dynamic:0x3x3", "dynamic:100x2x3",
        "best_first:60x4", "best_first:8x3xw", "best_first:0x3x3", "best_first:14x2x3", "best:8x3x3",
        "lookup", "lookup:", "lookup:0", "lookup:x", "lookup:7+", "lookup:7+chain:3", "lookup:3+dynamic:99x2x3",
    ],
)  # fmt: skip
def test_a_tree_that_cannot_be_is_refused(text: str):
    with pytest.raises(ValueError, match=r"tree|beam"):
        parse_tree(text)


@pytest.mark.parametrize(
    "text",
    [
        "chain:1025", "chain:999999999", "dynamic:1025x9x40", "dynamic:60x99999x10", "dynamic:60x1000x1000",
        "best_first:60x999999999x10", "best_first:1025x9x9", "lookup:1000000", "lookup:7+dynamic:60x5000x10",
    ],
)  # fmt: skip
def test_a_huge_tree_is_refused_before_it_is_made(text: str):
    with pytest.raises(ValueError, match=r"is too large, the most is (1,024|65,536)"):
        parse_tree(text)


def test_a_pool_smaller_than_the_tree_is_refused():
    DynamicTree(nodes=13, depth=2, beam=3)
    with pytest.raises(ValueError, match="12 nodes, fewer than the 13 wanted"):
        DynamicTree(nodes=14, depth=2, beam=3)
    BestFirstTree(nodes=13, depth=2, width=3)
    with pytest.raises(ValueError, match="12 nodes below its root, fewer than the 13 wanted"):
        BestFirstTree(nodes=14, depth=2, width=3)


@pytest.mark.parametrize("policy", [DynamicTree(4, 2, 6), BestFirstTree(4, 2, 6), StaticTree(((0,), (5,)))], ids=str)
def test_a_rank_beyond_the_draft_vocabulary_is_refused(policy: TreePolicy):
    with pytest.raises(ValueError, match="vocabulary of 5"):
        grow(policy, path_tables(0, 5, 2))


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="rows=3"):
        chain(3, rows=3)


def test_medusas_tree_has_its_63_nodes_by_depth_and_every_parent():
    tree = parse_tree("static:medusa")
    assert isinstance(tree, StaticTree) and (tree.nodes, tree.depth) == (64, 4)
    assert [sum(len(path) == d for path in tree.paths) for d in (1, 2, 3, 4)] == [10, 28, 23, 2]


@pytest.mark.parametrize(
    ("depth", "cut"), [(4, "best_first:60x4x10"), (2, "best_first:60x2x10"), (1, "best_first:11x1x10")]
)
def test_a_best_first_tree_is_cut_to_a_depth(depth: int, cut: str):
    assert cut_tree(parse_tree("best_first:60x4x10"), depth).spec == cut
