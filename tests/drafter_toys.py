"""Every kind of drafter with random weights, and literal sequential drafting with it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Array, Frontier, SharedTables, UnrollInputs
from jaxspec.drafters import (
    DraftLM,
    DraftLMConfig,
    Eagle,
    Eagle3,
    Eagle3Config,
    EagleConfig,
    Fspad,
    FspadConfig,
    Medusa,
    MedusaConfig,
    ParallelSpec,
    ParallelSpecConfig,
    PEagle,
    PEagleConfig,
)

WIDTH, VOCAB, LENGTH, BATCH, STEPS = 16, 13, 9, 2, 4
CAPACITY = 24
SHAPE = (WIDTH, 4, 2, 6, 20)

KINDS: dict[str, Any] = {
    "eagle": Eagle(EagleConfig(WIDTH, 4, 4, 6, 20)),
    "eagle grouped": Eagle(EagleConfig(*SHAPE, rope_theta=100.0)),
    "eagle one key head": Eagle(EagleConfig(WIDTH, 3, 1, 4, 20, bias=False)),
    "eagle norms": Eagle(
        EagleConfig(WIDTH, 4, 2, 4, 20, bias=False, embedding_norm=True, head_norm=True, qk_norm=True)
    ),
    "fspad": Fspad(FspadConfig(*SHAPE)),
    "fspad without sampling": Fspad(FspadConfig(*SHAPE, feature_sampling=False)),
    "fspad without alignment": Fspad(FspadConfig(*SHAPE, partial_alignment=False, embedding_norm=True)),
    "eagle3": Eagle3(Eagle3Config(*SHAPE, vocab=VOCAB, taps=(0, 1, 2))),
    "eagle3.1": Eagle3(Eagle3Config(*SHAPE, vocab=VOCAB, taps=(0, 1, 2), tap_norms=True, normed_feature=True)),
    "eagle3 narrow": Eagle3(
        Eagle3Config(12, 4, 2, 6, 20, vocab=VOCAB, taps=(0, 2), target_width=WIDTH, embed_vocab=VOCAB, tap_norms=True)
    ),
    "medusa": Medusa(MedusaConfig(WIDTH, STEPS, vocab=VOCAB)),
    "medusa sharing the head": Medusa(MedusaConfig(WIDTH, STEPS, layers=2)),
    "parallelspec": ParallelSpec(ParallelSpecConfig(*SHAPE, tokens=STEPS)),
    "parallelspec in medusa": ParallelSpec(
        ParallelSpecConfig(*SHAPE, tokens=STEPS, host="medusa", embedding_norm=True, attention_norm=True)
    ),
    "parallelspec both ways": ParallelSpec(
        ParallelSpecConfig(*SHAPE, tokens=STEPS, bidirectional=True, mask_feature="anchor_copy")
    ),
    "parallelspec per depth": ParallelSpec(
        ParallelSpecConfig(*SHAPE, tokens=STEPS, mask_feature="per_depth", shared_mask=True)
    ),
    "parallelspec zeros": ParallelSpec(ParallelSpecConfig(*SHAPE, tokens=STEPS, mask_feature="zeros", bias=False)),
    "peagle": PEagle(
        PEagleConfig(
            *SHAPE, vocab=VOCAB, taps=(0, 1, 2), tokens=STEPS, layers=2, mask_token=5, embed_vocab=VOCAB, qk_norm=True
        )
    ),
    "peagle of one layer": PEagle(
        PEagleConfig(*SHAPE, vocab=VOCAB, taps=(0, 2), tokens=STEPS, layers=1, mask_token=5, norm_before_residual=True)
    ),
    "draft_lm": DraftLM(DraftLMConfig(VOCAB, 12, 2, 4, 2, 6, 20)),
    "draft_lm tied": DraftLM(DraftLMConfig(VOCAB, 12, 3, 2, 2, 4, 20, tied=True)),
}


class Toy:
    """One drafter with random weights, tables, tokens `x_0 .. x_L+T` and what it reads of the target, `f_0 .. f_L`."""

    def __init__(self, kind: str):
        self.drafter = KINDS[kind]
        rng = np.random.default_rng(3)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        leaves, shape = jax.tree.flatten(jax.jit(self.drafter.init_params)(jax.random.key(3)))
        scale = {"draft_lm": 8, "medusa": 8, "fspad": 1}.get(kind.split()[0], 2)
        noise = [normal(*w.shape) for w in leaves]
        moved = [
            scale * np.asarray(w) + 0.05 * n if w.ndim > 1 else np.asarray(w) + 0.3 * n
            for w, n in zip(leaves, noise, strict=True)
        ]
        self.params = jax.tree.unflatten(shape, map(jnp.asarray, moved))
        self.shared_tables = SharedTables(*(jnp.asarray(normal(VOCAB, WIDTH)) for _ in range(2)))
        self.tokens = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH + STEPS + 1)))
        self.read_width = WIDTH * max(1, len(self.drafter.taps))
        self.features = jnp.asarray(normal(BATCH, LENGTH + 1, self.read_width))
        start = jax.jit(functools.partial(self.drafter.init_state, capacity=CAPACITY))
        self.empty = start(self.params, self.shared_tables, self.tokens[:, 0])
        self.extend = jax.jit(lambda *a: self.drafter.extend(self.params, self.shared_tables, *a))
        self.expand = jax.jit(self._expand, static_argnames=("depth", "slot"))
        self.unroll = jax.jit(functools.partial(self.drafter.unroll, self.params, self.shared_tables), static_argnums=1)

    def _expand(self, state, scratch, token, parent, visible, depth, slot):
        frontier = Frontier(token, parent, visible, depth, slot)
        return self.drafter.expand(self.params, self.shared_tables, state, scratch, frontier)

    @property
    def rows(self) -> UnrollInputs:
        """The rows `0 .. L`, each one document."""
        at = jnp.broadcast_to(jnp.arange(LENGTH + 1), (BATCH, LENGTH + 1))
        return UnrollInputs(self.tokens[:, : LENGTH + 1], self.features, at, jnp.asarray(causal(LENGTH + 1)))

    def read(self, state: Any, begin: int, end: int) -> tuple[Any, Array]:
        """The state after the pairs `begin .. end - 1`; what stands behind them in the call is garbage."""
        tokens = np.full((BATCH, LENGTH), VOCAB - 1)
        features = np.full((BATCH, LENGTH, self.read_width), 7.0, np.float32)
        tokens[:, : end - begin] = self.tokens[:, begin + 1 : end + 1]
        features[:, : end - begin] = self.features[:, begin:end]
        return self.extend(state, tokens, features, np.full(BATCH, end - begin))

    def draft_chain(self, state: Any, tokens_BT: Array) -> Array:
        """Logits `[T, B, V]` behind a chain of given tokens, one `expand` each."""
        steps = tokens_BT.shape[1]
        scratch, logits = self.drafter.scratch(state, STEPS - 1), []
        for t in range(steps):
            parent = jnp.full((BATCH, 1), t - 1)
            visible = jnp.ones((BATCH, 1, t + 1), bool)
            step, scratch = self.expand(state, scratch, tokens_BT[:, t : t + 1], parent, visible, depth=t + 1, slot=t)
            logits.append(step[:, 0])
        return jnp.stack(logits)

    def unrolled_logits(self, steps: int = STEPS, **other: Any) -> Array:
        """Logits `[T, B, L, V]` of the unrolled pass over the rows `0 .. L`."""
        out = self.unroll(self.rows._replace(**other), steps)
        return self.score(out.hidden_TBLD)

    def score(self, hidden_TBLD: Array) -> Array:
        return jnp.stack(
            [self.drafter.logits(self.params, self.shared_tables, h, j) for j, h in enumerate(hidden_TBLD)]
        )


def causal(length: int) -> np.ndarray:
    return np.tril(np.ones((1, length, length), bool))


def same(x: Any, y: Any, tolerance: float = 1e-5) -> None:
    """Equal to fp32 rounding, measured by the array's greatest entry."""
    x, y = np.asarray(x), np.asarray(y)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1.0, np.abs(y).max()))
