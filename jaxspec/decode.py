"""Decoding: prefill, then whole generations of draft -> verify -> accept -> commit rounds as one fused XLA program."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import cache as kv
from jaxspec import verify
from jaxspec.base import Array, Borrowed, Drafter, Frontier, KVCache, Params, Target, TargetOutput, Tree, TreePolicy
from jaxspec.sampling import Sampling, draw
from jaxspec.trees import chain

RUNNING, STOPPED, LENGTH = 0, 1, 2
"""Why a row ended: not yet, on a stop id, or at its budget of new tokens."""
FINISH_REASONS = ("running", "stop", "length")
NO_STOP = -1
"""Padding of a row's stop ids."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """What decodes: static to `jit`, so one engine is one set of compiled programs.

    Without a drafter (and tree) it decodes plainly, `rows` tokens wide: 1 is ordinary decoding; the node count of a
    tree makes every matmul as wide as verification's, so that fp32 results compare bit for bit.
    """

    target: Target
    drafter: Drafter | None = None
    tree: TreePolicy | None = None
    rows: int = 1

    def __post_init__(self) -> None:
        if (self.drafter is None) != (self.tree is None):
            raise ValueError("a drafter and a tree come together: give both, or neither for plain decoding")

    @property
    def path(self) -> int:
        """Most tokens a round can add: `P = T + 1`."""
        return 1 if self.tree is None else self.tree.depth + 1


class DraftVocab(NamedTuple):
    """The tokens that a drafter scores, where it does not score all: drafting reads the head's rows at every node.

    It changes what is drafted and so the speed; what is accepted are the target's own draws from its whole vocabulary.
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


class Requests(NamedTuple):
    """A batch of prompts, padded on the right, and how each row decodes."""

    tokens_BL: Array
    length_B: Array
    sampling: Sampling
    stop_BR: Array
    """Ids that end a row (and are its last token), padded with `NO_STOP`."""
    budget_B: Array
    """Most new tokens of each row, at least 1."""


class DecodeState(NamedTuple):
    """Everything a generation carries from round to round."""

    requests: Requests
    """Without the prompts: they are read, and rounds do not depend on how wide they were padded."""
    cache: KVCache
    length_B: Array
    """Tokens committed to the target's cache: all but the root."""
    root_B: Array
    """The newest token: already emitted, not yet read by the target."""
    draft: Any
    """The drafter's state; None when decoding plainly."""
    root_logits_BV: Array | None
    """Draft logits of the root's children."""
    output_BO: Array
    produced_B: Array
    finish_B: Array
    calls_B: Array
    """Target calls spent on the row, prefill not counted."""
    accepted_BP: Array
    """Rounds in which the row accepted 0, 1, .. T drafted tokens."""


class Generation(NamedTuple):
    """The finished rows of a batch, on the host."""

    tokens: list[np.ndarray]
    """New tokens of each row; a stop id is included."""
    finish: list[str]
    calls: np.ndarray
    accepted: np.ndarray
    """`[B, P]` rounds by accept length."""

    @property
    def tau(self) -> float:
        """Tokens per target call, bonus tokens included; the prefill call and the token it gives are not counted."""
        return tau(sum(len(t) for t in self.tokens) - len(self.tokens), int(self.calls.sum()))


def tau(tokens: int, calls: int) -> float:
    """Tokens per target call; 0 where no round was needed."""
    return tokens / calls if calls else 0.0


def borrowed(engine: Engine, weights: Weights) -> Borrowed:
    """The target's tables as the drafter reads them."""
    tables = engine.target.borrowed(weights.target)
    return tables if weights.vocab is None else tables._replace(head_VD=weights.vocab.head_UD)


def prefill(engine: Engine, weights: Weights, requests: Requests, capacity: int, slots: int) -> DecodeState:
    """Read the prompts, draw each row's first token, and let the drafter read the same.

    `capacity` is the cache's slots a row, `slots` the output's; see `sizes`.
    """
    batch, width = requests.tokens_BL.shape
    positions_BL = jnp.broadcast_to(jnp.arange(width), (batch, width))
    causal = jnp.tril(jnp.ones((1, width, width), bool))
    out = engine.target.forward(weights.target, requests.tokens_BL, positions_BL, causal, keep_kv=True)
    start_B = jnp.zeros(batch, jnp.int32)
    cache = kv.commit(engine.target.empty_cache(batch, capacity), _fresh(out), start_B)
    last_BLD = jnp.take_along_axis(out.features_BLD, requests.length_B[:, None, None] - 1, axis=1)
    logits_BLV = engine.target.logits(weights.target, last_BLD)
    root_B = draw(logits_BLV, jnp.zeros((batch, 1), jnp.int32), requests.length_B, 1, requests.sampling)[:, 0]
    draft, root_logits_BV = None, None
    if engine.drafter is not None:
        # Behind a barrier, or XLA spends seconds folding the attention over an empty cache into a constant.
        empty = jax.lax.optimization_barrier(engine.drafter.init_state(batch, capacity))
        next_BL = jnp.pad(requests.tokens_BL[:, 1:], ((0, 0), (0, 1)))
        next_BL = next_BL.at[jnp.arange(batch), requests.length_B - 1].set(root_B)
        draft, root_logits_BV = engine.drafter.extend(
            weights.drafter,
            borrowed(engine, weights),
            empty,
            next_BL,
            out.features_BLD,
            requests.length_B,
        )
    state = DecodeState(
        requests=requests._replace(tokens_BL=requests.tokens_BL[:, :0]),
        cache=cache,
        length_B=requests.length_B,
        root_B=root_B,
        draft=draft,
        root_logits_BV=root_logits_BV,
        output_BO=jnp.zeros((batch, slots), jnp.int32),
        produced_B=jnp.zeros(batch, jnp.int32),
        finish_B=jnp.zeros(batch, jnp.int32),
        calls_B=jnp.zeros(batch, jnp.int32),
        accepted_BP=jnp.zeros((batch, engine.path), jnp.int32),
    )
    return emit(state, root_B[:, None], jnp.ones(batch, jnp.int32))


def emit(state: DecodeState, token_BP: Array, count_B: Array) -> DecodeState:
    """Append each row's first `count` tokens, cut behind a stop id or at the budget; finished rows add nothing."""
    running_B = state.finish_B == RUNNING
    is_stop_BP = jnp.any(token_BP[:, :, None] == state.requests.stop_BR[:, None, :], axis=-1)
    index_P = jnp.arange(token_BP.shape[1])
    is_stop_BP &= index_P < count_B[:, None]
    to_stop_B = jnp.where(jnp.any(is_stop_BP, axis=1), jnp.argmax(is_stop_BP, axis=1) + 1, token_BP.shape[1] + 1)
    room_B = state.requests.budget_B - state.produced_B
    kept_B = jnp.where(running_B, jnp.minimum(jnp.minimum(count_B, to_stop_B), room_B), 0)
    rows = jnp.arange(token_BP.shape[0])[:, None]
    # Slots behind the kept tokens take garbage that the next round overwrites; `sizes` leaves room for the last one.
    output_BO = state.output_BO.at[rows, state.produced_B[:, None] + index_P].set(token_BP)
    stopped_B = running_B & (kept_B == to_stop_B)
    full_B = running_B & (kept_B == room_B)
    finish_B = jnp.where(stopped_B, STOPPED, jnp.where(full_B, LENGTH, state.finish_B))
    return state._replace(output_BO=output_BO, produced_B=state.produced_B + kept_B, finish_B=finish_B)


class Scored(NamedTuple):
    """What the target makes of a tree: its nodes' keys and values, features, and fp32 logits."""

    fresh: KVCache
    features_BND: Array
    logits_BNV: Array


def decode_step(engine: Engine, weights: Weights, state: DecodeState) -> DecodeState:
    """One round: grow the tree, score it, follow the target's draws, commit the path, extend the drafter."""
    tree = grow(engine, weights, state)
    scored = score(engine, weights, state, tree)
    accepted = accept(engine, state, tree, scored.logits_BNV)
    if engine.drafter is not None:
        draft, root_logits_BV = extend(engine, weights, state, scored.features_BND, accepted)
        state = state._replace(draft=draft, root_logits_BV=root_logits_BV)
    return commit(state, scored.fresh, accepted)


def grow(engine: Engine, weights: Weights, state: DecodeState) -> Tree:
    """The tree of a round; decoding plainly the root, and rows of padding that nothing sees behind it."""
    if engine.tree is None or engine.drafter is None:
        token_BN = jnp.zeros((state.root_B.shape[0], engine.rows), jnp.int32).at[:, 0].set(state.root_B)
        nothing = jnp.zeros_like(token_BN)
        alone_BNN = jnp.broadcast_to(jnp.eye(engine.rows, dtype=bool), (*token_BN.shape, engine.rows))
        root_BN = jnp.broadcast_to(jnp.arange(engine.rows) == 0, token_BN.shape)
        return Tree(token_BN, nothing - 1, nothing, nothing.astype(jnp.float32), root_BN, alone_BNN)
    drafter, lent, vocab = engine.drafter, borrowed(engine, weights), weights.vocab

    def draft(scratch: Any, frontier: Frontier) -> tuple[Array, Any]:
        if vocab is not None:
            frontier = frontier._replace(token_BW=vocab.token_U[frontier.token_BW])
        return drafter.expand(weights.drafter, lent, state.draft, scratch, frontier)

    assert state.root_logits_BV is not None
    scratch = drafter.scratch(state.draft, engine.tree.slots)
    tree = engine.tree.grow(draft, scratch, state.root_logits_BV, state.root_B)
    if vocab is None:
        return tree
    return tree._replace(token_BN=vocab.token_U[tree.token_BN].at[:, 0].set(state.root_B))


def score(engine: Engine, weights: Weights, state: DecodeState, tree: Tree) -> Scored:
    """The target's one call on all nodes of a tree."""
    positions_BN = state.length_B[:, None] + tree.depth_BN
    prefix = (state.cache, state.length_B)
    out = engine.target.forward(weights.target, tree.token_BN, positions_BN, tree.ancestors_BNN, prefix, keep_kv=True)
    return Scored(_fresh(out), out.features_BLD, engine.target.logits(weights.target, out.features_BLD))


def accept(engine: Engine, state: DecodeState, tree: Tree, logits_BNV: Array) -> verify.Accepted:
    """The target's draws, and the path that carries them."""
    depth_BN = tree.depth_BN
    if engine.tree is None:
        logits_BNV, depth_BN = logits_BNV[:, :1], depth_BN[:, :1]
    drawn_BN = draw(logits_BNV, depth_BN, state.length_B + 1, engine.path, state.requests.sampling)
    if engine.tree is None:
        return verify.Accepted(depth_BN[:, 0], depth_BN, drawn_BN)
    return verify.follow(tree, drawn_BN, engine.tree.depth)


def extend(
    engine: Engine, weights: Weights, state: DecodeState, features_BND: Array, accepted: verify.Accepted
) -> tuple[Any, Array]:
    """The drafter takes in the accepted path: its new state, and the logits of the new root's children."""
    assert engine.drafter is not None
    features_BPD = jnp.take_along_axis(features_BND, accepted.path_BP[:, :, None], axis=1)
    return engine.drafter.extend(
        weights.drafter,
        borrowed(engine, weights),
        state.draft,
        accepted.token_BP,
        features_BPD,
        _added(state, accepted),
    )


def commit(state: DecodeState, fresh: KVCache, accepted: verify.Accepted) -> DecodeState:
    """The accepted path written to the cache and its tokens to the output; finished rows stay as they are."""
    running_B = state.finish_B == RUNNING
    token_BP, path = accepted.token_BP, state.accepted_BP.shape[1]
    took_BP = (jnp.arange(path) == accepted.count_B[:, None]) & running_B[:, None]
    state = state._replace(
        cache=kv.commit(state.cache, kv.take_rows(fresh, accepted.path_BP), state.length_B, token_BP[:, -1]),
        length_B=state.length_B + _added(state, accepted),
        root_B=jnp.where(running_B, token_BP[:, -1], state.root_B),
        calls_B=state.calls_B + running_B,
        accepted_BP=state.accepted_BP + took_BP,
    )
    return emit(state, token_BP, accepted.count_B + 1)


def _added(state: DecodeState, accepted: verify.Accepted) -> Array:
    """Tokens that each row commits this round: its root and what it accepted behind it."""
    return jnp.where(state.finish_B == RUNNING, accepted.count_B + 1, 0)


def _fresh(out: TargetOutput) -> KVCache:
    assert out.fresh is not None
    return out.fresh


def decode_rounds(engine: Engine, weights: Weights, state: DecodeState, limit: Array) -> DecodeState:
    """Rounds until every row has finished or `limit` of them are done: one `while_loop`, no host in it."""

    def going(carry: tuple[Array, DecodeState]) -> Array:
        return (carry[0] < limit) & jnp.any(carry[1].finish_B == RUNNING)

    def round_(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        return carry[0] + 1, decode_step(engine, weights, carry[1])

    return jax.lax.while_loop(going, round_, (jnp.int32(0), state))[1]


_prefill = jax.jit(prefill, static_argnames=("engine", "capacity", "slots"))
run_rounds = jax.jit(decode_rounds, static_argnames="engine", donate_argnames="state")


def run_prefill(engine: Engine, weights: Weights, requests: Requests, capacity: int, slots: int) -> DecodeState:
    """`prefill`, compiled once for all trees: reading a prompt does not depend on what will be drafted."""
    reader = dataclasses.replace(engine, tree=None if engine.tree is None else chain(0), rows=1)
    state = _prefill(reader, weights, requests, capacity, slots)
    return state._replace(accepted_BP=jnp.zeros((requests.length_B.shape[0], engine.path), jnp.int32))


NO_LIMIT = np.int32(np.iinfo(np.int32).max)


def bucket(length: int, least: int = 16) -> int:
    """The padded size of a prompt of `length`: powers of two from `least` to `32 * least`, then multiples of half that.

    Few sizes, so few programs that read prompts.
    """
    size = least
    while size < length and size < 32 * least:
        size *= 2
    return size if size >= length else round_up(length, 16 * least)


def round_up(length: int, step: int = 64) -> int:
    """The least multiple of `step` that holds `length`."""
    return -(-length // step) * step


def sizes(engine: Engine, width: int, max_new: int) -> tuple[int, int]:
    """Cache capacity and output slots that a batch needs, from its padded prompt length and largest budget.

    The last round of a row may write a whole path behind its last kept token, so both leave `P` slots. Prompts of up
    to 128 tokens share one capacity, and so the program of the rounds.
    """
    slots = round_up(max_new + engine.path)
    return round_up(width, 128) + slots, slots


def make_requests(
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] | Sequence[Sequence[int]] = (),
    vocab: int | None = None,
) -> Requests:
    """A batch from prompts of any lengths. A single setting holds for all rows.

    Raises ValueError naming the row and field for an empty prompt, a token outside `vocab`, or a setting out of range.
    """
    batch = len(prompts)
    if not batch:
        raise ValueError("no prompts given: pass at least one")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: give at least one token")
        if min(prompt) < 0 or (vocab is not None and max(prompt) >= vocab):
            raise ValueError(f"prompt {i} has a token outside the target's vocabulary of {vocab}")

    def one_each(name: str, count: int) -> None:
        if count not in (1, batch):
            raise ValueError(f"{name} has {count} values for {batch} prompts: give one for all, or one for each")

    def each(name: str, value: Any, dtype: Any, low: float, high: float) -> np.ndarray:
        one_each(name, np.size(value))
        row = np.broadcast_to(np.asarray(value), (batch,))
        for i, v in enumerate(row):
            if not low <= v <= high:
                raise ValueError(f"{name}={v} of row {i} is outside [{low}, {high}]")
        return row.astype(dtype)

    one_list = all(isinstance(s, (int, np.integer)) for s in stop_ids)
    stops: list[Any] = [stop_ids] if one_list else list(stop_ids)
    one_each("stop_ids", len(stops))
    stops *= batch // len(stops)
    stop_BR = np.full((batch, max(1, *(len(s) for s in stops))), NO_STOP, np.int32)
    for row, stop in zip(stop_BR, stops, strict=True):
        row[: len(stop)] = stop
    width = bucket(max(len(p) for p in prompts))
    tokens_BL = np.zeros((batch, width), np.int32)
    for row, prompt in zip(tokens_BL, prompts, strict=True):
        row[: len(prompt)] = prompt
    infinite, most = float("inf"), np.iinfo(np.int32).max
    return Requests(
        jnp.asarray(tokens_BL),
        jnp.asarray([len(p) for p in prompts], jnp.int32),
        Sampling(
            jnp.asarray(each("temperature", temperature, np.float32, 0, infinite)),
            jnp.asarray(each("top_k", top_k, np.int32, 0, most)),
            jnp.asarray(each("top_p", top_p, np.float32, 1e-9, 1)),
            jnp.asarray(each("seed", seed, np.uint32, 0, 2**32 - 1)),
        ),
        jnp.asarray(stop_BR),
        jnp.asarray(each("max_new_tokens", max_new_tokens, np.int32, 1, most)),
    )


class Chunk(NamedTuple):
    """What some rounds added, on the host."""

    added: list[np.ndarray]
    """The new tokens of each row since the last chunk."""
    generation: Generation
    """Everything so far."""


def stream(engine: Engine, weights: Weights, requests: Requests, *, rounds: int = 8) -> Iterator[Chunk]:
    """Decode in chunks of `rounds` rounds, one call of the same compiled program each; yields what each added."""
    state = start(engine, weights, requests)
    seen = np.zeros(requests.length_B.shape[0], np.int64)
    while True:
        generation = collect(state)
        added = [t[n:] for t, n in zip(generation.tokens, seen, strict=True)]
        seen = np.array([len(t) for t in generation.tokens])
        yield Chunk(added, generation)
        if all(f != FINISH_REASONS[RUNNING] for f in generation.finish):
            return
        state = run_rounds(engine, weights, state, np.int32(rounds))


def start(
    engine: Engine,
    weights: Weights,
    requests: Requests,
    *,
    max_new_tokens: int | None = None,
    sized_for: Engine | None = None,
) -> DecodeState:
    """Prefill with the sizes the batch needs.

    Batches share their programs if they give one `max_new_tokens`, at least the largest budget. `sized_for` takes the
    sizes that another engine would need.
    """
    longest = max_new_tokens or int(np.max(np.asarray(requests.budget_B)))
    return run_prefill(engine, weights, requests, *sizes(sized_for or engine, requests.tokens_BL.shape[1], longest))


def collect(state: DecodeState) -> Generation:
    """A state's rows as host arrays."""
    output, produced, finish, calls, accepted = jax.device_get(
        (state.output_BO, state.produced_B, state.finish_B, state.calls_B, state.accepted_BP)
    )
    tokens = [row[:n] for row, n in zip(output, produced, strict=True)]
    return Generation(tokens, [FINISH_REASONS[f] for f in finish], calls, accepted)


def generate(engine: Engine, weights: Weights, requests: Requests) -> Generation:
    """Decode every row to its end: one prefill program, then one program for all rounds."""
    return collect(run_rounds(engine, weights, start(engine, weights, requests), NO_LIMIT))


def generate_plain(engine: Engine, weights: Weights, requests: Requests, *, rows: int = 1) -> Generation:
    """The baseline: the same target and requests, one token a call.

    `rows` is the width of its matmuls: 1 is ordinary decoding. With a tree's node count, rows of a matmul are
    bit-identical to the verifier's and fp32 outputs can be compared exactly; the cache is as large as the engine's, so
    that attention sums in the same order too.
    """
    plain, target = dataclasses.replace(engine, drafter=None, tree=None, rows=rows), Weights(weights.target)
    return collect(run_rounds(plain, target, start(plain, target, requests, sized_for=engine), NO_LIMIT))
