"""Requests: prompts with their settings, one by one on the host, and as the padded arrays that the programs read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxspec.base import Array
from jaxspec.sampling import Sampling

NO_STOP = -1
"""Padding of a row's stop ids."""
HOTTEST = 1e6
"""Greatest temperature: all tokens are as likely as one another there."""
SEEDS = 2**32
"""Seeds are below this."""
LAST_PARTS = 4
"""Narrow chunks in a chunk: a long prompt ends with them."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one answer. Raises ValueError naming a field out of range.

    A run has one for all its prompts, whose seeds `for_row` derives from the run's.
    """

    max_new_tokens: int = 256
    """Most tokens of the answer, at least 1."""
    temperature: float = 0.0
    """0 decodes greedily."""
    top_k: int = 0
    """Draws among the `k` likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Draws among the likeliest tokens that hold this share of the probability; 1 keeps all."""
    draft_temperature: float | None = None
    """Temperature of the distribution that drawn children come from; None for `temperature`."""
    seed: int = 0
    """Seed of the draws."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end the answer and are its last token."""

    def __post_init__(self) -> None:
        for name, holds, range_ in (
            ("max_new_tokens", 1 <= self.max_new_tokens < 2**31, "at least 1, and below 2^31"),
            ("temperature", 0 <= self.temperature <= HOTTEST, f"0 (greedy) or above, and at most {HOTTEST:g}"),
            (
                "draft_temperature",
                0 <= (self.draft_temperature or 0) <= HOTTEST,
                f"0 (likeliest) or above, and at most {HOTTEST:g}",
            ),
            ("top_k", 0 <= self.top_k < 2**31, "0 (keep all) or above, and below 2^31"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", 0 <= self.seed < SEEDS, "from 0 to 2^32 - 1"),
        ):
            if not holds:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be {range_}")

    def for_row(self, index: int) -> Settings:
        """Returns the settings of prompt `index` of a run, with noise of its own.

        The seed depends on the run's seed and the index alone, so a prompt's text is the same in whatever batch, shard
        or order it is decoded.
        """
        seed = int(np.random.SeedSequence((self.seed, index)).generate_state(1)[0])
        return dataclasses.replace(self, seed=seed)


class Request(NamedTuple):
    """One prompt and how it is answered."""

    tokens: Sequence[int] | np.ndarray
    """The prompt, at least one token."""
    settings: Settings = Settings()
    key: Any = 0
    """The caller's own name for it, such as its place in a file."""


class Requests(NamedTuple):
    """The array form of a batch of requests: prompts padded on the right, and a value a row of every setting."""

    tokens_BL: Array
    length_B: Array
    sampling: Sampling
    stop_BR: Array
    """Stop ids, padded with `NO_STOP`."""
    budget_B: Array
    """`max_new_tokens`."""
    draft_temperature_B: Array
    """Rows at 0 draft their likeliest tokens, as all rows do in mode `topk`."""


def make_requests(requests: Sequence[Request], *, width: int = 0, stop_width: int = 1) -> Requests:
    """Returns requests of any lengths as the arrays of one batch.

    Prompts are padded to `width` or the `bucket` of the longest, whichever is more; stop ids to `stop_width` or the
    most that a row has. Raises ValueError naming the row of a prompt without tokens, or with a negative one.
    """
    if not requests:
        raise ValueError("no prompts given: pass at least one")
    for row, request in enumerate(requests):
        if len(request.tokens) == 0:
            raise ValueError(f"prompt {row} is empty: give at least one token")
        if min(request.tokens) < 0:
            raise ValueError(f"prompt {row} has a negative token: give ids of the target's vocabulary")
    settings = [request.settings for request in requests]
    tokens_BL = _padded([r.tokens for r in requests], max(width, bucket(max(len(r.tokens) for r in requests))), 0)
    stop_BR = _padded([s.stop_ids for s in settings], max(stop_width, *(len(s.stop_ids) for s in settings)), NO_STOP)
    drafts_at = [s.temperature if s.draft_temperature is None else s.draft_temperature for s in settings]
    return Requests(
        jnp.asarray(tokens_BL),
        jnp.asarray([len(r.tokens) for r in requests], jnp.int32),
        Sampling(
            _column([s.temperature for s in settings], np.float32),
            _column([s.top_k for s in settings], np.int32),
            _column([s.top_p for s in settings], np.float32),
            _column([s.seed for s in settings], np.uint32),
        ),
        jnp.asarray(stop_BR),
        _column([s.max_new_tokens for s in settings], np.int32),
        _column(drafts_at, np.float32),
    )


def fill_up(requests: Sequence[Request], rows: int) -> list[Request]:
    """Returns the requests and, up to `rows` of them, copies of the last that end at their first token."""
    last = requests[-1]
    copy = last._replace(settings=dataclasses.replace(last.settings, max_new_tokens=1))
    return [*requests, *[copy] * (rows - len(requests))]


def blank_requests(batch: int, stops: int, width: int = 1) -> Requests:
    """Returns the arrays of `batch` rows without a prompt, `stops` stop ids wide: shapes for programs to be traced."""
    rows = jnp.zeros(batch, jnp.int32)
    real = rows.astype(jnp.float32)
    sampling = Sampling(real, rows, real, rows.astype(jnp.uint32))
    nothing_BL, stop_BR = jnp.zeros((batch, width), jnp.int32), jnp.zeros((batch, stops), jnp.int32)
    return Requests(nothing_BL, rows, sampling, stop_BR, rows, real)


def _column(values: Sequence[Any], dtype: Any) -> Array:
    return jnp.asarray(np.asarray(values).astype(dtype))


def _padded(rows: Sequence[Any], width: int, fill: int) -> np.ndarray:
    """`int32 [len(rows), width]`: the rows, with `fill` behind each."""
    padded = np.full((len(rows), width), fill, np.int32)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    return padded


def bucket(length: int) -> int:
    """Returns the padded size of a prompt of `length`: 16, 24, 32, then four sizes from each power of two to the next.

    From 32 tokens on it is at most a quarter more than the length. Up to 512 tokens there are 19 sizes, and so at most
    as many programs that read prompts; further ones come for batches of longer prompts, four for each doubling.
    """
    return max(16, round_up(length, max(8, 2 ** (length - 1).bit_length() // 8)))


def count_chunks(longest: Any, width: int, chunk: int) -> tuple[Array, Array]:
    """Returns how many whole chunks of prompts are read, at least one, and how many narrow ones behind them.

    Together they are as wide as the `bucket` of the longest prompt, whose tokens are `longest`, in the one program that
    reads all prompts of up to `width`. So a row of a batch of one `bucket` is read in the same chunks as it is alone.
    """
    sizes = [chunk]
    while sizes[-1] < width:
        sizes.append(min(width, bucket(sizes[-1] + 1)))
    size = jnp.min(jnp.where(jnp.asarray(sizes) >= longest, jnp.asarray(sizes), width))
    wide = size // chunk
    return wide, (size - wide * chunk) // (chunk // LAST_PARTS)


def round_up(length: int, step: int = 64) -> int:
    """Returns the least multiple of `step` that holds `length`."""
    return -(-length // step) * step
