"""What heads of one decoder layer share: the layer, and drafting step by step from the head's own features."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxspec.base import ROOT, Array, Borrowed, Frontier, KVCache, Mask, Params, Unrolled
from jaxspec.drafters.module import DrafterModule
from jaxspec.nn import cache as kv
from jaxspec.nn.attention import Own, Prefix, attend, causal_mask
from jaxspec.nn.decoder_layer import merge_heads, project_qkv
from jaxspec.nn.lm_head import score_tokens
from jaxspec.nn.norm import rms_norm
from jaxspec.nn.remat import recompute
from jaxspec.nn.rope import RopeScaling, rope, rope_frequencies
from jaxspec.parallel.rows import look_up


class HeadConfig(Protocol):
    """The shape of a head of one layer."""

    @property
    def width(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> RopeScaling | None: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def qk_norm(self) -> bool: ...
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight."""
        ...


def init_weight(key: Array, name: str, shape: tuple[int, ...]) -> Array:
    """EAGLE's initialisation: norms one, all else U(-1/sqrt(fan_in), 1/sqrt(fan_in)); mask slots and embeddings are
    normal(0.02), and biases of the attention, which are ours to choose, zero."""
    if name.endswith("norm"):
        return jnp.ones(shape, jnp.float32)
    if name in ("qkv_bias", "out_bias"):
        return jnp.zeros(shape, jnp.float32)
    if name.startswith("mask") or name == "embed":
        return 0.02 * jax.random.normal(key, shape, jnp.float32)
    fan_in = {"out": math.prod(shape[:-1]), "fc_bias": 2 * shape[0], "head": shape[-1]}.get(name, shape[0])
    return jax.random.uniform(key, shape, jnp.float32, -(fan_in**-0.5), fan_in**-0.5)


class OneLayer(DrafterModule):
    """A head of one decoder layer, as pure functions of its weights. Abstract: see `Recurrent` and `MaskSlots`."""

    config: Any
    """A `HeadConfig`."""

    def setup(self) -> None:
        self.weights = {
            name: self.param(name, init_weight, name, shape) for name, shape in self.config.shapes().items()
        }

    def embedding(self, borrowed: Borrowed, tokens_BL: Array) -> Array:
        """Embeddings `[B, L, D]` of tokens: the target's."""
        return look_up(borrowed.embed_VD, tokens_BL)

    def turn(self, positions_BL: Array) -> tuple[Array, Array]:
        """Cosine and sine of rotary positions."""
        c = self.config
        return rope(positions_BL, rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))

    def project(self, x_BLD: Array, positions_BL: Array, weights: Params | None = None) -> tuple[Array, Array, Array]:
        """Queries, keys and values at rotary positions, of the layer with these weights (default: the one there is)."""
        c = self.config
        norm = functools.partial(rms_norm, eps=c.norm_eps) if c.qk_norm else None
        return project_qkv(weights or self.weights, x_BLD, *self.turn(positions_BL), norm)

    def mix(self, stream_BLD: Array, mixed_BLKGC: Array) -> Array:
        """The residual stream behind the attention."""
        return stream_BLD + merge_heads(self.weights, mixed_BLKGC)

    # The parts of the contract that all of them share.

    def init_params(self, key: Array, borrowed: Borrowed | None = None) -> Params:
        """Random weights as the reference initialises them."""
        return {
            name: init_weight(jax.random.fold_in(key, i), name, shape)
            for i, (name, shape) in enumerate(self.config.shapes().items())
        }

    def extend(
        self, params: Params, borrowed: Borrowed, state: Any, tokens_BL: Array, features_BLD: Array, count_B: Array
    ) -> tuple[Any, Array]:
        """Take in up to `L` pairs (feature, next token), `count` of them real, and score the root's children.

        Returns the new state and logits `[B, V]`. Rows with count 0 keep their state.
        """
        return self.apply({"params": params}, borrowed, state, tokens_BL, features_BLD, count_B, method="_extend")  # type: ignore[return-value]

    def expand(
        self, params: Params, borrowed: Borrowed, state: Any, scratch: Any, frontier: Frontier
    ) -> tuple[Array, Any]:
        """Logits `[B, W, V]` of the children of one level's nodes."""
        return self.apply({"params": params}, borrowed, state, scratch, frontier, method="_expand")  # type: ignore[return-value]

    def unroll(
        self,
        params: Params,
        borrowed: Borrowed,
        tokens_BL: Array,
        features_BLD: Array,
        positions_BL: Array,
        mask_BLM: Mask,
        steps: int,
        keys_B: Array | None = None,
    ) -> Unrolled:
        """`steps` draft steps from every position at once (HASS's context alignment, row layout).

        Row `i` at step `j` is what drafting from `f_i` puts out after reading `x_{i+1} .. x_{i+j+1}`; it predicts
        `f_{i+j+1}` and the token after. Rows whose tokens run past the document are garbage for the loss mask to drop.
        """
        arguments = (borrowed, tokens_BL, features_BLD, positions_BL, mask_BLM, steps, keys_B)
        return self.apply({"params": params}, *arguments, method="_unroll")  # type: ignore[return-value]

    def logits(self, params: Params, borrowed: Borrowed, hidden_BLD: Array, step: int = 0) -> Array:
        """fp32 logits `[B, L, V]` of outputs `[B, L, D]`."""
        return self.apply({"params": params}, hidden_BLD, borrowed.head_VD, method="score")  # type: ignore[return-value]

    def score(self, hidden_BLD: Array, head_VD: Array) -> Array:
        """fp32 logits of outputs under the target's LM head."""
        return score_tokens(hidden_BLD, head_VD)


class RecurrentState(NamedTuple):
    """What a row has drafted from so far."""

    cache: KVCache
    """One layer's keys and values of the committed (feature, next token) pairs."""
    length_B: Array
    """Committed pairs; the pair of feature `f_t` sits in slot `t` and has rotary position `t`."""
    hidden_BD: Array
    """The head's output at the last pair, which its root's children are scored by."""
    feature_BD: Array
    """The feature that goes with it, which its root's children are drafted with."""


class RecurrentScratch(NamedTuple):
    """Keys, values and features of the nodes expanded this round, by scratch slot."""

    k_BKCM: Array
    v_BKMC: Array
    feature_BMD: Array


class Recurrent(OneLayer):
    """A head that drafts step by step, each from the feature the step before put out (EAGLE section 4).

    Abstract: a head says how a pair becomes the layer's input (`fuse`), what comes out of it (`finish`) and, if need
    be, how logits are made (`score`) and what it makes of the target's features first (`read`).
    """

    detach = True
    """Whether features handed from one training step to the next carry no gradient."""
    zero_logits = False
    """Training only: keys that a query must not see count with score 0, as in HASS's released code."""

    def read(self, features_BLD: Array) -> Array:
        """The target's features as the head takes them for its own."""
        return features_BLD

    def fuse(self, embedding_BLD: Array, feature_BLD: Array) -> tuple[Array, Array]:
        """The residual stream, and what queries, keys and values are made of."""
        raise NotImplementedError

    def finish(self, stream_BLD: Array) -> tuple[Array, Array]:
        """From the stream behind the attention: the output that is scored, and the feature for the next step."""
        raise NotImplementedError

    def regressed(self, features_TBLD: Array) -> Array | None:
        """Which of the outputs should equal the target's features; None for none."""
        return features_TBLD

    def _extend(
        self, borrowed: Borrowed, state: RecurrentState, tokens_BL: Array, features_BLD: Array, count_B: Array
    ) -> tuple[RecurrentState, Array]:
        length = tokens_BL.shape[1]
        stream, seen = self.fuse(self.embedding(borrowed, tokens_BL), self.read(features_BLD))
        positions_BL = state.length_B[:, None] + jnp.arange(length)
        q, k, v = self.project(seen, positions_BL)
        past = Prefix(state.cache, 0, state.length_B)
        stream = self.mix(stream, attend(q, k, v, causal_mask(length), past))
        hidden, feature = self.finish(stream)
        hidden_BD, feature_BD = self._at_last(hidden, feature, state, count_B)
        cache = kv.commit(state.cache, KVCache(k[None], v[None]), state.length_B, jnp.argmax(hidden_BD, axis=-1))
        logits_BV = self.score(hidden_BD[:, None], borrowed.head_VD)[:, 0]
        return RecurrentState(cache, state.length_B + count_B, hidden_BD, feature_BD), logits_BV

    def _at_last(
        self, hidden_BLD: Array, feature_BLD: Array, state: RecurrentState, count_B: Array
    ) -> tuple[Array, Array]:
        """Both at each row's last real pair; what the state has where there is none."""
        last = jnp.maximum(count_B - 1, 0)[:, None, None]
        any_B1 = (count_B > 0)[:, None]
        hidden_BD = jnp.where(any_B1, jnp.take_along_axis(hidden_BLD, last, axis=1)[:, 0], state.hidden_BD)
        if feature_BLD is hidden_BLD:
            return hidden_BD, hidden_BD
        return hidden_BD, jnp.where(any_B1, jnp.take_along_axis(feature_BLD, last, axis=1)[:, 0], state.feature_BD)

    def _expand(
        self, borrowed: Borrowed, state: RecurrentState, scratch: RecurrentScratch, frontier: Frontier
    ) -> tuple[Array, RecurrentScratch]:
        width = frontier.token_BW.shape[1]
        begin, end = frontier.slot, frontier.slot + width
        parent = jnp.maximum(frontier.parent_BW, 0)[..., None]
        drafted = jnp.take_along_axis(scratch.feature_BMD, parent, axis=1)
        feature = jnp.where((frontier.parent_BW == ROOT)[..., None], state.feature_BD[:, None], drafted)
        stream, seen = self.fuse(self.embedding(borrowed, frontier.token_BW), feature)
        positions_BW = jnp.broadcast_to((state.length_B + frontier.depth - 1)[:, None], frontier.token_BW.shape)
        q, k, v = self.project(seen, positions_BW)
        keys = scratch.k_BKCM.at[..., begin:end].set(k)
        values = scratch.v_BKMC.at[:, :, begin:end].set(v)
        past = Prefix(state.cache, 0, state.length_B)
        mixed = attend(q, keys[..., :end], values[:, :, :end], frontier.visible_BWM, past)
        hidden, feature = self.finish(self.mix(stream, mixed))
        scratch = RecurrentScratch(keys, values, scratch.feature_BMD.at[:, begin:end].set(feature))
        return self.score(hidden, borrowed.head_VD), scratch

    def _unroll(
        self,
        borrowed: Borrowed,
        tokens_BL: Array,
        features_BLD: Array,
        positions_BL: Array,
        mask_BLM: Mask,
        steps: int,
        keys_B: Array | None,
    ) -> Unrolled:
        length = tokens_BL.shape[1]

        def draft(step: int, token_BL: Array, feature_BLD: Array, before: list[tuple[Array, Array]]) -> Any:
            stream, seen = self.fuse(self.embedding(borrowed, token_BL), feature_BLD)
            q, k, v = self.project(seen, positions_BL + step)
            (first_k, first_v), *own = [*before, (k, v)]
            hidden_keys = jnp.maximum(length - 1 - step - jnp.arange(length), 0)[None] if self.zero_logits else None
            mixed = self.attend_text(q, first_k, first_v, mask_BLM, Own(tuple(own), hidden_keys))
            return *self.finish(self.mix(stream, mixed)), (k, v)

        outputs, features, pairs = [], [], []
        feature, token = self.read(features_BLD), tokens_BL
        for step in range(steps):
            token = jnp.pad(token[:, 1:], ((0, 0), (0, 1)))
            hidden, feature, pair = recompute(self.remat, functools.partial(draft, step))(token, feature, pairs)
            pairs.append(pair)
            outputs.append(hidden)
            features.append(feature)
            feature = jax.lax.stop_gradient(feature) if self.detach else feature
        return Unrolled(jnp.stack(outputs), self.regressed(jnp.stack(features)))

    def init_state(self, params: Params, borrowed: Borrowed, first_B: Array, capacity: int) -> RecurrentState:
        """Empty state for contexts of up to `capacity` tokens; no pair carries the first one's embedding."""
        c, batch = self.config, first_B.shape[0]
        cache = kv.empty(1, batch, c.kv_heads, c.head_dim, capacity, self.dtype)
        nothing = jnp.zeros((batch, c.width), self.dtype)
        return RecurrentState(cache, jnp.zeros(batch, jnp.int32), nothing, nothing)

    def scratch(self, state: RecurrentState, slots: int) -> RecurrentScratch:
        """Working memory for `slots` expanded nodes."""
        c, batch = self.config, state.length_B.shape[0]
        return RecurrentScratch(
            jnp.zeros((batch, c.kv_heads, c.head_dim, slots), self.dtype),
            jnp.zeros((batch, c.kv_heads, slots, c.head_dim), self.dtype),
            jnp.zeros((batch, slots, c.width), self.dtype),
        )


class ParallelState(NamedTuple):
    """What a row's next tokens are predicted by, all depths of them."""

    cache: KVCache | None
    """Keys and values of the committed pairs; None for heads without attention."""
    length_B: Array
    """Committed pairs."""
    hidden_BTD: Array
    """The output for every depth: `[:, d]` is scored for the children of nodes at depth `d`."""


class ParallelScratch(NamedTuple):
    """What one tree's nodes below the root are drafted by."""

    hidden_BTD: Array
    """The outputs for depths 1, 2 ..."""
    logits_BTV: Array | None = None
    """Their logits, from the first level on."""


class OnePass(DrafterModule):
    """A drafter that predicts all depths when it reads: a node's children depend on its depth alone. Abstract.

    Its config says in `tokens` how many depths there are. A round reads the LM head twice, once for the root's children
    and once for those of all other depths; heads of the depths' own are read once each.
    """

    @property
    def deepest(self) -> int | None:
        """Greatest depth of a node: the tokens of a pass."""
        return self.config.tokens

    @property
    def one_pass(self) -> bool:
        """Yes."""
        return True

    def scratch(self, state: ParallelState, slots: int) -> ParallelScratch:
        """The outputs for all depths that `slots` expanded nodes can have."""
        return ParallelScratch(state.hidden_BTD[:, 1 : slots + 1])

    def expand(
        self, params: Params, borrowed: Borrowed, state: ParallelState, scratch: ParallelScratch, frontier: Frontier
    ) -> tuple[Array, ParallelScratch]:
        """Logits `[B, W, V]` of the children of one level's nodes: the same for all of them."""
        logits_BTV = scratch.logits_BTV
        if logits_BTV is None:
            logits_BTV = self.score_below(params, borrowed, scratch.hidden_BTD)
        logits_B1V = logits_BTV[:, frontier.depth - 1 : frontier.depth]
        logits_BWV = jnp.broadcast_to(logits_B1V, (*frontier.token_BW.shape, logits_BTV.shape[-1]))
        return logits_BWV, scratch._replace(logits_BTV=logits_BTV)

    def score_below(self, params: Params, borrowed: Borrowed, hidden_BTD: Array) -> Array:
        """Logits `[B, T, V]` of the outputs for depths 1, 2 ..., which share one LM head."""
        return self.logits(params, borrowed, hidden_BTD)
