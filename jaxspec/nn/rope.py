"""Rotary positions: frequencies, their scaling, and the rotation."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from jaxspec.base import Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A scaling of rotary frequencies, for texts longer than those of pretraining.

    * `linear` divides every frequency by `factor`.
    * `llama3` (Llama 3.1 model card) keeps wavelengths below `original_positions / high_freq_factor`, divides those
      above `original_positions / low_freq_factor`, and interpolates between.
    * `yarn` (arXiv 2309.00071) keeps the frequencies of the first channels, up to `low`, divides those from `high` on,
      and interpolates between.
    * `longrope` (arXiv 2402.13753) divides each frequency by its own of `factors`, or of `long_factors` in texts that
      may become longer than `original_positions`.
    * `dynamic` (NTK) raises the base by how far a text may go beyond `original_positions`.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    low: float = dataclasses.field(default=0.0, repr=False)
    high: float = dataclasses.field(default=1.0, repr=False)
    turns: tuple[float, float] = dataclasses.field(default=(32.0, 1.0), repr=False)
    """Turns of the channels `low` and `high` within the original length (`beta_fast`, `beta_slow` of config.json)."""
    truncate: bool = dataclasses.field(default=True, repr=False)
    """Whether `low` and `high` were rounded to whole channels."""
    factors: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    long_factors: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    amplitude: float = dataclasses.field(default=1.0, repr=False)
    """Factor of queries and keys where they are rotated."""

    def __post_init__(self) -> None:
        for name in ("turns", "factors", "long_factors"):  # a drafter's saved file has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))


def rope_frequencies(channels: int, theta: float, scaling: RopeScaling | None = None, length: int = 0) -> Array:
    """Returns angular frequencies `[C / 2]`, in radians per position, for texts of at most `length` tokens."""
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
    """Returns cosine and sine `[B, L, C / 2]` of every position, fp32, times `amplitude`."""
    angle = positions_BL[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Without a product by 1, models without an amplitude keep their programs.
    return (cos, sin) if amplitude == 1 else (amplitude * cos, amplitude * sin)


def rotate(x_BLKJC: Array, cos_BLC: Array, sin_BLC: Array) -> Array:
    """Rotates channel `i` with channel `i + C/2` by the position's angle, the half-split form of Llama checkpoints.

    Where there are angles for fewer channels, only the first channels are rotated.
    """
    turned = 2 * cos_BLC.shape[-1]
    if turned < x_BLKJC.shape[-1]:
        first = rotate(x_BLKJC[..., :turned], cos_BLC, sin_BLC)
        return jnp.concatenate([first, x_BLKJC[..., turned:]], axis=-1)
    # The rotation is fp32 and rounded once, at its end.
    first, second = jnp.split(x_BLKJC.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BLC[:, :, None, None, :], sin_BLC[:, :, None, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLKJC.dtype)
