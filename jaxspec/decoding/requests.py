"""Prompts of different lengths as one padded batch, each row with its own way of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxspec.base import Array
from jaxspec.sampling import Sampling

NO_STOP = -1
"""Padding of a row's stop ids."""


class Requests(NamedTuple):
    """A batch of prompts, padded on the right, and how each row decodes."""

    tokens_BL: Array
    length_B: Array
    sampling: Sampling
    stop_BR: Array
    """Ids that end a row (and are its last token), padded with `NO_STOP`."""
    budget_B: Array
    """Most new tokens of each row, at least 1."""
    draft_temperature_B: Array
    """Of the distribution that children are drawn from; rows at 0 draft their likeliest tokens, as all do in mode
    `topk`."""


def bucket(length: int, least: int = 16) -> int:
    """The padded size of a prompt of `length`: powers of two from `least` to `32 * least`, then multiples of that.

    Few sizes, so few programs that read prompts.
    """
    size = least
    while size < length and size < 32 * least:
        size *= 2
    return size if size >= length else round_up(length, size)


def round_up(length: int, step: int = 64) -> int:
    """The least multiple of `step` that holds `length`."""
    return -(-length // step) * step


def make_requests(
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] | Sequence[Sequence[int]] = (),
    draft_temperature: float | Sequence[float] | None = None,
    vocab: int | None = None,
    width: int = 0,
    stop_width: int = 1,
) -> Requests:
    """A batch from prompts of any lengths. A single setting holds for all rows.

    `draft_temperature` is each row's `temperature` where it is not given. Prompts are padded to `width` or the `bucket`
    of the longest, whichever is more, stop ids likewise to `stop_width`.

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
    stop_BR = np.full((batch, max(stop_width, *(len(s) for s in stops))), NO_STOP, np.int32)
    for row, stop in zip(stop_BR, stops, strict=True):
        row[: len(stop)] = stop
    width = max(width, bucket(max(len(p) for p in prompts)))
    tokens_BL = np.zeros((batch, width), np.int32)
    for row, prompt in zip(tokens_BL, prompts, strict=True):
        row[: len(prompt)] = prompt
    drafts_at = temperature if draft_temperature is None else draft_temperature
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
        jnp.asarray(each("draft_temperature", drafts_at, np.float32, 0, infinite)),
    )
