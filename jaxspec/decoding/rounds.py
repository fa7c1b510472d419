"""Decoding as pure functions: prefill, then rounds of grow -> score -> accept -> extend -> commit in one loop."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec import verify
from jaxspec.base import (
    Array,
    Cache,
    Children,
    ChooseChildren,
    Drafter,
    DraftMode,
    KVCache,
    Params,
    SharedTables,
    Target,
    TargetOutput,
    Tree,
    TreePolicy,
)
from jaxspec.decoding.ragged import Reading, score_ragged
from jaxspec.decoding.requests import LAST_PARTS, Requests, count_chunks
from jaxspec.decoding.seen_tree import SeenTree, see
from jaxspec.nn import cache as kv
from jaxspec.parallel.mesh import constrain_tree
from jaxspec.parallel.rows import scatter_rows
from jaxspec.sampling import draw, round_noise
from jaxspec.trees.adaptive import AdaptiveTree, Drafting, PolicyState, RoundPlan
from jaxspec.trees.children import drawn, over_whole_vocabulary
from jaxspec.trees.shape import root_alone

RUNNING, STOPPED, LENGTH = 0, 1, 2
"""Values of `DecodeState.finish_B`: the row goes on, has ended on a stop id, or at its budget of new tokens."""
CHUNK = 512
"""Tokens of a prompt that are read at once, so that memory does not grow with the square of a prompt."""
DRAFTING = 2**16
"""First use of a round's noise for drafting (see `sampling.round_noise`); each expanded node's slot has its own."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """The models, tree and rule that decode: static to `jit`, so one engine is one set of compiled programs.

    Without a drafter (and tree) it decodes plainly, `rows` tokens wide: 1 is ordinary decoding; the node count of a
    tree makes every matmul as wide as verification's, so that fp32 results compare bit for bit. Raises ValueError where
    drafter, tree, mode and rule do not go together.
    """

    target: Target
    drafter: Drafter | None = None
    tree: TreePolicy | None = None
    rows: int = 1
    mode: DraftMode = "topk"
    """How the children of a tree's nodes are chosen; the tree and the rule must be for that."""
    rule: verify.Rule = verify.RULES["target-draw"]
    """Which drafted tokens are kept."""

    def __post_init__(self) -> None:
        if (self.drafter is None) != (self.tree is None):
            raise ValueError("a drafter and a tree come together: give both, or neither for plain decoding")
        if self.tree is not None and self.drafter is not None:
            looks_up = isinstance(self.tree, AdaptiveTree) and self.tree.lookup is not None
            if looks_up and not getattr(self.drafter, "looks_up", False):
                raise ValueError(
                    f"the tree {getattr(self.tree, 'spec', '')} has a looked-up branch, and the drafter looks nothing "
                    "up: take PromptLookup(drafter)"
                )
            self.rule.check(self.mode, self.tree)
            if isinstance(self.tree, AdaptiveTree) and self.tree.ragged and self.rule.name != "target-draw":
                raise ValueError(f"a ragged adaptive tree is for the rule target-draw, not {self.rule.name}: take that")
            if self.mode not in self.tree.modes:
                name = getattr(self.tree, "spec", self.tree)
                raise ValueError(
                    f"the tree {name} is for children drafted by {' or '.join(self.tree.modes)}, not {self.mode}: take "
                    f"the draft mode {self.tree.modes[0]}, or another tree"
                )
            deepest = self.drafter.deepest
            if deepest is not None and self.tree.depth > deepest:
                raise ValueError(
                    f"the tree is {self.tree.depth} deep and the drafter drafts {deepest} tokens ahead: take a tree of "
                    f"depth {deepest} or less, such as chain:{deepest}"
                )

    @property
    def path(self) -> int:
        """Most tokens a round can add: `P = T + 1`."""
        return 1 if self.tree is None else self.tree.depth + 1


class DraftVocab(NamedTuple):
    """The tokens that a drafter scores, where it does not score all.

    It changes the speed and not the text: the accepted tokens are the target's draws from its whole vocabulary.
    """

    token_U: Array
    """Their ids, ascending."""
    head_UD: Array
    """Their rows of the LM head."""


class Weights(NamedTuple):
    """The parameters of an engine's models."""

    target: Params
    drafter: Params = None
    vocab: DraftVocab | None = None
    """None: the drafter scores every token."""


class DecodeState(NamedTuple):
    """The arrays that a generation carries from round to round."""

    requests: Requests
    """Without the prompts: they have been read, and the rounds' program does not depend on their padded width."""
    cache: Cache
    length_B: Array
    """Tokens committed to the target's cache: all but the root."""
    root_B: Array
    """The newest token: already emitted, not yet read by the target."""
    draft: Any
    """The drafter's state; None when decoding plainly."""
    root_logits_BV: Array | None
    """Draft logits of the root's children."""
    output_BO: Array
    call_BO: Array
    """Number of the target call that gave each token of the output; 0 for prefill."""
    produced_B: Array
    finish_B: Array
    calls_B: Array
    """Target calls spent on the row, prefill not counted."""
    accepted_BP: Array
    """Rounds in which the row accepted 0, 1, .. T drafted tokens."""
    drafted_BO2: Array
    """Of each target call behind prefill, as in `SeenTree.drafted_B2`."""
    policy: PolicyState | None = None
    """Of an adaptive tree; None with any other."""


def shared_tables(engine: Engine, weights: Weights) -> SharedTables:
    """Returns the target's tables as the drafter reads them: of a draft vocabulary its rows of the LM head."""
    tables = engine.target.shared_tables(weights.target)
    return tables if weights.vocab is None else tables._replace(head_VD=weights.vocab.head_UD)


def prefill(engine: Engine, weights: Weights, requests: Requests, capacity: int, slots: int) -> DecodeState:
    """Reads the prompts, draws each row's first token, and lets the drafter read the same; returns the rounds' state.

    Prompts wider than `CHUNK` are read a chunk at a time, the last ones of a quarter of it, up to the `bucket` of the
    longest prompt. `capacity` is the cache's slots a row, more than the padded width, and `slots` the output's; see
    `generation.sizes`. Raises ValueError for a padded width above `CHUNK` that is no multiple of that quarter.
    """
    batch, width = requests.tokens_BL.shape
    chunk = min(width, CHUNK)
    narrow = chunk // LAST_PARTS
    if width > chunk and width % narrow:
        raise ValueError(f"prompts are padded to {width:,} tokens, which is not a multiple of {narrow}: use `bucket`")
    read = functools.partial(_read_chunk, engine, weights, requests)
    draft = None
    if engine.drafter is not None:
        first_B, shared = requests.tokens_BL[:, 0], shared_tables(engine, weights)
        draft = engine.drafter.init_state(weights.drafter, shared, first_B, capacity)
    # Behind a barrier, or XLA spends seconds folding the drafter's attention over an empty cache into a constant.
    empty = jax.lax.optimization_barrier((engine.target.empty_cache(batch, capacity), draft))
    reading = read(chunk, 0, PrefillState(empty[0], empty[1], None, jnp.zeros(batch, jnp.int32)))
    if width > chunk:
        wide, last = count_chunks(jnp.max(requests.length_B), width, chunk)
        reading = jax.lax.fori_loop(1, wide, lambda i, state: read(chunk, i * chunk, state), reading)
        behind = wide * chunk
        reading = jax.lax.fori_loop(0, last, lambda i, state: read(narrow, behind + i * narrow, state), reading)
    state = DecodeState(
        requests=requests._replace(tokens_BL=requests.tokens_BL[:, :0]),
        cache=reading.cache,
        length_B=requests.length_B,
        root_B=reading.root_B,
        draft=reading.draft,
        root_logits_BV=reading.root_logits_BV,
        output_BO=jnp.zeros((batch, slots), jnp.int32),
        call_BO=jnp.zeros((batch, slots), jnp.int32),
        produced_B=jnp.zeros(batch, jnp.int32),
        finish_B=jnp.zeros(batch, jnp.int32),
        calls_B=jnp.zeros(batch, jnp.int32),
        accepted_BP=jnp.zeros((batch, engine.path), jnp.int32),
        drafted_BO2=jnp.zeros((batch, slots, 2), jnp.int32),
        policy=begin_policy(engine, jnp.zeros(batch, jnp.int32)),
    )
    return emit(state, reading.root_B[:, None], jnp.ones(batch, jnp.int32))


def begin_policy(engine: Engine, zeros_B: Array) -> PolicyState | None:
    """Returns the state of an engine's adaptive tree before the first round, made of the rows' zeros; else None."""
    return engine.tree.begin(zeros_B) if isinstance(engine.tree, AdaptiveTree) else None


class PrefillState(NamedTuple):
    """The state behind the chunks of the prompts that are read."""

    cache: Cache
    draft: Any
    root_logits_BV: Array | None
    root_B: Array
    """The first new token of rows whose prompt has been read to its end."""


def _read_chunk(
    engine: Engine, weights: Weights, requests: Requests, chunk: int, begin: int | Array, reading: PrefillState
) -> PrefillState:
    """Returns the state after `chunk` tokens more; the first ones, `begin` 0 as an int, have nothing before them."""
    batch = len(requests.tokens_BL)
    next_BL = jnp.pad(requests.tokens_BL[:, 1:], ((0, 0), (0, 1)))
    tokens_BL, next_BL = (jax.lax.dynamic_slice_in_dim(x, begin, chunk, 1) for x in (requests.tokens_BL, next_BL))
    count_B = jnp.clip(requests.length_B - begin, 0, chunk)
    positions_BL = jnp.broadcast_to(begin + jnp.arange(chunk), (batch, chunk))
    causal = jnp.tril(jnp.ones((1, chunk, chunk), bool))
    start_B = jnp.full(batch, begin, jnp.int32)
    prefix = None if isinstance(begin, int) else (reading.cache, start_B)
    out = engine.target.forward(weights.target, tokens_BL, positions_BL, causal, prefix, keep_kv=True)
    last_B = jnp.maximum(count_B - 1, 0)
    last_B1D = jnp.take_along_axis(out.features_BLD, last_B[:, None, None], axis=1)
    logits_B1V = engine.target.logits(weights.target, last_B1D)
    drawn_B = draw(logits_B1V, jnp.zeros((batch, 1), jnp.int32), requests.length_B, 1, requests.sampling)[:, 0]
    ends_B = (requests.length_B > begin) & (requests.length_B <= begin + chunk)
    cache = kv.commit(reading.cache, _fresh(out), start_B, drawn_B)
    root_B = jnp.where(ends_B, drawn_B, reading.root_B)
    if engine.drafter is None:
        return reading._replace(cache=cache, root_B=root_B)
    next_BL = jnp.where(ends_B[:, None] & (jnp.arange(chunk) == last_B[:, None]), drawn_B[:, None], next_BL)
    draft, root_logits_BV = engine.drafter.extend(
        weights.drafter, shared_tables(engine, weights), reading.draft, next_BL, out.read_BLD, count_B
    )
    return PrefillState(cache, draft, root_logits_BV, root_B)


def emit(state: DecodeState, token_BP: Array, count_B: Array) -> DecodeState:
    """Appends each row's first `count` tokens, cut behind a stop id or at the budget; finished rows add nothing."""
    running_B = state.finish_B == RUNNING
    is_stop_BP = jnp.any(token_BP[:, :, None] == state.requests.stop_BR[:, None, :], axis=-1)
    index_P = jnp.arange(token_BP.shape[1])
    is_stop_BP &= index_P < count_B[:, None]
    to_stop_B = jnp.where(jnp.any(is_stop_BP, axis=1), jnp.argmax(is_stop_BP, axis=1) + 1, token_BP.shape[1] + 1)
    room_B = state.requests.budget_B - state.produced_B
    kept_B = jnp.where(running_B, jnp.minimum(jnp.minimum(count_B, to_stop_B), room_B), 0)
    # Slots behind the kept tokens take garbage that the next round overwrites; `sizes` leaves room for the last one.
    at_BP = state.produced_B[:, None] + index_P
    output_BO = scatter_rows(state.output_BO, at_BP, token_BP)
    call_BO = scatter_rows(state.call_BO, at_BP, jnp.broadcast_to(state.calls_B[:, None], at_BP.shape))
    stopped_B = running_B & (kept_B == to_stop_B)
    full_B = running_B & (kept_B == room_B)
    finish_B = jnp.where(stopped_B, STOPPED, jnp.where(full_B, LENGTH, state.finish_B))
    produced_B = state.produced_B + kept_B
    return state._replace(output_BO=output_BO, call_BO=call_BO, produced_B=produced_B, finish_B=finish_B)


class Scored(NamedTuple):
    """The target's outputs at the nodes of a tree."""

    fresh: KVCache
    """The nodes' own keys and values, not in the cache yet."""
    read_BND: Array
    """Features, or auxiliary hidden states, that the drafter reads."""
    logits_BNV: Array
    """fp32."""


def decode_step(engine: Engine, weights: Weights, state: DecodeState) -> DecodeState:
    """Runs one round: grow the tree, score it, accept a path, extend the drafter, commit the path."""
    return finish_round(engine, weights, state, check_round(engine, weights, state))


class Checked(NamedTuple):
    """The path that a round accepts, and what the target put out at the nodes that it goes through."""

    accepted: verify.Accepted
    fresh: KVCache
    read_BND: Array
    seen: SeenTree
    policy: PolicyState | None = None


def check_round(engine: Engine, weights: Weights, state: DecodeState) -> Checked:
    """Grows the round's tree, scores it and accepts a path."""
    if isinstance(engine.tree, AdaptiveTree):
        return check_as_planned(engine, engine.tree, weights, state)
    tree = grow(engine, weights, state)
    scored = score(engine, weights, state, tree)
    accepted = accept(engine, state, tree, scored.logits_BNV)
    return Checked(accepted, scored.fresh, scored.read_BND, see(tree, accepted, tree.token_BN.shape[1]))


def finish_round(engine: Engine, weights: Weights, state: DecodeState, checked: Checked) -> DecodeState:
    """Lets the drafter read the accepted path, and commits it."""
    state = state._replace(policy=checked.policy)
    if engine.drafter is not None:
        draft, root_logits_BV = extend(engine, weights, state, checked.read_BND, checked.accepted)
        # A row that has ended writes behind its last call.
        drafted_BO2 = scatter_rows(state.drafted_BO2, state.calls_B[:, None], checked.seen.drafted_B2[:, None])
        state = state._replace(draft=draft, root_logits_BV=root_logits_BV, drafted_BO2=drafted_BO2)
    return commit(state, checked.fresh, checked.accepted)


def check_as_planned(engine: Engine, tree: AdaptiveTree, weights: Weights, state: DecodeState) -> Checked:
    """Drafts as deep as pays, then scores and accepts within the budget that pays: one of a few compiled branches."""
    running_B = state.finish_B == RUNNING
    assert state.policy is not None
    plan = tree.plan(_drafting(engine, weights, state), state.policy, running_B)

    def check(nodes: int, plan: RoundPlan) -> Checked:
        if tree.ragged and 1 < nodes < tree.nodes and len(running_B) > 1:
            cut = tree.cut_ragged(plan, nodes, running_B)
            read = Reading(state.cache, state.length_B, state.requests.sampling)
            fresh, read_BND, accepted = score_ragged(engine.target, weights.target, read, cut, nodes, tree.depth)
        else:
            cut = tree.cut(plan, nodes)  # of likeliest children, without distributions
            fresh, read_BND, logits_BNV = score(engine, weights, state, cut)
            accepted = accept(engine, state, cut, logits_BNV)
        # The path alone leaves the branch, in arrays of one shape for all budgets; its nodes are numbered by depth.
        read_BPD = jnp.take_along_axis(read_BND, accepted.path_BP[:, :, None], axis=1)
        depth_BP = jnp.broadcast_to(jnp.arange(engine.path), accepted.path_BP.shape)
        fresh, seen = kv.take_rows(fresh, accepted.path_BP), see(cut, accepted, tree.nodes)
        return Checked(accepted._replace(path_BP=depth_BP), fresh, read_BPD, seen)

    # One number for all rows: an index for each row would compute every branch.
    checked = jax.lax.switch(plan.index, [functools.partial(check, n) for n in tree.budgets], plan)
    accepted = checked.accepted
    learned = tree.learn(state.policy, plan, accepted.token_BP, accepted.count_B, running_B)
    return checked._replace(policy=learned)


def grow(engine: Engine, weights: Weights, state: DecodeState) -> Tree:
    """Returns the round's draft tree: `engine.tree` calls the drafter's `expand` once a level."""
    if engine.tree is None or engine.drafter is None:
        return root_alone(state.root_B, engine.rows)
    tree = engine.tree.grow(*_drafting(engine, weights, state))
    if weights.vocab is None:
        return tree
    return over_whole_vocabulary(tree, weights.vocab.token_U, len(engine.target.shared_tables(weights.target).embed_VD))


def _drafting(engine: Engine, weights: Weights, state: DecodeState) -> Drafting:
    """Returns the arguments of `TreePolicy.grow` in this round."""
    assert engine.drafter is not None and engine.tree is not None and state.root_logits_BV is not None
    draft = functools.partial(engine.drafter.expand, weights.drafter, shared_tables(engine, weights), state.draft)
    scratch = engine.drafter.scratch(state.draft, engine.tree.slots)
    return Drafting(draft, children(engine, weights, state), scratch, state.root_logits_BV, state.root_B)


def children(engine: Engine, weights: Weights, state: DecodeState) -> ChooseChildren:
    """Returns how this round's children are chosen: at each row's draft temperature, with noise of this round."""
    noise = functools.partial(_draft_noise, state.requests.sampling.seed_B, state.length_B)
    choose, vocab = drawn(engine.mode, state.requests.draft_temperature_B, noise), weights.vocab
    if vocab is None:
        return choose

    def choose_in_whole(logits_BWV: Array, count: int, slot: int) -> Children:
        found = choose(logits_BWV, count, slot)
        return found._replace(token_BWR=vocab.token_U[found.token_BWR])

    return choose_in_whole


def _draft_noise(seed_B: Array, length_B: Array, slot: int, shape: tuple[int, ...]) -> Array:
    """The `Noise` of one round: Gumbel draws `[B, *shape]` for the node in scratch slot `slot`."""
    return round_noise(seed_B, length_B, DRAFTING + 1 + slot, functools.partial(jax.random.gumbel, shape=shape))


def score(engine: Engine, weights: Weights, state: DecodeState, tree: Tree) -> Scored:
    """Runs the target once on all nodes of a tree.

    All nodes see the committed prefix, so attention needs the ancestor mask `[B, N, N]` and each row's length only.
    """
    positions_BN = state.length_B[:, None] + tree.depth_BN
    prefix = (state.cache, state.length_B)
    out = engine.target.forward(weights.target, tree.token_BN, positions_BN, tree.ancestors_BNN, prefix, keep_kv=True)
    return Scored(_fresh(out), out.read_BLD, engine.target.logits(weights.target, out.features_BLD))


def accept(engine: Engine, state: DecodeState, tree: Tree, logits_BNV: Array) -> verify.Accepted:
    """Returns the path that the engine's rule keeps; decoding plainly, the target's draw behind the root.

    By the rule `target-draw` the target draws its own token at every node, with noise keyed by (seed, position), and
    the path of nodes that carry the drawn tokens is kept: every kept token is the one of plain decoding.
    """
    sampling = state.requests.sampling
    if engine.tree is None:
        nothing_B1 = tree.depth_BN[:, :1]
        drawn_B1 = draw(logits_BNV[:, :1], nothing_B1, state.length_B + 1, 1, sampling)
        return verify.Accepted(nothing_B1[:, 0], nothing_B1, drawn_B1)
    return engine.rule.accept(
        verify.VerifyInputs(engine.mode, tree, engine.tree.depth, logits_BNV, state.length_B, sampling)
    )


def extend(
    engine: Engine, weights: Weights, state: DecodeState, read_BND: Array, accepted: verify.Accepted
) -> tuple[Any, Array]:
    """Lets the drafter read the accepted path; returns its state, and the draft logits of the new root's children."""
    assert engine.drafter is not None
    read_BPD = jnp.take_along_axis(read_BND, accepted.path_BP[:, :, None], axis=1)
    shared, added_B = shared_tables(engine, weights), _added(state, accepted)
    return engine.drafter.extend(weights.drafter, shared, state.draft, accepted.token_BP, read_BPD, added_B)


def commit(state: DecodeState, fresh: KVCache, accepted: verify.Accepted) -> DecodeState:
    """Writes the accepted path to the cache and its tokens to the output; finished rows stay as they are."""
    running_B = state.finish_B == RUNNING
    token_BP, path = accepted.token_BP, state.accepted_BP.shape[1]
    took_BP = (jnp.arange(path) == accepted.count_B[:, None]) & running_B[:, None]
    # A fixed number of rows is written; `length_B` says how many count, and the next round overwrites the rest. The
    # newest token orders the write behind the round's reads, or XLA copies the whole cache (see `cache.commit`).
    state = state._replace(
        cache=kv.commit(state.cache, kv.take_rows(fresh, accepted.path_BP), state.length_B, token_BP[:, -1]),
        length_B=state.length_B + _added(state, accepted),
        root_B=jnp.where(running_B, token_BP[:, -1], state.root_B),
        calls_B=state.calls_B + running_B,
        accepted_BP=state.accepted_BP + took_BP,
    )
    return emit(state, token_BP, accepted.count_B + 1)


def _added(state: DecodeState, accepted: verify.Accepted) -> Array:
    """Returns the tokens that each row commits this round: its root and the drafted ones it accepted."""
    return jnp.where(state.finish_B == RUNNING, accepted.count_B + 1, 0)


def _fresh(out: TargetOutput) -> KVCache:
    assert out.fresh is not None
    return out.fresh


def decode_rounds(
    engine: Engine, weights: Weights, state: DecodeState, limit: Array, least: Array | int = 0
) -> DecodeState:
    """Runs rounds until at most `least` rows are running or `limit` are done: one `while_loop`, no host in it."""

    def going(carry: tuple[Array, DecodeState]) -> Array:
        return (carry[0] < limit) & (jnp.sum(carry[1].finish_B == RUNNING) > least)

    def round_(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        return carry[0] + 1, decode_step(engine, weights, carry[1])

    return constrain_tree(jax.lax.while_loop(going, round_, (jnp.int32(0), state))[1])
