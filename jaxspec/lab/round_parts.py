"""The parts of a round as programs of fixed sizes, over a state that stands in for a decoded one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import ROOT, Array, Frontier, TreePolicy
from jaxspec.decoding.requests import Requests
from jaxspec.decoding.rounds import (
    DecodeState,
    Engine,
    Weights,
    accept,
    children,
    commit,
    decode_step,
    score,
    shared_tables,
)
from jaxspec.evaluation.stand_ins import plain_view, stand_in_tree
from jaxspec.lab.costs import CostRow
from jaxspec.lab.row_steps import RowSteps
from jaxspec.sampling import Sampling
from jaxspec.serving.loading import Models
from jaxspec.trees.static import StaticTree

CHILDREN = 8
"""Children that are chosen of every expanded node."""
REFERENCE_WIDTH, REFERENCE_DEPTH, REFERENCE_NODES = 4, 3, 16
"""The round that parts are held against: chains side by side, padded to a number of nodes."""
PADDED_ROWS = 8
"""Rows that plain decoding is padded to as well: one row alone compiles to another kind of program."""
Step = Callable[[Weights, DecodeState, Any, Array], tuple[DecodeState, Any]]
"""`(weights, state, given, zero) -> (state, outputs)`. `zero` is an int32 that the compiler does not know to be 0."""


class Point(NamedTuple):
    """A part of a round and its sizes, as in `CostRow`; `round` and `commit` are whole parts of their own."""

    part: str
    nodes: int
    width: int
    batch: int
    context: int

    def row(self, source: str, device: str, seconds: float) -> CostRow:
        """Returns its row."""
        return CostRow(source, device, *self, seconds)


class PartProgram(NamedTuple):
    """A part of a round as a program."""

    step: Step
    given: Any
    """Shapes of its further arguments."""


class Grid(NamedTuple):
    """Sizes at which the parts of a round are priced."""

    nodes: tuple[int, ...]
    widths: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    paths: tuple[int, ...] = (2, 4, 8)
    """Nodes of accepted paths."""
    steps: RowSteps = RowSteps()
    """Of rows, by which the device's costs rise; where they rise unevenly, more nodes than asked for are verified."""

    @property
    def room(self) -> int:
        """Slots of the cache behind the committed tokens: those of the longest path."""
        return max(PADDED_ROWS, *self.paths, REFERENCE_DEPTH + 1)

    def places(self) -> list[tuple[int, int]]:
        """Returns every batch with every context."""
        return [(batch, context) for batch in self.batches for context in self.contexts]

    def points(self, engine: Engine, batch: int, context: int) -> list[Point]:
        """Returns the parts to price at one batch and context, those of the reference round first."""
        found = [("plain", 1, 0), ("plain", PADDED_ROWS, 0)]
        if engine.tree is not None:
            found += [("verify", engine.tree.nodes, 0), ("extend", engine.path, 0)]
            found += [("draft", 1, w) for w in reference_widths(engine)[:1]]
            found += [("extend", n, 0) for n in self.paths]
            found += [("draft", 1, w) for w in self.widths if engine.tree.depth > 1]
        found += [("verify", n, 0) for n in self.steps.with_jumps(self.nodes, batch)]
        return [Point(part, n, w, batch, context) for part, n, w in dict.fromkeys(found)]


def reference_tree(deepest: int | None) -> StaticTree:
    """Returns the tree of the round that parts are held against, for a drafter that drafts so deep (None: any)."""
    depth = REFERENCE_DEPTH if deepest is None else min(REFERENCE_DEPTH, deepest)
    paths = [(c, *(0,) * (d - 1)) for d in range(1, depth + 1) for c in range(REFERENCE_WIDTH)]
    return StaticTree(tuple(paths), REFERENCE_NODES)


def reference_widths(engine: Engine) -> list[int]:
    """Returns the width of each level that the reference round drafts below the root's children, and pays for."""
    if engine.tree is None or engine.drafter is None:
        return []
    levels = [REFERENCE_WIDTH] * (engine.tree.depth - 1)
    return levels[:1] if engine.drafter.one_pass else levels


def reference_parts(engine: Engine, batch: int, context: int) -> list[Point]:
    """Returns the parts of the reference round, each as often as the round has it; `rest` is what they leave of it."""
    assert engine.tree is not None
    whole = [("extend", engine.path, 0), ("verify", engine.tree.nodes, 0)]
    levels = [("draft", 1, width) for width in reference_widths(engine)]
    return [Point(*part, batch, context) for part in (*whole, *levels)]


def compared_round(engine: Engine, seconds: dict[Point, float], batch: int, context: int) -> dict[str, Any] | None:
    """Returns the reference round and the sum of its parts at one batch and context; None where one is missing."""
    whole, parts = seconds.get(Point("round", 1, 0, batch, context)), reference_parts(engine, batch, context)
    if whole is None or any(part not in seconds for part in parts):
        return None
    total = sum(seconds[part] for part in parts)
    return {"batch": batch, "context": context, "round_seconds": whole, "parts_seconds": total}


def branched_tree(nodes: int, deepest: int | None) -> StaticTree:
    """Returns a tree of `nodes` nodes whose parents have three children each, or more where it would be too deep."""
    branches = 3
    while True:
        paths: list[tuple[int, ...]] = [()]
        for i in range(1, nodes):
            paths.append((*paths[(i - 1) // branches], (i - 1) % branches))
        if deepest is None or max(map(len, paths)) <= deepest or branches >= nodes:
            return StaticTree(tuple(paths[1:]))
        branches *= 2


class PartPrograms:
    """The programs of a round's parts, for one engine with the reference tree, or without a drafter.

    `sampling` makes the programs know how rows sample; else that is an argument, and all branches stay in.
    """

    def __init__(self, models: Models, sampling: Callable[[int], Sampling] | None = None) -> None:
        self.models, self.engine, self.weights, self.sampling = models, models.engine, models.weights, sampling
        plain = models.plain()
        self.plain = plain.engine

    def program(self, point: Point, state: DecodeState) -> PartProgram:
        """Returns the program of a part; `state` has arrays or shapes."""
        make = {
            "plain": self._plain,
            "verify": self._verify,
            "draft": self._draft,
            "extend": self._extend,
            "commit": self._commit,
            "round": self._round,
        }[point.part]
        found = make(point, state)
        if self.sampling is None:
            return found
        return found._replace(step=functools.partial(_sampling_known, found.step, self.sampling(point.batch)))

    def _plain(self, point: Point, state: DecodeState) -> PartProgram:
        return PartProgram(functools.partial(_plain_step, dataclasses.replace(self.plain, rows=point.nodes)), ())

    def _round(self, point: Point, state: DecodeState) -> PartProgram:
        return PartProgram(functools.partial(_round_step, self.engine), ())

    def _verify(self, point: Point, state: DecodeState) -> PartProgram:
        tree = jax.eval_shape(lambda: stand_in_tree(point.batch, point.nodes, self.models.config.vocab))
        engine = self.engine
        if engine.drafter is not None:
            engine = dataclasses.replace(engine, tree=branched_tree(point.nodes, engine.drafter.deepest))
        return PartProgram(functools.partial(_verify_step, engine), tree)

    def _draft(self, point: Point, state: DecodeState) -> PartProgram:
        drafter: Any = self.engine.drafter
        batch, width = point.batch, point.width
        slots = 2 * width if drafter.deepest is None else max(2 * width, drafter.deepest)
        scratch = jax.eval_shape(functools.partial(drafter.scratch, slots=slots), state.draft)
        given = (
            jax.ShapeDtypeStruct((batch, width), jnp.int32),
            jax.ShapeDtypeStruct((batch, width, 2 * width), jnp.bool_),
            scratch,
        )
        return PartProgram(functools.partial(_draft_step, self.engine), given)

    def _extend(self, point: Point, state: DecodeState) -> PartProgram:
        read = self._scored(point, state).read_BND
        features = jax.ShapeDtypeStruct((point.batch, point.nodes, read.shape[-1]), read.dtype)
        given = (jax.ShapeDtypeStruct((point.batch, point.nodes), jnp.int32), features)
        return PartProgram(functools.partial(_extend_step, self.engine), given)

    def _commit(self, point: Point, state: DecodeState) -> PartProgram:
        scored = self._scored(point, state)
        tree = self._tree_shapes(point.batch)
        accepted = jax.eval_shape(functools.partial(accept, self.engine), state, tree, scored.logits_BNV)
        return PartProgram(_commit_step, (scored.fresh, accepted))

    def _tree_shapes(self, batch: int) -> Any:
        nodes = 1 if self.engine.tree is None else self.engine.tree.nodes
        return jax.eval_shape(lambda: stand_in_tree(batch, nodes, self.models.config.vocab))

    def _scored(self, point: Point, state: DecodeState) -> Any:
        call = functools.partial(score, self.engine)
        return jax.eval_shape(call, self.weights, state, self._tree_shapes(point.batch))


def given_arrays(program: PartProgram, point: Point, vocab: int, fill: Callable[[Any], Any]) -> Any:
    """Returns arrays for the program's further arguments; `fill` makes those whose values do not matter."""
    if point.part == "verify":
        return stand_in_tree(point.batch, point.nodes, vocab)
    if point.part != "draft":
        return fill(program.given)
    width = point.width
    token_BW = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32) % vocab, (point.batch, width))
    # A level's nodes see themselves and nothing else of the tree.
    visible_BWM = jnp.broadcast_to(jnp.eye(width, 2 * width, width, dtype=bool), (point.batch, width, 2 * width))
    return token_BW, visible_BWM, fill(program.given[2])


def _sampling_known(
    step: Step, sampling: Sampling, weights: Weights, state: DecodeState, given: Any, zero: Array
) -> tuple[DecodeState, Any]:
    """Runs `step` with settings of sampling that are constants of the program, and leaves the state's as they are."""
    asked = state.requests
    after, outputs = step(weights, _with_requests(state, asked._replace(sampling=sampling)), given, zero)
    return _with_requests(after, asked), outputs


def _with_requests(state: DecodeState, requests: Requests) -> DecodeState:
    return state._replace(requests=requests)


def _again(state: DecodeState, after: DecodeState) -> DecodeState:
    """Returns `after` with as many committed and written tokens as `state`, so that the round can be run again."""
    draft = after.draft
    if draft is not None:
        draft = draft._replace(length_B=state.draft.length_B)
    counters = ("length_B", "produced_B", "finish_B", "calls_B", "accepted_BP")
    return after._replace(draft=draft, **{name: getattr(state, name) for name in counters})


def _plain_step(
    engine: Engine, weights: Weights, state: DecodeState, given: Any, zero: Array
) -> tuple[DecodeState, Any]:
    plain = plain_view(state)
    after = decode_step(engine, Weights(weights.target), plain._replace(root_B=plain.root_B + zero))
    return state._replace(cache=after.cache, root_B=after.root_B, output_BO=after.output_BO), after.root_B


def _round_step(
    engine: Engine, weights: Weights, state: DecodeState, given: Any, zero: Array
) -> tuple[DecodeState, Any]:
    after = decode_step(engine, weights, state._replace(root_B=state.root_B + zero))
    return _again(state, after), after.root_B


def _verify_step(
    engine: Engine, weights: Weights, state: DecodeState, tree: Any, zero: Array
) -> tuple[DecodeState, Any]:
    tree = tree._replace(token_BN=tree.token_BN + zero)
    scored = score(engine, weights, state, tree)
    accepted = accept(engine, state, tree, scored.logits_BNV)
    return state, (scored.fresh, scored.read_BND, accepted)


def _draft_step(
    engine: Engine, weights: Weights, state: DecodeState, given: Any, zero: Array
) -> tuple[DecodeState, Any]:
    drafter: Any = engine.drafter
    token_BW, visible_BWM, scratch = given
    width, shared = token_BW.shape[1], shared_tables(engine, weights)
    parent_BW = jnp.full(token_BW.shape, ROOT, jnp.int32)
    frontier = Frontier(token_BW + zero, parent_BW, visible_BWM, 2, width)
    logits_BWV, scratch = drafter.expand(weights.drafter, shared, state.draft, scratch, frontier)
    count = min(CHILDREN, logits_BWV.shape[-1])
    return state, (children(engine, weights, state)(logits_BWV, count, width), scratch)


def _extend_step(
    engine: Engine, weights: Weights, state: DecodeState, given: Any, zero: Array
) -> tuple[DecodeState, Any]:
    drafter: Any = engine.drafter
    token_BP, features_BPD = given
    count_B = jnp.full(token_BP.shape[0], token_BP.shape[1])
    shared = shared_tables(engine, weights)
    draft, logits_BV = drafter.extend(weights.drafter, shared, state.draft, token_BP + zero, features_BPD, count_B)
    chosen = children(engine, weights, state)(logits_BV[:, None], min(CHILDREN, logits_BV.shape[-1]), ROOT)
    after = state._replace(draft=draft, root_logits_BV=logits_BV)
    return _again(state, after), chosen


def _commit_step(weights: Weights, state: DecodeState, given: Any, zero: Array) -> tuple[DecodeState, Any]:
    fresh, accepted = given
    after = commit(state, fresh, accepted._replace(token_BP=accepted.token_BP + zero))
    return _again(state, after), after.root_B


def sampling_at(temperature: float, batch: int) -> Sampling:
    """Returns the settings of rows at a temperature, drawing from the whole distribution."""
    zeros = jnp.zeros(batch)
    return Sampling(zeros + temperature, zeros.astype(jnp.int32), zeros + 1, jnp.zeros(batch, jnp.uint32))


def with_reference(models: Models) -> Models:
    """Returns models with the reference tree, where they draft."""
    if models.engine.drafter is None:
        return models
    tree: TreePolicy = reference_tree(models.engine.drafter.deepest)
    return models.with_tree(tree)
