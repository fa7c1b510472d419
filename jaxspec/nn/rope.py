"""Rotary positions: frequencies, their scaling, and the rotation."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from jaxspec.base import Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretraining length.

    `linear` divides every frequency by `factor`; `llama3` (Llama 3.1 model card) leaves wavelengths below
    `original_positions / high_freq_factor` alone, divides those above `original_positions / low_freq_factor` and
    interpolates between; `yarn` (arXiv 2309.00071) interpolates by channel, between `low` and `high`, from frequencies
    left alone to divided ones; `longrope` (arXiv 2402.13753) divides each frequency by its own of `factors`, in texts
    that may become longer than `original_positions` by that of `long_factors`; `dynamic` (NTK) raises the base by how
    far a text may go beyond `original_positions`.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    low: float = dataclasses.field(default=0.0, repr=False)
    high: float = dataclasses.field(default=1.0, repr=False)
    turns: tuple[float, float] = dataclasses.field(default=(32.0, 1.0), repr=False)
    """Within the original length, of the channels `low` and `high` (`beta_fast` and `beta_slow` of config.json)."""
    truncate: bool = dataclasses.field(default=True, repr=False)
    """Whether `low` and `high` were rounded to whole channels."""
    factors: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    long_factors: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    amplitude: float = dataclasses.field(default=1.0, repr=False)
    """Queries and keys are longer by this where they are rotated."""

    def __post_init__(self) -> None:
        for name in ("turns", "factors", "long_factors"):  # lists in a file that a drafter was saved with
            object.__setattr__(self, name, tuple(getattr(self, name)))


def rope_frequencies(channels: int, theta: float, scaling: RopeScaling | None = None, length: int = 0) -> Array:
    """Angular frequencies `[C / 2]`, radians a position, in texts of at most `length` tokens."""
    if scaling is not None and scaling.kind == "dynamic":
        ratio = max(length, scaling.original_positions) / scaling.original_positions
        theta *= (scaling.factor * ratio - (scaling.factor - 1)) ** (channels / (channels - 2))
    frequency = 1.0 / theta ** (jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    if scaling is None or scaling.kind == "dynamic":
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        beyond = length > scaling.original_positions and scaling.long_factors
        return frequency / jnp.asarray(scaling.long_factors if beyond else scaling.factors, jnp.float32)
    if scaling.kind == "yarn":
        part = jnp.clip((jnp.arange(channels // 2) - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        return frequency / scaling.factor * part + frequency * (1 - part)
    turns = scaling.original_positions * frequency / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def rope(positions_BL: Array, frequencies: Array, amplitude: float = 1.0) -> tuple[Array, Array]:
    """Cosine and sine `[B, L, C / 2]`, fp32, of every position, times `amplitude`."""
    angle = positions_BL[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if amplitude == 1 else (amplitude * cos, amplitude * sin)


def rotate(x_BLKJC: Array, cos_BLC: Array, sin_BLC: Array) -> Array:
    """Rotate channel `i` with channel `i + C/2` by the position's angle (the half-split form of Llama checkpoints).

    Where there are angles for fewer channels, only so many, from the first, are rotated.
    """
    turned = 2 * cos_BLC.shape[-1]
    if turned < x_BLKJC.shape[-1]:
        first = rotate(x_BLKJC[..., :turned], cos_BLC, sin_BLC)
        return jnp.concatenate([first, x_BLKJC[..., turned:]], axis=-1)
    first, second = jnp.split(x_BLKJC.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BLC[:, :, None, None, :], sin_BLC[:, :, None, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLKJC.dtype)
