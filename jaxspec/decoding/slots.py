"""Rows that are refilled: a batch whose finished rows make room for the next requests."""

from __future__ import annotations

import jax
import numpy as np

from jaxspec.decoding.generation import NO_LIMIT, Generation, collect, run_prefill, run_rounds, sizes
from jaxspec.decoding.requests import Requests, bucket, round_up
from jaxspec.decoding.rounds import CHUNK, RUNNING, Engine, Weights, admit, vacant

_vacant = jax.jit(vacant, static_argnames=("engine", "batch", "capacity", "slots", "stops"))
_admit = jax.jit(admit, donate_argnames="state")


class Slots:
    """Rows of one running batch that take a new prompt whenever one of them has finished, without compiling anew.

    `longest` is the longest prompt's tokens, `max_new_tokens` the largest budget and `stops` the most stop ids there
    will be. Rounds are one program; a prompt is read by one of a few, by its padded width.
    """

    def __init__(
        self, engine: Engine, weights: Weights, count: int, *, longest: int, max_new_tokens: int, stops: int
    ) -> None:
        self.engine, self.weights, self.stops = engine, weights, stops
        self.longest, self.max_new_tokens = longest, max_new_tokens
        self.widest = bucket(longest)
        capacity, self.output = sizes(engine, self.widest, max_new_tokens)
        self._state = _vacant(engine, weights, count, capacity, self.output, stops)
        self.free = list(range(count))
        """Rows that can take a prompt."""

    def width(self, length: int) -> int:
        """The padded width of a prompt: few values, so few programs."""
        return bucket(length) if length <= CHUNK else self.widest

    def admit(self, requests: Requests, row: int) -> None:
        """Read the one prompt of `requests`, padded to its `width`, into a free row.

        Raises ValueError, and leaves the slots as they are, for a prompt or budget beyond what they were made for.
        """
        length, new = int(requests.length_B[0]), int(requests.budget_B[0])
        if length > self.longest or new > self.max_new_tokens:
            raise ValueError(
                f"{length:,} tokens of prompt and {new:,} new ones do not fit slots made for {self.longest:,} and "
                f"{self.max_new_tokens:,}: shorten them, or make longer slots"
            )
        width = self.width(length)
        if requests.tokens_BL.shape != (1, width) or requests.stop_BR.shape != (1, self.stops):
            raise ValueError(
                f"a slot takes one prompt padded to {width} tokens with {self.stops} stop ids, "
                f"not {requests.tokens_BL.shape} and {requests.stop_BR.shape}"
            )
        # More slots than the prompt has: a draft LM reads the first token too, and writes must not be shifted.
        fresh = run_prefill(self.engine, self.weights, requests, round_up(width + 1), self.output)
        self.free.remove(row)
        self._state = _admit(self._state, fresh, np.int32(row))

    def run(self, *, limit: int = int(NO_LIMIT)) -> dict[int, Generation]:
        """Rounds until a row finishes or `limit` of them are done; the rows that have, each with its generation."""
        held = self._state.finish_B.shape[0] - len(self.free)
        if not held:
            return {}
        self._state = run_rounds(self.engine, self.weights, self._state, np.int32(limit), np.int32(held - 1))
        finish = jax.device_get(self._state.finish_B)
        done = [row for row in range(len(finish)) if finish[row] != RUNNING and row not in self.free]
        if not done:
            return {}
        whole = collect(self._state)
        self.free += done
        return {
            row: Generation([whole.tokens[row]], [whole.finish[row]], whole.calls[[row]], whole.accepted[[row]])
            for row in done
        }
