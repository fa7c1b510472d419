"""Position weights: the weight `w_j` of the token drafted at step `j = 0, 1, ..` of a chain."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxspec.base import Array
from jaxspec.losses.loss import wide
from jaxspec.losses.spec import LossParameter, read_spec

POSITION_WEIGHTS: dict[str, LossParameter | None] = {
    "none": None,
    "exp": LossParameter("gamma", "a number above 0", lambda x: 0 < x < float("inf")),
    "power": LossParameter("beta", "a number above 0 and at most 1", lambda x: 0 < x <= 1),
    "cat": None,
    "d_pace": LossParameter("a", "a number from 0 to 1", lambda x: 0 <= x <= 1),
}
"""Name -> the number that the weighting takes, or None."""


def position_weights(spec: str, draft_gold_TX: Array, target_gold_TX: Array, mask_TX: Array | None = None) -> Array:
    """Returns fp32 weights `[T, ...]` by `spec`: `none`, `exp:gamma`, `power:beta`, `cat` or `d_pace:a`.

    `draft_gold_TX` and `target_gold_TX` are the *probabilities* that draft and target give the label at each
    of `T` steps, 0 where the draft's vocabulary lacks it. The weights have no gradient. A step outside `mask_TX`
    weighs 0, adds no length and stops no chain. Raises ValueError for another spec.
    """
    name, number = read_spec("position weight", spec, POSITION_WEIGHTS)
    draft_gold_TX, target_gold_TX = jax.lax.stop_gradient((wide(draft_gold_TX), wide(target_gold_TX)))
    mask_TX = jnp.ones(draft_gold_TX.shape, bool) if mask_TX is None else mask_TX.astype(bool)
    if name == "cat":
        w_TX = cat(jnp.where(mask_TX, target_gold_TX, 1))
    elif name == "d_pace":
        w_TX = d_pace(draft_gold_TX, mask_TX, *number)
    else:
        step_T = jnp.arange(len(mask_TX), dtype=draft_gold_TX.dtype)
        w_T = {"none": jnp.ones_like, "exp": exponential, "power": power}[name](step_T, *number)
        w_TX = w_T.reshape(-1, *(1 for _ in mask_TX.shape[1:]))
    return jnp.where(mask_TX, w_TX, 0)


def divides_by_weights(spec: str) -> bool:
    """Returns whether a mean under this weighting divides by the sum of its weights, or by the count of tokens."""
    # `cat` weights are probabilities to reach a slot, so their scale means nothing. Those of `d_pace` are a gradient,
    # whose scale counts. For weights of the step alone the choice is a constant factor.
    return read_spec("position weight", spec, POSITION_WEIGHTS)[0] == "cat"


def exponential(step: Array, gamma: float) -> Array:
    """Returns `exp(-j / gamma)` (DFlash, arXiv 2602.06036: 7 for blocks of 16; DSpark: 4 for blocks of 7)."""
    return jnp.exp(-step / gamma)


def power(step: Array, beta: float) -> Array:
    """Returns `beta^j` (EAGLE-3 and Medusa: 0.8)."""
    return beta**step


def cat(target_gold_TX: Array) -> Array:
    """Returns `w_j = prod_{i < j} p_i`, the target's probability to reach step `j` (PARD-2, arXiv 2605.08632)."""
    ones = jnp.ones_like(target_gold_TX[:1])
    return jnp.concatenate([ones, jnp.cumprod(target_gold_TX[:-1], axis=0)])


def d_pace(draft_gold_TX: Array, mask_TX: Array, a: float) -> Array:
    """Returns `w_i = sum_{j >= i} prod_{l <= j} s_l` with `s = (1 - a) q + a` (D-PACE, arXiv 2605.18810).

    It is the gradient of the expected accept length `sum_j prod_{l <= j} s_l` by `log s_i`. An `a` above 0 keeps the
    weights of late steps from vanishing while drafts are poor. Sum and product are over the steps in the mask.
    """
    kept_TX = jnp.cumprod(jnp.where(mask_TX, (1 - a) * draft_gold_TX + a, 1), axis=0)
    return jnp.cumsum(jnp.where(mask_TX, kept_TX, 0)[::-1], axis=0)[::-1]
