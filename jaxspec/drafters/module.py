"""What every drafter of this package is: a frozen Flax module that says what it can do, unless it says otherwise."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxspec.base import Array, Mask, Params, SharedTables
from jaxspec.nn.attention import NO_KEYS, AttentionOptions, PerQueryKeys, attend_text
from jaxspec.nn.kernels import Kernel
from jaxspec.nn.remat import Remat


class DrafterModule(nn.Module):
    """The description of a drafter, its weights apart. Abstract: what drafts is said by those below it.

    By default a node may be of any depth, each depth takes a pass, and logits are those of the target's LM head over
    its features.
    """

    config: Any
    """The drafter's shape: a frozen dataclass."""
    dtype: Any = jnp.float32
    """Dtype of activations and cache; softmax, norms and logits are fp32 throughout."""
    query_block: int | None = None
    """Training only: attend in blocks of so many queries, see `attend_causal`. Drafters without attention ignore it."""
    row_by_row: bool = False
    """Attend one batch row after another where `query_block` applies: keeps the scores in a CPU's cache."""
    kernel: Kernel = "xla"
    """Training only: what attends over packed rows, see `attend_text`."""
    remat: Remat = "none"
    """Training only: what the backward pass of each step or layer computes again, see `recompute`."""

    def attend_text(self, q: Array, k: Array, v: Array, mask_BLM: Mask, per_query: PerQueryKeys = NO_KEYS) -> Array:
        """Causal attention of whole training rows, in the way that the fields above say."""
        options = AttentionOptions(query_block=self.query_block, row_by_row=self.row_by_row, kernel=self.kernel)
        return attend_text(q, k, v, mask_BLM, per_query=per_query, options=options)

    @property
    def deepest(self) -> int | None:
        """Greatest depth of a node; None without a limit."""
        return None

    @property
    def one_pass(self) -> bool:
        """Whether one pass drafts all depths."""
        return False

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose inputs it reads; empty: the target's features, or nothing of it."""
        return ()

    @property
    def feature_width(self) -> int | None:
        """Width of the target's features that it reads; None where it reads none."""
        return self.config.width

    @property
    def vocab(self) -> int | None:
        """Tokens that its own LM head scores; None where it borrows the target's."""
        return None

    def is_given(self, name: str) -> bool:
        """Whether a call has the weight `name`: `logits` may be given `scoring(params)` alone."""
        return self.is_initializing() or self.has_variable("params", name)

    def scoring(self, params: Params) -> Params:
        """Returns the weights that `logits` reads: none, for a drafter that scores by the target's LM head."""
        return {}

    def logits(self, params: Params, shared: SharedTables, hidden_BLD: Array, step: int = 0) -> Array:
        """fp32 logits `[B, L, V]` of its outputs `[B, L, D]` for draft step `step`."""
        raise NotImplementedError
