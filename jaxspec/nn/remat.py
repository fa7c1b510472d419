"""Rematerialization: the backward pass computes values again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax

Remat = Literal["none", "dots", "full"]
"""Values of a layer that the backward pass computes again: none; all but products with weights (`dots`); all."""

Function = TypeVar("Function", bound=Callable[..., Any])


def recompute(remat: Remat, function: Function) -> Function:
    """Returns `function` with a backward pass that computes again the values that `remat` names and keeps the rest."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(function, policy=policy)  # type: ignore[return-value]
