"""AdamW or Muon with warm-up and decay, as every training program here uses them."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxspec.base import Array, Params
from jaxspec.nn.weights import declared
from jaxspec.parallel.mesh import leaf_name

OptimizerKind = Literal["adamw", "muon"]
Schedule = Callable[[Any], Array]


def make_schedule(
    *,
    peak_lr: float,
    steps: int,
    warmup_steps: int = 0,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    final_lr_fraction: float = 0.0,
) -> Schedule:
    """Returns the learning rate by update: linear up to `peak_lr`, then down to a fraction of it at `steps`."""

    def rate(count: Any) -> Array:
        done = jnp.clip((count - warmup_steps) / max(steps - warmup_steps, 1), 0.0, 1.0)
        left = {"cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)), "linear": 1 - done, "constant": jnp.ones_like(done)}[
            schedule
        ]
        warm = jnp.minimum((count + 1) / (warmup_steps + 1), 1.0)
        return peak_lr * warm * (final_lr_fraction + (1 - final_lr_fraction) * left)

    return rate


def make_optimizer(
    rate: Schedule,
    *,
    kind: OptimizerKind = "adamw",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    clip_norm: float | None = None,
    clip_value: float | None = None,
) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov and Hutter 2019) or Muon (Jordan et al. 2024) behind gradient clipping.

    Norms and biases do not decay.

    Muon makes the momentum of every matrix orthogonal, scaled so that AdamW's learning rates suit it (Liu et al. 2025),
    with momentum 0.95; tables of tokens, norms and biases stay with Adam (Nesterov's), and do not decay.
    """
    clips = [] if clip_value is None else [optax.clip(clip_value)]
    clips += [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    if kind == "adamw":
        return optax.chain(*clips, optax.adamw(rate, *betas, eps, weight_decay=weight_decay, mask=_decays))
    muon = contrib.muon(
        rate,
        eps=eps,
        weight_decay=weight_decay,
        weight_decay_mask=_decays,
        adam_b1=betas[0],
        adam_b2=betas[1],
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,
    )
    return optax.chain(*clips, muon)


def _matrices(params: Params) -> Any:
    """Returns how Muon reads each weight: as its declared matrix, or as many as stacked layers or heads there are.

    None for a weight that Adam takes.
    """

    def read(path: Any, weight: Array) -> contrib.MuonDimensionNumbers | None:
        axes = declared(leaf_name(path[-1:])).matrix
        if axes is None:
            return None
        summed = tuple(weight.ndim + axis for axis in axes)
        return contrib.MuonDimensionNumbers(summed, tuple(range(summed[-1] + 1, weight.ndim)))

    return jax.tree_util.tree_map_with_path(read, params)


def _decays(params: Params) -> Any:
    """Returns for each weight whether it is declared to decay: norms and biases are not."""
    return jax.tree_util.tree_map_with_path(lambda path, _: declared(leaf_name(path[-1:])).decays, params)
