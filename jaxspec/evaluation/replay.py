"""Replay of a target's own texts: what a drafter would have had accepted, without running the target again.

Under the rule `target-draw` the target's token at a position depends on the text before it alone, whatever drafts for
it. So the text is one fixed path: a draft is accepted as far as it follows the text, and the hidden states that the
drafter reads there are those of one pass over the text. A replay makes the calls that decoding would make, up to
rounding in the target, and costs what the drafter costs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import verify
from jaxspec.base import Array, Cache, KVCache, Mask, Params, SharedTables, Target, TargetOutput
from jaxspec.decoding.answers import Answer
from jaxspec.decoding.generation import NO_LIMIT, collect, run_rounds, start
from jaxspec.decoding.requests import Request, Settings, bucket, fill_up, make_requests
from jaxspec.nn import cache as kv
from jaxspec.nn.attention import causal_mask
from jaxspec.serving.loading import Models


class Recording(NamedTuple):
    """A prompt with the target's own answer, and what a drafter reads of the target on them."""

    prompt: np.ndarray
    """At least one token."""
    answer: np.ndarray
    """At least one token; the stop id, if it ends on one, included."""
    hidden_LD: np.ndarray
    """`TargetOutput.read_BLD` at every token of both, `L` in all."""
    settings: Settings = Settings()
    """Of the request that was answered; drawn children depend on its seed and draft temperature."""


class RecordedText(NamedTuple):
    """The parameters of a `RecordedTarget`: the texts of a batch."""

    hidden_BLD: Array
    next_BL: Array
    """The token behind each one; `V`, which nothing drafts, where the text has ended."""
    tables: SharedTables


@dataclasses.dataclass(frozen=True)
class RecordedTarget:
    """A target that knows its texts: at every position it gives what was computed there, whatever tokens it reads.

    Only nodes that follow the text are accepted, so what it gives at others does not matter. It keeps no cache.
    """

    def forward(
        self,
        params: RecordedText,
        tokens_BL: Array,
        positions_BL: Array,
        mask_BLM: Mask,
        prefix: tuple[Cache, Array] | None = None,
        *,
        keep_kv: bool = False,
    ) -> TargetOutput:
        """Returns the next tokens of the text in the place of features, and its hidden states as auxiliary ones."""
        del mask_BLM, prefix
        # A draft may reach past the text's end; what is read there is not accepted.
        at_BL = jnp.minimum(positions_BL, params.next_BL.shape[1] - 1)
        hidden_BLD = jnp.take_along_axis(params.hidden_BLD, at_BL[..., None], axis=1)
        next_BL1 = jnp.take_along_axis(params.next_BL, at_BL, axis=1)[..., None]
        fresh = cast(KVCache, self.empty_cache(*tokens_BL.shape))
        return TargetOutput(next_BL1.astype(jnp.float32), fresh if keep_kv else None, hidden_BLD)

    def logits(self, params: RecordedText, features_BLD: Array) -> Array:
        """Returns logits `[B, L, V + 1]` whose argmax is the next token of the text, `V` behind its end."""
        # Ids are exact in fp32: they lie below 2^24.
        tokens = jnp.arange(params.tables.embed_VD.shape[0] + 1, dtype=jnp.float32)
        return jnp.where(features_BLD == tokens, 1.0, 0.0)

    def scoring(self, params: Params) -> Params:
        """Returns the parameters themselves."""
        return params

    def shared_tables(self, params: RecordedText) -> SharedTables:
        """Returns the tables of the target that wrote the texts."""
        return params.tables

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """Returns the smallest cache there is."""
        return kv.empty(1, batch, 1, 1, capacity, jnp.dtype(jnp.float32))


@functools.partial(jax.jit, static_argnames="target")
def _hidden(target: Target, params: Params, tokens_BL: Array) -> Array:
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    return target.forward(params, tokens_BL, positions_BL, causal_mask(tokens_BL.shape[1])).read_BLD


def record(models: Models, prompt: np.ndarray, answer: np.ndarray, settings: Settings) -> Recording:
    """Runs the target of `models` over its own answer once, for what the drafter of `models` reads there."""
    tokens = np.concatenate([prompt, answer])
    padded = np.zeros((1, bucket(len(tokens))), np.int32)
    padded[0, : len(tokens)] = tokens
    hidden_BLD = _hidden(models.engine.target, models.weights.target, jnp.asarray(padded))
    return Recording(prompt, answer, np.asarray(hidden_BLD[0, : len(tokens)]), settings)


def replay(models: Models, recordings: Sequence[Recording], *, batch: int) -> Iterator[tuple[int, Answer]]:
    """Yields each recording's index with the answer that decoding by the drafter and tree of `models` would count.

    `batch` texts are replayed side by side. In its last round a decoding may accept tokens past the end of its answer;
    a replay does not count them. Raises ValueError for another rule than `target-draw`, whose text depends on drafts.
    """
    if models.engine.rule is not verify.RULES["target-draw"]:
        raise ValueError("only texts of the rule target-draw can be replayed: others depend on what is drafted")
    engine = dataclasses.replace(models.engine, target=cast(Target, RecordedTarget()))
    tables = models.engine.target.shared_tables(models.weights.target)
    length = bucket(max(len(r.hidden_LD) for r in recordings))
    width = bucket(max(len(r.prompt) for r in recordings))
    longest = max(len(r.answer) for r in recordings)
    # Texts of like length side by side: a batch takes as many rounds as its longest.
    order = sorted(range(len(recordings)), key=lambda i: -len(recordings[i].answer))
    for begin in range(0, len(order), batch):
        chosen = order[begin : begin + batch]
        rows = [recordings[i] for i in chosen]
        requests = make_requests(fill_up([_request(r) for r in rows], batch), width=width)
        rows += rows[-1:] * (batch - len(rows))
        weights = models.weights._replace(target=_texts(rows, length, tables))
        state = start(engine, weights, requests, max_new_tokens=longest)
        answers = collect(run_rounds(engine, weights, state, NO_LIMIT))
        yield from zip(chosen, answers, strict=False)  # without the answers of rows that fill up


def _request(recording: Recording) -> Request:
    """Returns the request that writes the recorded answer again: greedily, and to its end whatever stands there."""
    given = recording.settings
    drafts_at = given.temperature if given.draft_temperature is None else given.draft_temperature
    settings = Settings(len(recording.answer), draft_temperature=drafts_at, seed=given.seed)
    return Request(recording.prompt, settings)


def _texts(rows: Sequence[Recording], length: int, tables: SharedTables) -> RecordedText:
    """Returns the texts of a batch, padded to `length`."""
    hidden_BLD = np.zeros((len(rows), length, rows[0].hidden_LD.shape[-1]), rows[0].hidden_LD.dtype)
    next_BL = np.full((len(rows), length), tables.embed_VD.shape[0], np.int32)
    for b, row in enumerate(rows):
        hidden_BLD[b, : len(row.hidden_LD)] = row.hidden_LD
        next_BL[b, : len(row.hidden_LD) - 1] = np.concatenate([row.prompt, row.answer])[1:]
    return RecordedText(jnp.asarray(hidden_BLD), jnp.asarray(next_BL), tables)
