"""Slots: rows of one running batch, each of which takes the next request when its answer is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Array, Cache
from jaxspec.decoding.answers import Answer
from jaxspec.decoding.generation import NO_LIMIT, collect, run_prefill, run_rounds, sizes
from jaxspec.decoding.requests import Request, blank_requests, bucket, make_requests, round_up
from jaxspec.decoding.rounds import (
    CHUNK,
    RUNNING,
    STOPPED,
    DecodeState,
    Engine,
    Weights,
    check_round,
    finish_round,
    prefill,
)
from jaxspec.decoding.seen_tree import SeenTree
from jaxspec.parallel.mesh import constrain_tree


def vacant(engine: Engine, weights: Weights, batch: int, capacity: int, slots: int, stops: int) -> DecodeState:
    """Returns a state of `batch` finished rows, for `admit` to fill; `stops` is the width of the rows' stop ids."""
    requests = blank_requests(batch, stops)
    shapes = jax.eval_shape(lambda w, r: prefill(engine, w, r, capacity, slots), weights, requests)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return constrain_tree(state._replace(finish_B=jnp.full(batch, STOPPED, jnp.int32)))


def admit(state: DecodeState, fresh: DecodeState, row: Array) -> DecodeState:
    """Returns the state with its row `row` replaced by `fresh`, a state of one row whose caches may be smaller."""

    def replace_row(into: Any, one: Any) -> Any:
        if isinstance(into, Cache):
            places = [(0, row, *(0,) * (x.ndim - 2)) for x in into]
            return into._make(map(jax.lax.dynamic_update_slice, into, one, places))
        return jax.lax.dynamic_update_slice(into, one, (row, *(0,) * (into.ndim - 1)))

    return constrain_tree(jax.tree.map(replace_row, state, fresh, is_leaf=lambda x: isinstance(x, Cache)))


class RoundRecord(NamedTuple):
    """One round of a running batch, for those who follow its answers."""

    token_BP: Any
    """Tokens that it added to the rows; the first `added_B` count."""
    added_B: Any
    """0 for rows that had ended."""
    accepted_B: Any
    """Drafted tokens that were accepted, those behind the end of an answer too."""
    finish_B: Any
    tree: SeenTree


def recorded_round(engine: Engine, weights: Weights, state: DecodeState) -> tuple[DecodeState, RoundRecord]:
    """Runs one round, as `rounds.decode_step`, and returns the state with the record of it."""
    checked = check_round(engine, weights, state)
    after = constrain_tree(finish_round(engine, weights, state, checked))
    added_B, accepted = after.produced_B - state.produced_B, checked.accepted
    return after, RoundRecord(accepted.token_BP, added_B, accepted.count_B, after.finish_B, checked.seen)


_recorded = jax.jit(recorded_round, static_argnames="engine", donate_argnames="state")
_vacant = jax.jit(vacant, static_argnames=("engine", "batch", "capacity", "slots", "stops"))
_admit = jax.jit(admit, donate_argnames="state")


class Slots:
    """Rows of one running batch that take a new request whenever one of them has finished, without compiling anew.

    `longest` is the longest prompt's tokens, `max_new_tokens` the largest budget and `stops` the most stop ids there
    will be. Rounds are one program; a prompt is read by one of a few, by its padded width, or by as many as there are
    `widths`. What a row sees does not depend on its neighbours, so its answer is the one it would have alone.
    """

    def __init__(
        self,
        engine: Engine,
        weights: Weights,
        count: int,
        *,
        longest: int,
        max_new_tokens: int,
        stops: int,
        widths: Sequence[int] = (),
    ) -> None:
        self.engine, self.weights, self.stops = engine, weights, stops
        self.longest, self.max_new_tokens, self.widths = longest, max_new_tokens, widths
        self.widest = bucket(longest)
        capacity, self.output = sizes(engine, self.widest, max_new_tokens)
        self._state = _vacant(engine, weights, count, capacity, self.output, stops)
        self.free = list(range(count))
        """Rows that can take a request."""

    def width(self, length: int) -> int:
        """Returns the padded width of a prompt: few values, so few programs."""
        if self.widths:
            return min((width for width in self.widths if width >= length), default=self.widest)
        return bucket(length) if length <= CHUNK else self.widest

    def admit(self, request: Request, row: int) -> Array:
        """Reads the request's prompt into a free row; returns the first token of its answer `[1]`, on the device.

        Raises ValueError, and leaves the slots as they are, for a prompt, budget or number of stop ids beyond those
        that the slots are made for.
        """
        length, new, stops = len(request.tokens), request.settings.max_new_tokens, len(request.settings.stop_ids)
        if length > self.longest or new > self.max_new_tokens:
            raise ValueError(
                f"{length:,} tokens of prompt and {new:,} new ones do not fit slots made for {self.longest:,} and "
                f"{self.max_new_tokens:,}: shorten them, or make longer slots"
            )
        if stops > self.stops:
            raise ValueError(
                f"{stops} stop ids do not fit slots made for {self.stops}: give fewer, or make wider slots"
            )
        width = self.width(length)
        requests = make_requests([request], width=width, stop_width=self.stops)
        # More slots than the prompt has: a draft LM reads the first token too, and writes must not be shifted.
        fresh = run_prefill(self.engine, self.weights, requests, round_up(width + 1), self.output)
        self.free.remove(row)
        self._state = _admit(self._state, fresh, np.int32(row))
        return fresh.root_B

    def run(self, *, limit: int = int(NO_LIMIT)) -> dict[int, Answer]:
        """Runs rounds until a row finishes or `limit` of them are done; returns the answers of rows that have."""
        held = self._state.finish_B.shape[0] - len(self.free)
        if not held:
            return {}
        self._state = run_rounds(self.engine, self.weights, self._state, np.int32(limit), np.int32(held - 1))
        finish = jax.device_get(self._state.finish_B)
        done = [row for row in range(len(finish)) if finish[row] != RUNNING and row not in self.free]
        if not done:
            return {}
        answers = collect(self._state)
        self.free += done
        return {row: answers[row] for row in done}

    def step(self) -> RoundRecord:
        """Runs one round of all rows; returns its record on the host. Rows stay taken until they are released."""
        self._state, record = _recorded(self.engine, self.weights, self._state)
        return jax.device_get(record)

    def release(self, row: int) -> None:
        """Frees a row, whether its answer has ended or not."""
        self._state = self._state._replace(finish_B=self._state.finish_B.at[row].set(STOPPED))
        self.free.append(row)
