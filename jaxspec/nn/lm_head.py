"""The LM head: fp32 logits of hidden states."""

from __future__ import annotations

import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.parallel.mesh import constrain

FEW_ROWS = 32
"""Greatest number of rows for which the head is the left operand; as the right one, XLA:CPU transposes it each call."""


def score_tokens(x_BLD: Array, table_VD: Array) -> Array:
    """Returns fp32 logits `[B, L, V]` of hidden states under an LM head."""
    # Operands have the activations' dtype, sums are fp32.
    table_VD = table_VD.astype(x_BLD.dtype)
    if x_BLD.shape[0] * x_BLD.shape[1] > FEW_ROWS:
        logits_BLV = jnp.einsum("BLD,VD->BLV", x_BLD, table_VD, preferred_element_type=jnp.float32)
        return constrain(logits_BLV, "batch", None, "vocab")
    scores_VBL = jnp.einsum("VD,BLD->VBL", table_VD, x_BLD, preferred_element_type=jnp.float32)
    return jnp.transpose(scores_VBL, (1, 2, 0))
