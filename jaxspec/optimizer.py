"""AdamW with warm-up and decay, as every training program here uses it."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxspec.base import Array, Params

Schedule = Callable[[Any], Array]


def make_schedule(
    *,
    peak_lr: float,
    steps: int,
    warmup_steps: int = 0,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    final_lr_fraction: float = 0.0,
) -> Schedule:
    """Learning rate by update: linear to `peak_lr` in `warmup_steps`, then down to a fraction of it at `steps`."""

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
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    clip_norm: float | None = None,
    clip_value: float | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) behind gradient clipping; norms and biases do not decay."""
    clips = [] if clip_value is None else [optax.clip(clip_value)]
    clips += [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    return optax.chain(*clips, optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=_decays))


def _decays(params: Params) -> Any:
    """True on every weight but norms and biases, told by name: stacked layers give a norm two axes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not str(getattr(path[-1], "key", "")).endswith(("norm", "bias")), params
    )
