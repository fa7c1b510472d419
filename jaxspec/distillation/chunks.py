"""The division of a batch's positions into chunks, so that no logits of a whole batch exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.data.target_outputs import Likely, Whole


class Chunk(NamedTuple):
    """Some predicted positions: step `j`'s row is the pair that stands `j + 1` positions before.

    All draft steps that predict one position stand together, so that the target's head scores it once for all of them.
    """

    hidden_TBCD: Array
    """Outputs of the draft steps, which logits are computed from."""
    features_TBCD: Array | None
    """Outputs to compare with the target's features; None where there are none."""
    target_features_BCD: Array
    """The target's feature at the position; its logits for the token after are computed from it."""
    token_BC: Array
    """The token after."""
    mask_TBC: Array
    """Where a step is trained and measured."""
    logit_mask_TBC: Array
    """Where its logits are trained."""
    key: Array
    likely: Likely | None = None
    """The target's likeliest tokens at the position, where the drafter learns from these and not from its logits."""
    whole: Whole | None = None
    """The facts of the target's whole distribution, where they are stored and the drafter has a vocabulary of its own:
    its logits are then computed of that vocabulary alone."""


class Layout(NamedTuple):
    """The division of each row's positions into chunks."""

    order_BL: Array
    """Positions in the order they are taken."""
    size: int

    @classmethod
    def of(cls, mask_TBL: Array, chunk: int) -> Layout:
        """Returns the layout in chunks of at most `chunk` positions a row."""
        # Each row's most trained positions come first: the last chunks are then empty, and empty chunks are skipped.
        order_BL = jnp.argsort(-jnp.sum(mask_TBL, axis=0), axis=1, stable=True)
        return cls(order_BL, min(chunk, mask_TBL.shape[-1]))

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.order_BL.shape[1] // self.size)

    def cut(self, x_TBL: Array) -> Array:
        """Returns `[T, B, L, ...]` as `[chunks, T, B, C, ...]`, zeros behind the last position."""
        trailing = x_TBL.shape[3:]
        missing = self.chunks * self.size - x_TBL.shape[2]
        order = self.order_BL.reshape(1, *self.order_BL.shape, *(1 for _ in trailing))
        x_TBL = jnp.take_along_axis(x_TBL, order, axis=2)
        x_TBL = jnp.pad(x_TBL, [(0, 0), (0, 0), (0, missing), *((0, 0) for _ in trailing)])
        return jnp.moveaxis(x_TBL.reshape(*x_TBL.shape[:2], -1, self.size, *trailing), 2, 0)

    def cut_rows(self, x_BL: Array) -> Array:
        """Returns `[B, L, ...]` as `[chunks, B, C, ...]`."""
        return self.cut(x_BL[None])[:, 0]

    def join(self, x_XTBC: Array) -> Array:
        """Returns `[chunks, T, B, C, ...]` as `[T, B, L, ...]`: the inverse of `cut`."""
        steps, batch, trailing = *x_XTBC.shape[1:3], x_XTBC.shape[4:]
        length = self.order_BL.shape[1]
        x_TBL = jnp.moveaxis(x_XTBC, 0, 2).reshape(steps, batch, -1, *trailing)[:, :, :length]
        back = jnp.argsort(self.order_BL, axis=1).reshape(1, batch, length, *(1 for _ in trailing))
        return jnp.take_along_axis(x_TBL, back, axis=2)


def skip_empty(function: Callable[[Chunk], Any], chunk: Chunk) -> Any:
    """Returns `function(chunk)`, or zeros of its shape where nothing of the chunk is trained."""

    def zeros(chunk: Chunk) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, chunk))

    return jax.lax.cond(jnp.any(chunk.mask_TBC), function, zeros, chunk)


def by_position(x_TBL: Array) -> Array:
    """Returns step `j`'s rows moved `j + 1` to the right: from the pair to the position whose feature it predicts."""
    return jnp.stack([_shift_right(x, j + 1) for j, x in enumerate(x_TBL)])


def by_pair(x_TBL: Array) -> Array:
    """Returns step `j`'s rows moved `j + 1` to the left: the inverse of `by_position`."""
    return jnp.stack([shift(x, j + 1) for j, x in enumerate(x_TBL)])


def shift(x_BL: Array, by: int) -> Array:
    """Returns `x` moved left by `by` positions, zeros behind."""
    return jnp.pad(x_BL[:, by:], [(0, 0), (0, by), *((0, 0) for _ in x_BL.shape[2:])])


def _shift_right(x_BL: Array, by: int) -> Array:
    """Returns `x` moved right by `by` positions, zeros in front."""
    return jnp.pad(x_BL, [(0, 0), (by, 0), *((0, 0) for _ in x_BL.shape[2:])])[:, : x_BL.shape[1]]
