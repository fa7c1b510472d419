"""The EAGLE-1/2 head: one decoder layer over (next token's embedding, target feature) below the target's LM head.

EAGLE (Li et al. 2024, section 4) and EAGLE-2 share this network; EAGLE-2 differs in the tree. Unrolled for several
steps with `unroll` it is the network HASS trains.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxspec import cache as kv
from jaxspec.base import ROOT, Array, Borrowed, Frontier, KVCache, Params
from jaxspec.layers import (
    MASKED,
    Prefix,
    RopeScaling,
    attend,
    attend_causal,
    gated_mlp,
    merge_heads,
    project_qkv,
    rms_norm,
    rope,
    rope_frequencies,
    score_tokens,
)


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """The shape of an EAGLE head. `width` is the target's; the heads need not be."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    bias: bool = True
    """Whether the fusion layer `fc` has a bias: Llama-2 and Vicuna heads do, Llama-3 heads do not."""
    embedding_norm: bool = False
    """An RMSNorm on the token embedding before fusion, which some published HASS heads have."""
    head_norm: bool = False
    """An RMSNorm between the layer's output and the LM head, likewise; the recurrent feature is taken before it."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")

    @property
    def group(self) -> int:
        """Query heads per key-value head, `G`."""
        return self.heads // self.kv_heads


def eagle_shapes(config: EagleConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight. There is no attention norm: the head reads post-norm features (EAGLE issue 91)."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {"fc": (2 * c.width, c.width)}
    if c.bias:
        shapes["fc_bias"] = (c.width,)
    if c.embedding_norm:
        shapes["embedding_norm"] = (c.width,)
    shapes |= {
        "qkv": (c.width, c.kv_heads, c.group + 2, c.head_dim),
        "out": (c.kv_heads, c.group, c.head_dim, c.width),
        "mlp_norm": (c.width,),
        "gate": (c.width, c.mlp),
        "up": (c.width, c.mlp),
        "down": (c.mlp, c.width),
    }
    if c.head_norm:
        shapes["head_norm"] = (c.width,)
    return shapes


def init_eagle_weight(key: Array, name: str, shape: tuple[int, ...]) -> Array:
    """The reference's initialisation: norms one, all else U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    if name.endswith("norm"):
        return jnp.ones(shape, jnp.float32)
    fan_in = {"out": math.prod(shape[:-1]), "fc_bias": 2 * shape[0]}.get(name, shape[0])
    return jax.random.uniform(key, shape, jnp.float32, -(fan_in**-0.5), fan_in**-0.5)


class EagleState(NamedTuple):
    """What a row has drafted from so far."""

    cache: KVCache
    """One layer's keys and values of the committed (feature, next token) pairs."""
    length_B: Array
    """Committed pairs; the pair of feature `f_t` sits in slot `t` and has rotary position `t`."""
    hidden_BD: Array
    """The head's output at the last pair: the feature its root's children are drafted with."""


class EagleScratch(NamedTuple):
    """Keys, values and outputs of the nodes expanded this round, by scratch slot."""

    k_BKCM: Array
    v_BKMC: Array
    hidden_BMD: Array


class Eagle(nn.Module):
    """The EAGLE-1/2 head as pure functions of its weights."""

    config: EagleConfig
    dtype: Any = jnp.float32
    """Dtype of activations and cache; softmax, norms and logits are fp32 throughout."""
    query_block: int | None = None
    """Training only: the first unrolled step attends in blocks of so many queries, see `attend_causal`."""
    row_by_row: bool = False
    """Attend one batch row after another where `query_block` applies: keeps the scores in a CPU's cache."""

    def setup(self) -> None:
        self.weights = {
            name: self.param(name, init_eagle_weight, name, shape) for name, shape in eagle_shapes(self.config).items()
        }

    # Pieces, as Flax methods.

    def fuse(self, embedding_BLD: Array, features_BLD: Array) -> Array:
        """`fc([embedding; feature])`, the embedding first."""
        w = self.weights
        if self.config.embedding_norm:
            embedding_BLD = rms_norm(embedding_BLD, w["embedding_norm"], self.config.norm_eps)
        pair = jnp.concatenate([embedding_BLD.astype(self.dtype), features_BLD.astype(self.dtype)], axis=-1)
        fused = jnp.einsum("BLE,ED->BLD", pair, w["fc"].astype(self.dtype))
        return fused + w["fc_bias"].astype(self.dtype) if self.config.bias else fused

    def project(self, fused_BLD: Array, positions_BL: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values at rotary positions; no norm before them."""
        c = self.config
        cos, sin = rope(positions_BL, rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
        return project_qkv(self.weights, fused_BLD, cos, sin)

    def finish(self, fused_BLD: Array, mixed_BLKGC: Array) -> Array:
        """The layer's output from its attention: the predicted feature."""
        x = fused_BLD + merge_heads(self.weights, mixed_BLKGC)
        return x + gated_mlp(self.weights, rms_norm(x, self.weights["mlp_norm"], self.config.norm_eps))

    def score(self, hidden_BLD: Array, head_VD: Array) -> Array:
        """fp32 logits of outputs under the target's LM head."""
        if self.config.head_norm:
            hidden_BLD = rms_norm(hidden_BLD, self.weights["head_norm"], self.config.norm_eps)
        return score_tokens(hidden_BLD, head_VD)

    def _extend(
        self, borrowed: Borrowed, state: EagleState, tokens_BL: Array, features_BLD: Array, count_B: Array
    ) -> tuple[EagleState, Array]:
        length = tokens_BL.shape[1]
        fused = self.fuse(borrowed.embed_VD[tokens_BL], features_BLD)
        positions_BL = state.length_B[:, None] + jnp.arange(length)
        q, k, v = self.project(fused, positions_BL)
        causal = jnp.tril(jnp.ones((1, length, length), bool))
        hidden = self.finish(fused, attend(q, k, v, causal, Prefix(state.cache, 0, state.length_B)))
        last = jnp.maximum(count_B - 1, 0)[:, None, None]
        hidden_BD = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
        hidden_BD = jnp.where((count_B > 0)[:, None], hidden_BD, state.hidden_BD)
        cache = kv.commit(state.cache, KVCache(k[None], v[None]), state.length_B, jnp.argmax(hidden_BD, axis=-1))
        logits_BV = self.score(hidden_BD[:, None], borrowed.head_VD)[:, 0]
        return EagleState(cache, state.length_B + count_B, hidden_BD), logits_BV

    def _expand(
        self, borrowed: Borrowed, state: EagleState, scratch: EagleScratch, frontier: Frontier
    ) -> tuple[Array, EagleScratch]:
        width = frontier.token_BW.shape[1]
        begin, end = frontier.slot, frontier.slot + width
        parent = jnp.maximum(frontier.parent_BW, 0)[..., None]
        drafted = jnp.take_along_axis(scratch.hidden_BMD, parent, axis=1)
        feature = jnp.where((frontier.parent_BW == ROOT)[..., None], state.hidden_BD[:, None], drafted)
        fused = self.fuse(borrowed.embed_VD[frontier.token_BW], feature)
        positions_BW = jnp.broadcast_to((state.length_B + frontier.depth - 1)[:, None], frontier.token_BW.shape)
        q, k, v = self.project(fused, positions_BW)
        keys = scratch.k_BKCM.at[..., begin:end].set(k)
        values = scratch.v_BKMC.at[:, :, begin:end].set(v)
        past = Prefix(state.cache, 0, state.length_B)
        mixed = attend(q, keys[..., :end], values[:, :, :end], frontier.visible_BWM, past)
        hidden = self.finish(fused, mixed)
        scratch = EagleScratch(keys, values, scratch.hidden_BMD.at[:, begin:end].set(hidden))
        return self.score(hidden, borrowed.head_VD), scratch

    def _unroll(
        self, borrowed: Borrowed, next_BL: Array, features_BLD: Array, positions_BL: Array, mask_BLM: Array, steps: int
    ) -> Array:
        outputs, keys, values = [], [], []
        feature, token = features_BLD, next_BL
        for step in range(steps):
            fused = self.fuse(borrowed.embed_VD[token], feature)
            q, k, v = self.project(fused, positions_BL + step)
            mixed = self._attend_row(q, k, v, mask_BLM, keys, values)
            keys.append(k)
            values.append(v)
            hidden = self.finish(fused, mixed)
            outputs.append(hidden)
            feature = jax.lax.stop_gradient(hidden)
            token = jnp.pad(token[:, 1:], ((0, 0), (0, 1)))
        return jnp.stack(outputs)

    def _attend_row(
        self, q: Array, k: Array, v: Array, mask_BLM: Array, keys: list[Array], values: list[Array]
    ) -> Array:
        """Causal attention over step 0's keys plus one key per later step at the row's own index, in one softmax."""
        if not keys and self.query_block and self.query_block < q.shape[1]:
            return attend_causal(q, k, v, mask_BLM, block=self.query_block, by_row=self.row_by_row)
        if not keys:
            return attend(q, k, v, mask_BLM)
        q = q * jnp.asarray(self.config.head_dim**-0.5, q.dtype)
        causal = jnp.einsum("BLKGC,BKCM->BKGLM", q, keys[0], preferred_element_type=jnp.float32)
        causal = jnp.where(mask_BLM[:, None, None], causal, MASKED)
        later_k, later_v = [*keys[1:], k], [*values[1:], v]
        diagonal = [jnp.einsum("BLKGC,BKCL->BKGL", q, x, preferred_element_type=jnp.float32) for x in later_k]
        length = causal.shape[-1]
        weight = jax.nn.softmax(jnp.concatenate([causal, jnp.stack(diagonal, axis=-1)], axis=-1), axis=-1)
        weight = weight.astype(v.dtype)
        mixed = jnp.einsum("BKGLM,BKMC->BLKGC", weight[..., :length], values[0])
        for j, x in enumerate(later_v):
            mixed = mixed + jnp.einsum("BKGL,BKLC->BLKGC", weight[..., length + j], x)
        return mixed

    def __call__(self, borrowed: Borrowed, next_BL: Array, features_BLD: Array, positions_BL: Array) -> Array:
        """One unrolled step; used to initialise."""
        mask = jnp.tril(jnp.ones((1, next_BL.shape[1], next_BL.shape[1]), bool))
        return self._unroll(borrowed, next_BL, features_BLD, positions_BL, mask, 1)

    # The drafter contract, as functions of explicit weights.

    def init_params(self, key: Array) -> Params:
        """Random weights as the reference initialises them."""
        token, c = jnp.zeros((1, 1), jnp.int32), self.config
        table = jnp.zeros((1, c.width), self.dtype)
        return self.init(key, Borrowed(table, table), token, jnp.zeros((1, 1, c.width), self.dtype), token)["params"]

    def init_state(self, batch: int, capacity: int) -> EagleState:
        """Empty state for contexts of up to `capacity` tokens."""
        c = self.config
        cache = kv.empty(1, batch, c.kv_heads, c.head_dim, capacity, self.dtype)
        return EagleState(cache, jnp.zeros(batch, jnp.int32), jnp.zeros((batch, c.width), self.dtype))

    def extend(
        self,
        params: Params,
        borrowed: Borrowed,
        state: EagleState,
        tokens_BL: Array,
        features_BLD: Array,
        count_B: Array,
    ) -> tuple[EagleState, Array]:
        """Take in up to `L` pairs (feature, next token), `count` of them real, and score the root's children.

        Returns the new state and logits `[B, V]`. Rows with count 0 keep their state.
        """
        return self.apply({"params": params}, borrowed, state, tokens_BL, features_BLD, count_B, method="_extend")  # type: ignore[return-value]

    def scratch(self, state: EagleState, slots: int) -> EagleScratch:
        """Working memory for `slots` expanded nodes."""
        c, batch = self.config, state.length_B.shape[0]
        return EagleScratch(
            jnp.zeros((batch, c.kv_heads, c.head_dim, slots), self.dtype),
            jnp.zeros((batch, c.kv_heads, slots, c.head_dim), self.dtype),
            jnp.zeros((batch, slots, c.width), self.dtype),
        )

    def expand(
        self, params: Params, borrowed: Borrowed, state: EagleState, scratch: EagleScratch, frontier: Frontier
    ) -> tuple[Array, EagleScratch]:
        """Logits `[B, W, V]` of the children of one level's nodes. A node's feature is its parent's output."""
        return self.apply({"params": params}, borrowed, state, scratch, frontier, method="_expand")  # type: ignore[return-value]

    def unroll(
        self,
        params: Params,
        borrowed: Borrowed,
        next_BL: Array,
        features_BLD: Array,
        positions_BL: Array,
        mask_BLM: Array,
        steps: int,
    ) -> Array:
        """Outputs `[T, B, L, D]` of `steps` draft steps from every position at once (HASS's alignment, row layout).

        Row `i` at step `j` is what sequential drafting from `f_i` puts out after reading `x_{i+1} .. x_{i+j+1}`; it
        predicts `f_{i+j+1}` and the token after. `next_BL[i] = x_{i+1}`. Features handed from step to step carry no
        gradient. Rows whose tokens run past the document are garbage for the loss mask to drop.
        """
        return self.apply(  # type: ignore[return-value]
            {"params": params}, borrowed, next_BL, features_BLD, positions_BL, mask_BLM, steps, method="_unroll"
        )

    def logits(self, params: Params, borrowed: Borrowed, hidden: Array) -> Array:
        """fp32 logits `[B, L, V]` of outputs `[B, L, D]`."""
        return self.apply({"params": params}, hidden, borrowed.head_VD, method="score")  # type: ignore[return-value]
