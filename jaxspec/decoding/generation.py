"""Whole generations: the compiled programs, their sizes, and what comes back to the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.decoding.metrics import block_efficiency
from jaxspec.decoding.requests import Requests, round_up
from jaxspec.decoding.rounds import RUNNING, DecodeState, Engine, Weights, decode_rounds, prefill
from jaxspec.trees import chain

FINISH_REASONS = ("running", "stop", "length")
"""What `DecodeState.finish_B` counts through."""


NO_LIMIT = np.int32(np.iinfo(np.int32).max)
"""Of rounds."""


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
    return block_efficiency(tokens, calls)


_prefill = jax.jit(prefill, static_argnames=("engine", "capacity", "slots"))


run_rounds = jax.jit(decode_rounds, static_argnames="engine", donate_argnames="state")


def run_prefill(engine: Engine, weights: Weights, requests: Requests, capacity: int, slots: int) -> DecodeState:
    """`prefill`, compiled once for all trees: reading a prompt does not depend on what will be drafted."""
    reader = Engine(engine.target, engine.drafter, None if engine.tree is None else chain(0))
    state = _prefill(reader, weights, requests, capacity, slots)
    return state._replace(accepted_BP=jnp.zeros((requests.length_B.shape[0], engine.path), jnp.int32))


def sizes(engine: Engine, width: int, max_new: int) -> tuple[int, int]:
    """Cache capacity and output slots that a batch needs, from its padded prompt length and largest budget.

    The last path whose rows still matter is read with at most `max_new - 4` tokens behind the prompt in the target's
    cache, one more in that of a drafter which reads the first token too, and all `P` rows of it are written:
    `max_new + P` slots hold more than that. The output needs them, for it may take `P` tokens behind the last kept one.
    Prompts of up to 128 tokens share one capacity, and so the program of the rounds.
    """
    slots = round_up(max_new + engine.path)
    return round_up(width, 128) + slots, slots


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
