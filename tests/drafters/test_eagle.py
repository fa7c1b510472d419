"""The EAGLE head's own laws: what is paired with what, positions, gradients; FSPAD and HASS as departures from it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drafter_toys import BATCH, KINDS, LENGTH, SHAPE, STEPS, VOCAB, WIDTH, Toy, causal, same

from jaxspec.base import Array, SharedTables, UnrollInputs
from jaxspec.drafters import Eagle, EagleConfig, Fspad, FspadConfig
from jaxspec.nn.attention import PerQueryKeys

toy = functools.cache(Toy)
ROWS = LENGTH + 1
AT = jnp.broadcast_to(jnp.arange(ROWS), (BATCH, ROWS))


def test_the_first_tokens_embedding_is_never_read():
    """The pair of feature `f_t` carries token `x_{t+1}`, so nothing carries `x_0`."""
    t = toy("eagle grouped")
    tokens = jnp.where(t.tokens == 0, 1, t.tokens).at[:, 0].set(0)
    poisoned = SharedTables(t.shared_tables.embed_VD.at[0].set(jnp.nan), t.shared_tables.head_VD)
    read = jax.jit(lambda *a: t.drafter.extend(t.params, poisoned, t.empty, *a))
    state, logits = read(tokens[:, 1 : LENGTH + 1], t.features[:, :LENGTH], jnp.full(BATCH, LENGTH))
    assert jnp.isfinite(logits).all() and jnp.isfinite(state.hidden_BD).all()


def test_a_pair_has_the_position_of_its_feature_and_drafts_follow_on():
    """Positions are relative: shifting all of them changes nothing, shifting the drafts alone does."""
    t = toy("eagle")
    same(t.unrolled_logits(positions_BL=AT + 11), t.unrolled_logits(), 3e-5)
    state, _ = t.read(t.empty, 0, 4)
    key = state.cache.k_YBKCS[0, :, :, :, 3]
    pair = t.shared_tables.embed_VD[t.tokens[:, 4:5]], t.features[:, 3:4]
    fused, _ = t.drafter.apply({"params": t.params}, *pair, method="fuse")
    for position, equal in ((3, True), (4, False)):
        at = jnp.full((BATCH, 1), position)
        k: Any = t.drafter.apply({"params": t.params}, fused, at, method="project")[1]
        assert bool(jnp.allclose(k[..., 0], key, atol=1e-5)) == equal


def last_step(t: Toy, features: Array, steps: int) -> Array:
    """A number that hangs on the last of `steps` outputs alone."""
    out = t.drafter.unroll(t.params, t.shared_tables, given(t)._replace(features_BLD=features), steps)
    return jnp.sum(out.hidden_TBLD[-1] ** 2)


def second_step_by_hand(t: Toy, features: Array, handed: Array) -> Array:
    """Step 1 with the handed features as an argument."""
    apply = functools.partial(t.drafter.apply, {"params": t.params})
    step: Any = lambda name, *a: apply(*a, method=name)  # noqa: E731
    ahead = [jnp.pad(t.tokens[:, 1 + j : ROWS], ((0, 0), (0, 1 + j))) for j in range(2)]
    _, seen0 = step("fuse", t.shared_tables.embed_VD[ahead[0]], step("read", features))
    _, k0, v0 = step("project", seen0, AT)
    stream, seen = step("fuse", t.shared_tables.embed_VD[ahead[1]], handed)
    q, k, v = step("project", seen, AT + 1)
    mixed = step("attend_text", q, k0, v0, jnp.asarray(causal(ROWS)), PerQueryKeys(((k, v),)))
    return jnp.sum(step("finish", step("mix", stream, mixed))[0] ** 2)


@pytest.mark.parametrize("kind", ["eagle grouped", "fspad", "eagle3"])
def test_gradients_cross_from_step_to_step_in_eagle3_alone(kind: str):
    """With the handed features held constant the whole gradient is the one at fixed inputs."""
    t = toy(kind)
    out = t.unroll(given(t), 1)
    # FSPAD hands on the half that is aligned.
    handed = out.hidden_TBLD[0] if out.features_TBLD is None else out.features_TBLD[0]
    by_hand = functools.partial(second_step_by_hand, t)
    value, (want, through) = jax.jit(jax.value_and_grad(by_hand, argnums=(0, 1)))(t.features, handed)
    direct = jax.jit(jax.grad(functools.partial(last_step, t), argnums=0), static_argnums=1)(t.features, 2)
    same(value, jax.jit(functools.partial(last_step, t), static_argnums=1)(t.features, 2), 1e-4)
    assert jnp.abs(through).max() > 0
    gap = float(jnp.abs(direct - want).max() / jnp.abs(want).max())
    assert (gap > 1e-2) if kind == "eagle3" else (gap < 1e-4), gap


def test_fspad_without_its_parts_is_eagle_bit_for_bit():
    t = toy("eagle grouped")
    bare = Fspad(FspadConfig(*SHAPE, rope_theta=100.0, feature_sampling=False, partial_alignment=False))
    assert bare.config.shapes() == t.drafter.config.shapes()
    run: Any = jax.jit(lambda rows: bare.unroll(t.params, t.shared_tables, rows, STEPS))
    jax.tree.map(np.testing.assert_array_equal, run(given(t)), t.unroll(given(t), STEPS))


def test_fspads_halves_are_as_the_equations_say():
    """Written once more, in NumPy, from the equations: the bare embedding gates, both halves have the residual."""
    t = toy("fspad")
    w = {name: np.asarray(a, np.float64) for name, a in t.params.items()}
    e, f = np.asarray(t.shared_tables.embed_VD[t.tokens[:, 1:2]], np.float64), np.asarray(t.features[:, :1], np.float64)

    def norm(x: Any, weight: Any) -> Any:
        return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + t.drafter.config.norm_eps)

    def silu(x: Any) -> Any:
        return x / (1 + np.exp(-x))

    h = np.concatenate([e, f], axis=-1) @ w["fc"] + w["fc_bias"]
    z = silu(e @ w["sampling_gate"]) * (norm(h, w["sampling_norm"]) @ w["sampling_up"])
    s = h + z @ w["sampling_down"]
    value = np.einsum("bld,dkc->blkc", s, w["qkv"][:, :, -1])  # one token attends itself alone
    heads = np.repeat(value[:, :, :, None], t.drafter.config.group, axis=3)
    a = s + np.einsum("blkgc,kgcd->bld", heads, w["out"])
    n = norm(a, w["mlp_norm"])
    y = np.concatenate([a, a], axis=-1) + (silu(n @ w["gate"]) * (n @ w["up"])) @ w["down"]
    out = t.unroll(UnrollInputs(t.tokens[:, :2], t.features[:, :2], AT[:, :2], jnp.asarray(causal(2))), 1)
    same(out.hidden_TBLD[0][:, :1], y[..., :WIDTH], 1e-5)
    assert out.features_TBLD is not None
    same(out.features_TBLD[0][:, :1], y[..., WIDTH:], 1e-5)


def test_zero_logits_are_keys_of_score_zero_that_carry_nothing():
    """HASS's released attention, written as it is: masks multiply the scores and, after the softmax, the weights."""
    head = Eagle(dataclasses.replace(KINDS["eagle"].config, zero_logits=True))
    t = toy("eagle")
    run: Any = lambda name, *a: head.apply({"params": t.params}, *a, method=name)  # noqa: E731
    mask = causal(ROWS)[0]
    token = jnp.pad(t.tokens[:, 1:ROWS], ((0, 0), (0, 1)))
    stream, seen = run("fuse", t.shared_tables.embed_VD[token], t.features)
    q, k, v = run("project", seen, AT)
    scores = np.einsum("BLKGC,BKCM->BKGLM", q, k) * head.config.head_dim**-0.5 * mask
    weight = np.asarray(jax.nn.softmax(scores, axis=-1)) * mask
    mixed = np.einsum("BKGLM,BKMC->BLKGC", weight, v)
    wanted = run("finish", run("mix", stream, jnp.asarray(mixed)))[0]
    out = head.unroll(t.params, t.shared_tables, given(t), 2)
    same(out.hidden_TBLD[0], wanted)
    assert float(jnp.abs(out.hidden_TBLD[0] - t.unroll(given(t), 1).hidden_TBLD[0]).max()) > 1e-3


def given(t: Toy) -> UnrollInputs:
    return UnrollInputs(t.tokens[:, :ROWS], t.features, AT, jnp.asarray(causal(ROWS)))


def test_every_weight_learns_at_every_step():
    t = toy("eagle norms")
    probe = jax.random.normal(jax.random.key(0), (VOCAB,))

    def loss(params, step: int) -> Array:
        out = t.drafter.unroll(params, t.shared_tables, given(t), STEPS).hidden_TBLD
        return jnp.sum(t.drafter.logits(params, t.shared_tables, out[step])[:, : LENGTH - STEPS] @ probe)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    for step in (0, STEPS - 1):
        g = grad(t.params, step)
        assert all(jnp.abs(x).max() > 1e-6 for x in g.values()), step
        parts = np.asarray(jnp.abs(g["qkv"]).max(axis=(0, 1, 3)))
        assert (parts > 1e-6).all(), "queries, keys and values all learn"


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((16, 4, 3, 4, 20), "heads=4 must be a multiple of kv_heads=3"),
        ((16, 4, 0, 4, 20), "kv_heads=0 must be at least 1"),
        ((0, 4, 2, 4, 20), "width=0 must be at least 1"),
        ((16, 4, 2, 3, 20), "head_dim=3 must be even"),
    ],
)
def test_sizes_that_no_layer_can_have_are_refused(sizes: tuple[int, int, int, int, int], said: str):
    with pytest.raises(ValueError, match=said):
        EagleConfig(*sizes)
