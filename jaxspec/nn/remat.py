"""What the backward pass computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax

Remat = Literal["none", "dots", "full"]
"""What the backward pass of a layer computes again: nothing; what is no product with a weight; all of it."""


Function = TypeVar("Function", bound=Callable[..., Any])


def recompute(remat: Remat, function: Function) -> Function:
    """`function`, whose backward pass makes again what `remat` says and keeps the rest."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(function, policy=policy)  # type: ignore[return-value]
