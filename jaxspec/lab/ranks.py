"""Ranks of a text's tokens among a drafter's children, at every start and depth, in a few batched passes.

The drafter is unrolled over the text as in training (HASS's harmonized context alignment): row `i` at step `j` has read
the tokens up to `x_{i+j+1}` and its own features behind `f_i`, which is what decoding leaves there when it has followed
the text. One pass over a text gives the candidates of every round that could begin in it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Array, Learner, Params, SharedTables, Target, UnrollInputs
from jaxspec.decoding.requests import Settings, round_up
from jaxspec.decoding.rounds import shared_tables
from jaxspec.drafters import DraftLM
from jaxspec.drafters.module import DrafterModule
from jaxspec.lab.profile import BEYOND, MISSED, Profile
from jaxspec.nn.attention import causal_mask
from jaxspec.sampling import Sampling, distribution_of
from jaxspec.serving.loading import Models
from jaxspec.trees.children import likeliest

TOKENS_AT_ONCE = 4096
"""Padded tokens of a batch."""
SHORTEST = 64
"""Least padded length of a text; others are powers of two."""
LOGITS_AT_ONCE = 2**22
"""Logits that are alive at once: 16 MiB, which fits a large cache."""
MOST_ROWS, FEWEST_ROWS = 512, 8
"""Limits of the rows of a chunk of logits."""
QUERY_BLOCK = 128
"""Queries that attend at once over longer texts, see `attend_causal`."""


class Text(NamedTuple):
    """A prompt with the target's own answer."""

    prompt: np.ndarray
    """At least one token."""
    answer: np.ndarray
    """At least one token; the stop id, if it ends on one, included."""

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.answer)

    @property
    def starts(self) -> int:
        """Places of the answer behind which the text goes on."""
        return len(self.answer) - 1


class Ranks(NamedTuple):
    """Ranks and log-probabilities at the starts of one text, or of several; see `profile.Profile` for the arrays."""

    rank_TD: np.ndarray
    logp_TD: np.ndarray
    top_TDK: np.ndarray
    entropy_TD: np.ndarray
    p_TK: np.ndarray
    """`K` is 0 where texts are greedy."""


class Draws(NamedTuple):
    """The distributions that a target drew some texts from."""

    features_BLD: Array
    """The target's features on the batch, which its LM head scores; padding is garbage."""
    settings: Settings
    """Temperature, top-k and top-p."""


class TextBatch(NamedTuple):
    """Texts of like length side by side, padded on the right, and their starts."""

    tokens_BL: np.ndarray
    place_BL: np.ndarray
    """Place of each token among those that the drafter scores; -1 for tokens outside them."""
    row_X: np.ndarray
    """Flat index `b * L + i` of the row that drafts behind each start: the start stands at `i + 1`."""
    starts: int
    """Starts among the `X`; the rest is padding."""


class _Counted(NamedTuple):
    """Output of the program: `Ranks` before the text's end is known, starts padded to `X`."""

    rank_XD: Array
    logp_XD: Array
    top_XDK: Array
    entropy_XD: Array
    child_XDK: Array
    """Places of the children among the tokens that the drafter scores."""


def batches(texts: Sequence[Text]) -> list[list[int]]:
    """Returns the indices of the texts that go through the models together, longest texts first."""
    by_length: dict[int, list[int]] = {}
    for i in sorted(range(len(texts)), key=lambda i: -texts[i].length):
        by_length.setdefault(padded_length(texts[i].length), []).append(i)
    return [
        group[first : first + rows_of(length)]
        for length, group in by_length.items()
        for first in range(0, len(group), rows_of(length))
    ]


def padded_length(length: int) -> int:
    """Returns the padded length of a text: a power of two, so that few programs are compiled."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def rows_of(length: int) -> int:
    """Returns how many texts of a padded length stand side by side."""
    return max(1, TOKENS_AT_ONCE // length)


def read_target(models: Models, texts: Sequence[Text]) -> Array:
    """Returns what the drafter of `models` reads of the target on a batch of texts, `[B, L, D]`; padding is garbage."""
    return _read(models.engine.target, models.weights.target, jnp.asarray(_tokens(texts)))


@functools.partial(jax.jit, static_argnames="target")
def _read(target: Target, params: Params, tokens_BL: Array) -> Array:
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    return target.forward(params, tokens_BL, positions_BL, causal_mask(tokens_BL.shape[1])).read_BLD


def _tokens(texts: Sequence[Text]) -> np.ndarray:
    """Returns the texts of a batch, `[B, L]`, padded with tokens and rows to the sizes of its program."""
    length = padded_length(max(text.length for text in texts))
    # Fewer rows where a batch is not full, but always a power of two of them.
    tokens_BL = np.zeros((min(rows_of(length), 1 << (len(texts) - 1).bit_length()), length), np.int32)
    for row_L, text in zip(tokens_BL, texts, strict=False):
        row_L[: text.length] = np.concatenate([text.prompt, text.answer])
    return tokens_BL


def rank_texts(
    models: Models, texts: Sequence[Text], read_BLD: Array, *, depth: int, ranks: int, draws: Draws | None = None
) -> list[Ranks]:
    """Returns the ranks at every start of a batch of texts, text by text.

    `read_BLD` is `read_target` of the same texts, and `draws` is of texts that are not greedy. A token outside a draft
    vocabulary is `MISSED` with log-probability -inf. Raises ValueError where the drafter drafts less than `depth` deep,
    or scores fewer than `ranks` tokens.
    """
    drafter = models.engine.drafter
    assert drafter is not None
    check_sizes(models, depth=depth, ranks=ranks)
    # An independent LM has one distribution a place, however it got there.
    steps = 1 if isinstance(drafter, DraftLM) else depth
    batch = _arrange(models, texts)
    shared = shared_tables(models.engine, models.weights)
    found = _rank(decoding_form(drafter), (steps, ranks), models.weights.drafter, shared, batch, read_BLD)
    p_XK = np.zeros((batch.starts, 0), np.float32) if draws is None else _draw(models, batch, found.child_XDK, draws)
    counted = Ranks(*(np.asarray(x)[: batch.starts] for x in (*found[:4], p_XK)))
    ends = np.cumsum([text.starts for text in texts])
    parts = [Ranks(*(x[end - text.starts : end] for x in counted)) for text, end in zip(texts, ends, strict=True)]
    return [
        _finish(_deepen(part, depth) if steps < depth else part, text, whole=drafter.one_pass)
        for part, text in zip(parts, texts, strict=True)
    ]


def ranked_profile(texts: Sequence[Text], found: Ranks, sources: Sequence[str], facts: dict[str, Any]) -> Profile:
    """Returns the profile of the ranks of some texts, one text after another."""
    prompt_T = np.repeat(np.arange(len(texts), dtype=np.int32), [text.starts for text in texts])
    p_TK = found.p_TK if found.p_TK.shape[1] else None
    return Profile(prompt_T, *found[:4], sources=tuple(sources), facts=facts, p_TK=p_TK)


def check_sizes(models: Models, *, depth: int, ranks: int) -> None:
    """Raises ValueError where the drafter of `models` drafts less than `depth` deep or scores fewer than `ranks`."""
    drafter, vocab = models.engine.drafter, models.weights.vocab
    assert drafter is not None
    if drafter.deepest is not None and depth > drafter.deepest:
        raise ValueError(f"the drafter drafts {drafter.deepest} tokens ahead, not {depth}: ask for that depth or less")
    scored = models.config.vocab if vocab is None else len(vocab.token_U)
    if ranks > scored:
        raise ValueError(f"the drafter scores {scored:,} tokens, fewer than {ranks} ranks: ask for {scored} or fewer")


def decoding_form(drafter: Any) -> Learner:
    """Returns a drafter that unrolls as it decodes: without the zero keys that some are trained with, in blocks."""
    module = cast(DrafterModule, drafter)
    config = module.config
    if getattr(config, "zero_logits", False):
        config = dataclasses.replace(config, zero_logits=False)
    on_cpu = jax.default_backend() == "cpu"
    return cast(Learner, module.clone(config=config, query_block=QUERY_BLOCK, row_by_row=on_cpu, remat="none"))


def _arrange(models: Models, texts: Sequence[Text]) -> TextBatch:
    """Returns a batch as the program takes it."""
    tokens_BL, vocab = _tokens(texts), models.weights.vocab
    place_BL = tokens_BL
    if vocab is not None:
        token_U = np.asarray(vocab.token_U)
        at_BL = np.minimum(np.searchsorted(token_U, tokens_BL), len(token_U) - 1)
        place_BL = np.where(token_U[at_BL] == tokens_BL, at_BL, -1)
    width = tokens_BL.shape[1]
    rows = [b * width + len(text.prompt) - 1 + np.arange(text.starts) for b, text in enumerate(texts)]
    row_X = np.zeros(round_up(tokens_BL.size, MOST_ROWS), np.int32)
    starts = sum(text.starts for text in texts)
    row_X[:starts] = np.concatenate(rows)
    return TextBatch(tokens_BL, place_BL.astype(np.int32), row_X, starts)


@functools.partial(jax.jit, static_argnames=("drafter", "sizes"))
def _rank(
    drafter: Learner, sizes: tuple[int, int], params: Params, shared: SharedTables, batch: TextBatch, read_BLD: Array
) -> _Counted:
    """Unrolls the drafter, then scores a chunk of starts at a time, as many chunks as there are starts."""
    (steps, ranks), (rows, length) = sizes, batch.tokens_BL.shape
    positions_BL = jnp.broadcast_to(jnp.arange(length), (rows, length))
    mask_BLM = jnp.broadcast_to(causal_mask(length), (rows, length, length))
    inputs = UnrollInputs(jnp.asarray(batch.tokens_BL), read_BLD, positions_BL, mask_BLM)
    hidden = drafter.unroll(params, shared, inputs, steps).hidden_TBLD
    hidden_DZE, place_Z = hidden.reshape(steps, rows * length, -1), jnp.asarray(batch.place_BL).reshape(-1)
    row_X = jnp.asarray(batch.row_X)
    chunk = _chunk(drafter.vocab or shared.head_VD.shape[0])

    def score(index: Array, found: _Counted) -> _Counted:
        row_C = jax.lax.dynamic_slice_in_dim(row_X, index * chunk, chunk)
        of = []
        for step in range(steps):
            logits_1CV = drafter.logits(params, shared, hidden_DZE[step, row_C][None], step)
            # Behind the text's end any token will do.
            of.append(_place(logits_1CV, place_Z[jnp.minimum(row_C + step + 2, len(place_Z) - 1)], ranks))
        together = _Counted(*(jnp.stack(x, axis=1) for x in zip(*of, strict=True)))
        return _Counted(
            *(jax.lax.dynamic_update_slice_in_dim(o, x, index * chunk, 0) for o, x in zip(found, together, strict=True))
        )

    flat = jnp.zeros((len(batch.row_X), steps))
    many = jnp.zeros((*flat.shape, ranks))
    nothing = _Counted(flat.astype(jnp.int16), flat, many, flat, many.astype(jnp.int32))
    return jax.lax.fori_loop(0, (batch.starts + chunk - 1) // chunk, score, nothing)


def _chunk(vocab: int) -> int:
    """Returns how many rows of logits are alive at once: a power of two."""
    return min(MOST_ROWS, max(FEWEST_ROWS, 1 << (LOGITS_AT_ONCE // vocab).bit_length() >> 1))


def _place(logits_1CV: Array, token_C: Array, ranks: int) -> _Counted:
    """Returns the ranks of some tokens, -1 for none, and what else a profile keeps of their distributions."""
    # Three axes: of two, XLA:CPU makes a full sort, fifty times slower.
    children = likeliest(logits_1CV, ranks)
    same_CK = children.token_BWR[0] == token_C[:, None]
    rank_C = jnp.where(jnp.any(same_CK, axis=-1), jnp.argmax(same_CK, axis=-1), MISSED)
    logp_CV = jax.nn.log_softmax(logits_1CV[0], axis=-1)
    logp_C = jnp.take_along_axis(logp_CV, jnp.maximum(token_C, 0)[:, None], axis=-1)[:, 0]
    # A token of probability 0 adds 0 to the entropy; `0 log 0` would be NaN.
    entropy_C = -jnp.sum(jnp.where(logp_CV > -jnp.inf, jnp.exp(logp_CV) * logp_CV, 0.0), axis=-1)
    return _Counted(
        rank_C.astype(jnp.int16),
        jnp.where(token_C < 0, -jnp.inf, logp_C),
        children.logp_BWR[0],
        entropy_C,
        children.token_BWR[0],
    )


def _draw(models: Models, batch: TextBatch, child_XDK: Array, draws: Draws) -> Array:
    """Returns `[X, K]`: the probability that the target draws each child of depth 1."""
    of, vocab = draws.settings, models.weights.vocab
    child_XK = child_XDK[:, 0] if vocab is None else jnp.asarray(vocab.token_U)[child_XDK[:, 0]]
    sampling = Sampling(
        jnp.full(1, of.temperature, jnp.float32),
        jnp.full(1, of.top_k, jnp.int32),
        jnp.full(1, of.top_p, jnp.float32),
        jnp.zeros(1, jnp.uint32),  # of the noise, which is not drawn here
    )
    target, chunk = models.engine.target, _chunk(models.config.vocab)
    return _draw_chunks(target, chunk, models.weights.target, batch, draws.features_BLD, child_XK, sampling)


@functools.partial(jax.jit, static_argnames=("target", "chunk"))
def _draw_chunks(
    target: Target,
    chunk: int,
    params: Params,
    batch: TextBatch,
    features_BLD: Array,
    child_XK: Array,
    sampling: Sampling,
) -> Array:
    """Scores the features at a chunk of starts at a time, as many chunks as there are starts."""
    row_X, features_ZD = jnp.asarray(batch.row_X), features_BLD.reshape(-1, features_BLD.shape[-1])

    def score(index: Array, found_XK: Array) -> Array:
        row_C, child_CK = (jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk) for x in (row_X, child_XK))
        # The start stands behind the row that drafts there.
        p_1CV = distribution_of(target.logits(params, features_ZD[row_C + 1][None]), sampling)
        p_CK = jnp.take_along_axis(p_1CV[0], child_CK, axis=-1)
        return jax.lax.dynamic_update_slice_in_dim(found_XK, p_CK, index * chunk, 0)

    chunks = (batch.starts + chunk - 1) // chunk
    return jax.lax.fori_loop(0, chunks, score, jnp.zeros(child_XK.shape, jnp.float32))


def _deepen(first: Ranks, depth: int) -> Ranks:
    """Returns what a drafter without features of its own has at every depth: that of depth 1, so many places later."""
    starts = len(first.rank_TD)
    at_TD = np.minimum(np.arange(starts)[:, None] + np.arange(depth), max(starts - 1, 0))
    deep = [x[at_TD, 0] if starts else np.zeros((0, depth, *x.shape[2:]), x.dtype) for x in first[:4]]
    return Ranks(*[*deep, first.p_TK])


def _finish(found: Ranks, text: Text, *, whole: bool) -> Ranks:
    """Returns a text's part with what lies behind its end marked as such.

    With `whole` the likeliest children are those of the whole tree of a start, wherever the text ends: a one-pass
    drafter's. They are kept in full precision, since float16 would make equals of paths that the tree tells apart.
    """
    left_T = text.starts - np.arange(text.starts)
    ended_TD = np.arange(1, found.rank_TD.shape[1] + 1) > left_T[:, None]
    return Ranks(
        np.where(ended_TD, BEYOND, found.rank_TD).astype(np.int16),
        np.where(ended_TD, np.nan, found.logp_TD).astype(np.float32),
        found.top_TDK if whole else np.where(ended_TD[..., None], np.nan, found.top_TDK).astype(np.float16),
        np.where(ended_TD, np.nan, found.entropy_TD).astype(np.float16),
        found.p_TK,
    )
