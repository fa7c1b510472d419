"""The LM head: fp32 logits of hidden states."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.nn.matmul import LEFT_ROWS, fill_rows, multiply_left
from jaxspec.parallel.mesh import constrain

FEW_ROWS = 32
"""Greatest number of rows for which the head is the left operand, which spares laying it out anew on every call; for
CPUs `matmul.LEFT_ROWS` says it."""


def score_tokens(x_BLD: Array, table_VD: Array) -> Array:
    """Returns fp32 logits `[B, L, V]` of hidden states under an LM head."""
    # Operands have the activations' dtype, sums are fp32.
    table_VD = table_VD.astype(x_BLD.dtype)
    rows = x_BLD.shape[0] * x_BLD.shape[1]
    score = functools.partial(_score, table_VD)
    if rows > LEFT_ROWS[-1]:
        return score(x_BLD)
    few = functools.partial(fill_rows, functools.partial(_score_few, table_VD)) if rows <= FEW_ROWS else score
    left = functools.partial(multiply_left, table_VD, out=jnp.float32)
    on_cpu = functools.partial(fill_rows, score) if x_BLD.dtype == jnp.bfloat16 else left
    return jax.lax.platform_dependent(x_BLD, cpu=on_cpu, default=few)


def _score(table_VD: Array, x_BLD: Array) -> Array:
    """Returns the logits with the head as the right operand."""
    logits_BLV = jnp.einsum("BLD,VD->BLV", x_BLD, table_VD, preferred_element_type=jnp.float32)
    return constrain(logits_BLV, "batch", None, "vocab")


def _score_few(table_VD: Array, x_BLD: Array) -> Array:
    """Returns the logits of few rows with the head as the left operand."""
    scores_VBL = jnp.einsum("VD,BLD->VBL", table_VD, x_BLD, preferred_element_type=jnp.float32)
    return jnp.transpose(scores_VBL, (1, 2, 0))
