"""The pieces of a decoder layer: norms, rotary positions, attention over (cached prefix + tree), gated MLP."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxspec.base import Array, Params

MASKED = -1e30
"""Score of a key that a query does not see: far below any real score, and finite, so a row without keys is not NaN."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretraining length.

    `linear` divides every frequency by `factor`; `llama3` (Llama 3.1 model card) leaves wavelengths below
    `original_positions / high_freq_factor` alone, divides those above `original_positions / low_freq_factor` and
    interpolates between.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis, statistics in fp32, in `x`'s dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * wide.astype(x.dtype)


def rope_frequencies(channels: int, theta: float, scaling: RopeScaling | None = None) -> Array:
    """Angular frequencies `[C / 2]`, radians a position."""
    frequency = 1.0 / theta ** (jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original_positions * frequency / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def rope(positions_BL: Array, frequencies: Array) -> tuple[Array, Array]:
    """Cosine and sine `[B, L, C / 2]`, fp32, of every position."""
    angle = positions_BL[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BLKJC: Array, cos_BLC: Array, sin_BLC: Array) -> Array:
    """Rotate channel `i` with channel `i + C/2` by the position's angle (the half-split form of Llama checkpoints)."""
    first, second = jnp.split(x_BLKJC.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BLC[:, :, None, None, :], sin_BLC[:, :, None, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLKJC.dtype)


def project_qkv(layer: Params, x_BLD: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
    """Rotated queries `[B, L, K, G, C]`, rotated keys `[B, K, C, L]` and values `[B, K, L, C]`.

    One fused weight `qkv [D, K, G + 2, C]` (queries of the group, its key, its value): one matmul, and it shards over
    the key-value heads as it stands.
    """
    qkv_BLKJC = jnp.einsum("BLD,DKJC->BLKJC", x_BLD, layer["qkv"].astype(x_BLD.dtype))
    turned = rotate(qkv_BLKJC[..., :-1, :], cos, sin)
    k_BKCL = jnp.transpose(turned[..., -1, :], (0, 2, 3, 1))
    v_BKLC = jnp.transpose(qkv_BLKJC[..., -1, :], (0, 2, 1, 3))
    return turned[..., :-1, :], k_BKCL, v_BKLC


def attend(
    q_BLKGC: Array,
    k_BKCM: Array,
    v_BKMC: Array,
    mask_BLM: Array,
    prefix: tuple[Array, Array, Array] | None = None,
) -> Array:
    """Attention of `L` queries over the call's own keys (by mask) and the whole committed prefix: `[B, L, K, G, C]`.

    `prefix` is one layer's `(k [B, K, C, S], v [B, K, S, C], length [B])`; every query sees the first `length` slots,
    so a tree needs only its own ancestor mask. One fp32 softmax spans both parts. Scale `1 / sqrt(C)`.
    """
    q = q_BLKGC * jnp.asarray(q_BLKGC.shape[-1] ** -0.5, q_BLKGC.dtype)
    own = jnp.einsum("BLKGC,BKCM->BKGLM", q, k_BKCM, preferred_element_type=jnp.float32)
    own = jnp.where(mask_BLM[:, None, None], own, MASKED)
    top = jnp.max(own, axis=-1, keepdims=True)
    if prefix is None:
        weight = jnp.exp(own - top)
        total = jnp.sum(weight, axis=-1, keepdims=True)
        return jnp.einsum("BKGLM,BKMC->BLKGC", (weight / total).astype(v_BKMC.dtype), v_BKMC)
    k_BKCS, v_BKSC, length_B = prefix
    past = jnp.einsum("BLKGC,BKCS->BKGLS", q, k_BKCS.astype(q.dtype), preferred_element_type=jnp.float32)
    seen_BS = jnp.arange(k_BKCS.shape[-1]) < length_B[:, None]
    past = jnp.where(seen_BS[:, None, None, None], past, MASKED)
    top = jnp.maximum(top, jnp.max(past, axis=-1, keepdims=True))
    weight, past_weight = jnp.exp(own - top), jnp.exp(past - top)
    total = jnp.sum(weight, axis=-1, keepdims=True) + jnp.sum(past_weight, axis=-1, keepdims=True)
    mixed = jnp.einsum("BKGLM,BKMC->BLKGC", (weight / total).astype(v_BKMC.dtype), v_BKMC)
    return mixed + jnp.einsum("BKGLS,BKSC->BLKGC", (past_weight / total).astype(v_BKMC.dtype), v_BKSC.astype(q.dtype))


def attend_causal(q_BLKGC: Array, k_BKCM: Array, v_BKMC: Array, mask_BLM: Array, block: int) -> Array:
    """`attend` of `L = M` tokens among themselves under a causal mask: `[B, L, K, G, C]`, for training.

    Queries go in blocks of `block`, each against the keys up to its own end, so about half of the scores are never
    computed; the backward pass recomputes a block instead of keeping `[B, H, L, L]`. A mask that lets a token see a
    later one is cut off at the block. On two CPU cores at `L = 512` gradients take a fifth of `attend`'s time.
    """

    @jax.checkpoint
    def one(q: Array, k: Array, v: Array, mask: Array) -> Array:
        B, L, K, G, C = q.shape
        q_BKNC = jnp.transpose(q * jnp.asarray(C**-0.5, q.dtype), (0, 2, 3, 1, 4)).reshape(B, K, G * L, C)
        score = jnp.matmul(q_BKNC, k, preferred_element_type=jnp.float32).reshape(B, K, G, L, -1)
        weight = jax.nn.softmax(jnp.where(mask[:, None, None], score, MASKED), axis=-1).astype(v.dtype)
        mixed = jnp.matmul(weight.reshape(B, K, G * L, -1), v).reshape(B, K, G, L, C)
        return jnp.transpose(mixed, (0, 3, 1, 2, 4))

    ends = [(i, min(i + block, q_BLKGC.shape[1])) for i in range(0, q_BLKGC.shape[1], block)]
    return jnp.concatenate(
        [one(q_BLKGC[:, i:e], k_BKCM[..., :e], v_BKMC[:, :, :e], mask_BLM[:, i:e, :e]) for i, e in ends], axis=1
    )


def merge_heads(layer: Params, mixed_BLKGC: Array) -> Array:
    """The attention output projection, `[B, L, D]`."""
    return jnp.einsum("BLKGC,KGCD->BLD", mixed_BLKGC, layer["out"].astype(mixed_BLKGC.dtype))


def gated_mlp(layer: Params, x_BLD: Array) -> Array:
    """`down(silu(gate(x)) * up(x))`; gate and up are one weight `[D, 2, F]`."""
    hidden = jnp.einsum("BLD,DEF->BLEF", x_BLD, layer["gate_up"].astype(x_BLD.dtype))
    return jnp.einsum(
        "BLF,FD->BLD", jax.nn.silu(hidden[:, :, 0]) * hidden[:, :, 1], layer["down"].astype(x_BLD.dtype)
    )


def causal_mask(length: int) -> Array:
    """`[1, L, L]`: a token sees itself and those before it."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def segment_mask(segments_BL: Array) -> Array:
    """`[B, L, L]`: causal, and within one packed document. Segment 0 is padding and sees only itself."""
    same = segments_BL[:, :, None] == segments_BL[:, None, :]
    real = (segments_BL > 0)[:, :, None]
    return (same & real & causal_mask(segments_BL.shape[1])) | jnp.eye(segments_BL.shape[1], dtype=bool)[None]
