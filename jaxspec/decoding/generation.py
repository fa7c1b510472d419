"""Whole generations: the two compiled programs, the sizes of their arrays, and the answers on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.decoding.answers import Answer
from jaxspec.decoding.requests import Requests, round_up
from jaxspec.decoding.rounds import (
    RUNNING,
    DecodeState,
    Engine,
    Weights,
    begin_policy,
    decode_rounds,
    prefill,
)
from jaxspec.trees import chain

FINISH_REASONS = ("running", "stop", "length")
"""Names of the values of `DecodeState.finish_B`."""
NO_LIMIT = np.int32(np.iinfo(np.int32).max)
"""A number of rounds that no generation reaches."""

_prefill = jax.jit(prefill, static_argnames=("engine", "capacity", "slots"))
run_rounds = jax.jit(decode_rounds, static_argnames="engine", donate_argnames="state")


def generate(engine: Engine, weights: Weights, requests: Requests) -> list[Answer]:
    """Decodes every row to its end and returns its answers: one prefill program, then one program for all rounds."""
    return collect(run_rounds(engine, weights, start(engine, weights, requests), NO_LIMIT))


def generate_plain(engine: Engine, weights: Weights, requests: Requests, *, rows: int = 1) -> list[Answer]:
    """Decodes the same requests with the same target, one token a call: the baseline.

    `rows` is the width of its matmuls: 1 is ordinary decoding. At a tree's node count they are as wide as the
    verifier's, so fp32 tokens can be compared exactly.
    """
    # Rows of a matmul are bit-identical only between programs with as many rows; the cache is sized for the engine, so
    # that attention sums in the same order too.
    plain, target = dataclasses.replace(engine, drafter=None, tree=None, rows=rows), Weights(weights.target)
    return collect(run_rounds(plain, target, start(plain, target, requests, sized_for=engine), NO_LIMIT))


def stream(engine: Engine, weights: Weights, requests: Requests, *, rounds: int = 8) -> Iterator[list[Answer]]:
    """Decodes in steps of `rounds` rounds, one call of the same compiled program each.

    Yields the answers so far, first those of prefill's tokens; the last ones are whole.
    """
    state = start(engine, weights, requests)
    while True:
        answers = collect(state)
        yield answers
        if all(answer.finish != FINISH_REASONS[RUNNING] for answer in answers):
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
    """Returns the prefilled state of a batch, in arrays of the sizes it needs.

    Batches share their programs if they give one `max_new_tokens`, at least the largest budget. `sized_for` takes the
    sizes that another engine would need.
    """
    longest = max_new_tokens or int(np.max(np.asarray(requests.budget_B)))
    return run_prefill(engine, weights, requests, *sizes(sized_for or engine, requests.tokens_BL.shape[1], longest))


def run_prefill(engine: Engine, weights: Weights, requests: Requests, capacity: int, slots: int) -> DecodeState:
    """Runs `prefill`, compiled once for all trees."""
    # Reading a prompt does not depend on what will be drafted, so a chain without nodes stands for every tree.
    reader = Engine(engine.target, engine.drafter, None if engine.tree is None else chain(0))
    state = _prefill(reader, weights, requests, capacity, slots)
    # Made of the state's own zeros, so that it lies where the state lies: `run_rounds` would be compiled again for its
    # own result if fresh zeros, bound to no device, came in beside weights that are.
    nothing_BP = jnp.broadcast_to(state.calls_B[:, None], (requests.length_B.shape[0], engine.path))
    return state._replace(accepted_BP=nothing_BP, policy=begin_policy(engine, state.calls_B))


def sizes(engine: Engine, width: int, max_new: int) -> tuple[int, int]:
    """Returns the cache capacity and output slots that a batch needs, from its padded prompt length and largest budget.

    Prompts of up to 128 tokens share one capacity, and so the program of the rounds.
    """
    # The last path whose rows still matter is read with at most `max_new - 4` tokens behind the prompt in the target's
    # cache, one more in that of a drafter which reads the first token too, and all `P` rows of it are written:
    # `max_new + P` slots hold more than that. The output takes up to `P` tokens behind the last one that is kept.
    slots = round_up(max_new + engine.path)
    return round_up(width, 128) + slots, slots


def collect(state: DecodeState) -> list[Answer]:
    """Returns the rows of a state as answers on the host."""
    output, given_by, drafted, produced, finish, calls, accepted = jax.device_get(
        (
            *(state.output_BO, state.call_BO, state.drafted_BO2),
            *(state.produced_B, state.finish_B, state.calls_B, state.accepted_BP),
        )
    )
    reasons = [FINISH_REASONS[f] for f in finish]
    tokens, call_of, drafted_of = (
        [row[:n] for row, n in zip(rows, count, strict=True)]
        for rows, count in ((output, produced), (given_by, produced), (drafted, calls))
    )
    return [Answer(*row) for row in zip(tokens, reasons, calls.tolist(), accepted, call_of, drafted_of, strict=True)]
