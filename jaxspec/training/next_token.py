"""Next-token prediction over packed documents."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Packed, Params
from jaxspec.targets.decoder import Decoder


class TokenBatch(NamedTuple):
    """Packed rows, as `jaxspec.data.packing` builds them."""

    tokens_BL: Array
    segments_BL: Array  # 0 on padding
    positions_BL: Array
    loss_mask_BL: Array  # the token may be a target


def target_weights(batch: TokenBatch) -> Array:
    """Returns fp32 `[B, L]`: 1 at `l` where token `l + 1` belongs to the same document and may be a target."""
    same = (batch.segments_BL[:, 1:] == batch.segments_BL[:, :-1]) & (batch.segments_BL[:, 1:] > 0)
    return jnp.pad(same & batch.loss_mask_BL[:, 1:], ((0, 0), (0, 1))).astype(jnp.float32)


def next_token_loss(model: Decoder, params: Params, batch: TokenBatch, *, block: int) -> Array:
    """Returns fp32 `[B, L]`: `-log p(token l + 1 | tokens up to l)` in nats, 0 where `target_weights` is 0.

    Logits exist for `block` positions of every row at a time, in the backward pass too.
    Raises ValueError unless `block` divides `L`.
    """
    B, L = batch.tokens_BL.shape
    if L % block:
        raise ValueError(f"loss_block is {block}, which does not divide the row length {L}")
    seen = Packed(batch.segments_BL)
    features_BLD = model.forward(params, batch.tokens_BL, batch.positions_BL, seen).features_BLD
    next_BL = jnp.roll(batch.tokens_BL, -1, axis=1)

    @jax.checkpoint
    def block_loss(features_BCD: Array, next_BC: Array) -> Array:
        logits_BCV = model.logits(params, features_BCD)
        chosen = jnp.take_along_axis(logits_BCV, next_BC[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BCV, axis=-1) - chosen

    def in_blocks(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(B, L // block, block, *x.shape[2:]), 1, 0)

    _, loss = jax.lax.scan(lambda none, x: (none, block_loss(*x)), None, (in_blocks(features_BLD), in_blocks(next_BL)))
    return jnp.moveaxis(loss, 0, 1).reshape(B, L) * target_weights(batch)
