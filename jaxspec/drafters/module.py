"""The base of this package's drafters: a frozen Flax module with its weights apart, and the options of its shape."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxspec.base import Array, Mask, Params, SharedTables, Unrolled, UnrollInputs
from jaxspec.nn.attention import NO_KEYS, AttentionOptions, PerQueryKeys, attend_text
from jaxspec.nn.kernels import Kernel
from jaxspec.nn.matmul import outputs_first
from jaxspec.nn.remat import Remat
from jaxspec.nn.rope import RopeScaling
from jaxspec.nn.weights import Weight, init_of, init_weights

SIZES = ("heads", "kv_heads", "head_dim", "width", "mlp", "layers", "tokens")
"""Options of drafters that count something."""


class TargetShape(NamedTuple):
    """Sizes of a target that a drafter's shape may follow."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    layers: int
    vocab: int
    """Tokens of the target."""
    scored: int
    """Tokens that the drafter scores: all, or those of its draft vocabulary."""

    def pick(self, *names: str) -> dict[str, Any]:
        """The fields called so."""
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class DrafterOptions:
    """Options of a drafter's shape in an experiment, named as the fields of the drafter's config.

    Every field is None by default, and what is None follows the target or the default of the drafter's config.
    """

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"field {name!r} cannot be {value}; it must be at least 1")

    def follow(self, target: TargetShape) -> dict[str, Any]:
        """The fields of the drafter's config that follow the target, unless they are given."""
        return {}

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are set."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}


class DrafterModule(nn.Module):
    """The description of a drafter, its weights apart. Abstract: what drafts is said by those below it.

    By default a node may be of any depth, each depth takes a pass, logits are those of the target's LM head over its
    features, and the weights are those of `config.shapes()`, as `declarations` says.
    """

    config: Any
    """The drafter's shape: a frozen dataclass."""
    dtype: Any = jnp.float32
    """Dtype of activations and cache; softmax, norms and logits are fp32 throughout."""
    token_major: bool = False
    """Decoding only: keys lie token by token in the cache, for CPUs (`base.TokenMajorCache`)."""
    query_block: int | None = None
    """Training only: attend in blocks of so many queries, see `attend_causal`. Drafters without attention ignore it."""
    row_by_row: bool = False
    """Attend one batch row after another where `query_block` applies: keeps the scores in a CPU's cache."""
    kernel: Kernel = "xla"
    """Training only: what attends over packed rows, see `attend_text`."""
    remat: Remat = "none"
    """Training only: what the backward pass of each step or layer computes again, see `recompute`."""

    declarations: ClassVar[dict[str, Weight]] = {}
    """The weights it may have, as its file declares them (`jaxspec.nn.weights`)."""

    def setup(self) -> None:
        shapes = self.config.shapes()
        weights = {
            name: self.param(name, init_of(self.declarations, name), shape)
            for name, shape in shapes.items()
            if self.is_given(name)
        }
        # Matrices laid out for decoding on a CPU stand in for those that are not given.
        laid = [name for name in map(outputs_first, shapes) if self.has_variable("params", name)]
        self.weights = weights | {name: self.get_variable("params", name) for name in laid}

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
        """Returns whether one pass drafts all depths."""
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
        """Tokens that its own LM head scores; None where it shares the target's."""
        return None

    def is_given(self, name: str) -> bool:
        """Returns whether a call has the weight `name`: `logits` may be given `scoring(params)` alone."""
        return self.is_initializing() or self.has_variable("params", name)

    def scoring(self, params: Params) -> Params:
        """Returns the weights that `logits` reads: none, for a drafter that scores by the target's LM head."""
        return {}

    def init_params(self, key: Array, shared: SharedTables | None = None) -> Params:
        """Fresh weights with their declared initial values; the key of each is folded with its number in `shapes()`."""
        return init_weights(self.declarations, self.config.shapes(), key)

    def unroll(self, params: Params, shared: SharedTables, inputs: UnrollInputs, steps: int) -> Unrolled:
        """`steps` draft steps from every position, see `base.Learner`."""
        return self.apply({"params": params}, shared, inputs, steps, method="_unroll")  # type: ignore[return-value]

    def _unroll(self, shared: SharedTables, inputs: UnrollInputs, steps: int) -> Unrolled:
        raise NotImplementedError

    def logits(self, params: Params, shared: SharedTables, hidden_BLD: Array, step: int = 0) -> Array:
        """fp32 logits `[B, L, V]` of its outputs `[B, L, D]` for draft step `step`."""
        raise NotImplementedError


def at_newest(x_BLX: Array, count_B: Array, before_BX: Array) -> Array:
    """Each row of `x` at the last of its `count` real positions; `before` where there is none."""
    last = jnp.maximum(count_B - 1, 0)[:, None, None]
    return jnp.where((count_B > 0)[:, None], jnp.take_along_axis(x_BLX, last, axis=1)[:, 0], before_BX)
