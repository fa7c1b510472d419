"""Distillation: which pairs are trained, what the sums mean, and that only the drafter learns."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxspec.base import UnrollInputs
from jaxspec.distillation.chunks import shift
from jaxspec.distillation.loss import add_noise, batch_loss, step_masks
from jaxspec.distillation.objective import Objective
from jaxspec.distillation.step import eval_step, init_state, train_step
from jaxspec.distillation.task import Batch, Frozen, Task, TrainState, read_tables
from jaxspec.drafters import Eagle, EagleConfig, Medusa, MedusaConfig
from jaxspec.losses import expected_acceptance, smooth_l1, soft_cross_entropy
from jaxspec.nn.attention import causal_mask, segment_mask
from jaxspec.parallel.mesh import batch_sharding, make_mesh, shardings
from jaxspec.targets.decoder import Decoder, LlamaConfig

VOCAB, LENGTH = 61, 24
TARGET = Decoder(LlamaConfig(VOCAB, 16, 2, 2, 1, 8, 32))
DRAFTER = Eagle(EagleConfig(16, 2, 1, 8, 32))


@functools.partial(jax.jit, static_argnums=0)
def sums_of(objective: Objective, frozen: Any, params: Any, batch: Batch, vocab_U: Any = None):
    """The sums of a batch without noise; losses of these are differentiable."""
    task = Task(TARGET, DRAFTER, objective)
    return batch_loss(task, Frozen(frozen, vocab_U), params, batch, None, learning=False)[1]


def one_step(optimizer: optax.GradientTransformation, objective: Objective) -> Any:
    """The training step as one program."""
    return jax.jit(functools.partial(train_step, Task(TARGET, DRAFTER, objective), optimizer))


@functools.cache
def fresh() -> Any:
    """A drafter's first weights."""
    return jax.jit(DRAFTER.init_params)(jax.random.key(1))


def begin(drafter: Eagle, optimizer: optax.GradientTransformation) -> TrainState:
    return jax.jit(functools.partial(init_state, drafter, optimizer))(jax.random.key(2))


@pytest.fixture(scope="module")
def frozen():
    return jax.jit(lambda key: jax.tree.map(lambda a: a * 4, TARGET.init_params(key)))(jax.random.key(0))


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = np.random.default_rng(0)
    segments = np.repeat([[1] * 11 + [2] * 9 + [0] * 4], 4, axis=0)
    positions = np.repeat([[*range(11), *range(9), 0, 0, 0, 0]], 4, axis=0)
    return Batch(
        jnp.asarray(rng.integers(0, VOCAB, (4, LENGTH))),
        jnp.asarray(segments),
        jnp.asarray(positions),
        jnp.asarray((segments > 0) & (positions >= 4)),
    )


def test_a_pair_is_trained_where_the_token_it_predicts_is_the_assistants(batch: Batch):
    masks = np.asarray(step_masks(batch, Objective(steps=3)))
    segments, wanted = np.asarray(batch.segments_BL), np.asarray(batch.loss_mask_BL)
    for j in range(3):
        for i in range(LENGTH):
            at = i + j + 2
            expected = at < LENGTH and segments[0, i] > 0 and segments[0, at] == segments[0, i] and wanted[0, at]
            assert masks[j, 0, i] == bool(expected), (j, i)


def test_the_first_assistant_token_is_predicted_and_the_reference_mask_starts_later(batch: Batch):
    first = 4  # of the first document
    ours = np.asarray(step_masks(batch, Objective()))[0, 0]
    reference = np.asarray(step_masks(batch, Objective(reference_mask=True)))[0, 0]
    assert np.flatnonzero(ours)[0] == first - 2
    assert np.flatnonzero(reference)[0] == first


def test_the_reference_mask_gates_all_steps_of_a_position_by_one_token(batch: Batch):
    """As EAGLE's one step has it; HASS's code gates step `j` of position `i` by token `i + j`."""
    masks = np.asarray(step_masks(batch, Objective(steps=3, reference_mask=True)))
    segments, wanted = np.asarray(batch.segments_BL), np.asarray(batch.loss_mask_BL).astype(bool)
    for j in range(3):
        inside = (segments[:, j + 2 :] == segments[:, : LENGTH - j - 2]) & (segments[:, : LENGTH - j - 2] > 0)
        np.testing.assert_array_equal(masks[j][:, : LENGTH - j - 2], inside & wanted[:, : LENGTH - j - 2])


def test_chunked_sums_equal_the_dense_losses_of_each_document_alone(frozen, batch: Batch):
    objective = Objective(steps=2, chunk=7)
    params = fresh()
    sums = sums_of(objective, frozen, params, batch)
    totals = {"smooth_l1": np.zeros(2), "soft_cross_entropy": np.zeros(2)}
    accept, chain, count = np.zeros(2), np.zeros(2), np.zeros(2)
    shared = TARGET.shared_tables(frozen)

    @jax.jit
    def alone(tokens: jax.Array) -> tuple[jax.Array, ...]:
        """Of one document: both losses, the acceptance and the steps by pair, the pairs that run past its end too."""
        at, mask = jnp.arange(tokens.shape[1])[None], causal_mask(tokens.shape[1])
        features = TARGET.forward(frozen, tokens, at, mask).features_BLD
        hidden = DRAFTER.unroll(params, shared, UnrollInputs(tokens, features, at, mask), 2).hidden_TBLD
        wanted = jnp.stack([shift(features, j + 1) for j in range(2)])
        draft, teacher = DRAFTER.logits(params, shared, hidden[:, 0]), TARGET.logits(frozen, wanted[:, 0])
        return smooth_l1(hidden, wanted)[:, 0], soft_cross_entropy(draft, teacher), expected_acceptance(draft, teacher)

    for row in range(4):
        for begin, length in ((0, 11), (11, 9)):
            feature, token, accepted = map(np.asarray, alone(batch.tokens_BL[row : row + 1, begin : begin + length]))
            for j in range(2):
                for i in range(max(0, 2 - j), length - j - 2):
                    totals["smooth_l1"][j] += feature[j, i]
                    totals["soft_cross_entropy"][j] += token[j, i]
                    accept[j] += accepted[j, i]
                    count[j] += 1
                    if j == 0 or i + 2 >= 4:  # a chain is counted where all of its steps are trained
                        chain[j] += np.prod(accepted[: j + 1, i])
    np.testing.assert_array_equal(sums.count_T, count)
    for name, value in totals.items():
        np.testing.assert_allclose(sums.loss_TM[name][:, 0], value, rtol=1e-4)
    np.testing.assert_allclose(sums.accept_T, accept, rtol=1e-4)
    np.testing.assert_allclose(sums.chain_sampled_T, chain, rtol=1e-4)


def test_the_gradient_is_that_of_the_whole_row_at_once(frozen, batch: Batch):
    objective, params = Objective(chunk=5), fresh()
    mask_BLM, shared = segment_mask(batch.segments_BL), TARGET.shared_tables(frozen)
    features = TARGET.forward(frozen, batch.tokens_BL, batch.positions_BL, mask_BLM).features_BLD
    mask_BL = step_masks(batch, objective)[0]

    def whole(params) -> jax.Array:
        rows = UnrollInputs(batch.tokens_BL, features, batch.positions_BL, mask_BLM)
        hidden = DRAFTER.unroll(params, shared, rows, 1).hidden_TBLD[0]
        draft, teacher = DRAFTER.logits(params, shared, hidden), TARGET.logits(frozen, shift(features, 1))
        loss = smooth_l1(hidden, shift(features, 1)) + 0.1 * soft_cross_entropy(draft, teacher)
        return jnp.sum(loss * mask_BL) / jnp.sum(mask_BL)

    def chunked(params) -> jax.Array:
        return sums_of(objective, frozen, params, batch).mean_loss(objective)

    expected, got = jax.jit(jax.value_and_grad(whole))(params), jax.jit(jax.value_and_grad(chunked))(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, expected)


def test_steps_are_weighed_one_by_one(frozen, batch: Batch):
    params = fresh()
    sums = sums_of(Objective(steps=3), frozen, params, batch)
    steps = sums.losses("smooth_l1"), sums.losses("soft_cross_entropy")
    for objective, weigh in (
        (Objective(steps=3), (1, 1, 1)),
        (Objective(steps=3, step_decay=0.5), (1, 0.5, 0.25)),
        (Objective(steps=3, step_weights=(0.0, 2.0, 1.0)), (0, 2, 1)),
    ):
        expected = sum(w * (a + 0.1 * b) for w, a, b in zip(weigh, *steps, strict=True))
        assert float(sums.mean_loss(objective)) == pytest.approx(float(expected), rel=1e-6)
    first = float(steps[0][0] + 0.1 * sum(steps[1]))
    assert float(sums.mean_loss(Objective(steps=3, feature_steps=1))) == pytest.approx(first, rel=1e-6)
    with pytest.raises(ValueError, match="step_weights has 2 numbers for steps=3"):
        Objective(steps=3, step_weights=(1.0, 1.0))


def test_late_losses_join_at_their_share_of_the_steps():
    weights = (("smooth_l1", 1.0), ("soft_cross_entropy", 0.1), ("top_k:10", 1.0))
    (first, before), (second, between), (third, whole) = Objective(
        weights=weights, late=(("top_k:10", 0.8), ("soft_cross_entropy", 0.5))
    ).stages(10)
    assert (first, second, third) == (0, 5, 8)
    assert before == Objective(weights=weights[:1])
    assert between == Objective(weights=weights[:2])
    assert whole == Objective(weights=weights)
    assert Objective(weights=weights).stages(10) == [(0, Objective(weights=weights))]
    several = Objective(
        steps=3, weights=weights, step_weights=(1.0, 0.5, 0.2), late=(("steps", 0.6), ("top_k:10", 0.8))
    )
    (_, one), (second, three), (third, whole) = several.stages(10)
    assert (second, third) == (6, 8)
    assert one == Objective(weights=weights[:2], step_weights=(1.0,))
    assert three == Objective(steps=3, weights=weights[:2], step_weights=(1.0, 0.5, 0.2))
    assert whole == dataclasses.replace(several, late=())
    assert len(Objective(steps=3, weights=weights[:1], late=(("steps", 0.5),)).stages(10)) == 2
    latest = dataclasses.replace(several, late=(("steps", 0.8), ("top_k:10", 0.99)))
    assert [first for first, _ in latest.stages(2)] == [0, 1] and len(latest.stages(1)) == 1
    with pytest.raises(ValueError, match=r"late=steps:0.5: steps is 1, so none can join"):
        Objective(late=(("steps", 0.5),))
    with pytest.raises(ValueError, match="the first step counts nothing"):
        Objective(steps=2, step_weights=(0.0, 1.0), late=(("steps", 0.5),))
    with pytest.raises(ValueError, match="weights names smooth_l1 twice"):
        Objective(weights=(*weights, weights[0]))
    with pytest.raises(ValueError, match="late names top_k:10 twice"):
        Objective(weights=weights, late=(("top_k:10", 0.5), ("top_k:10", 0.8)))
    with pytest.raises(ValueError, match=r"late=top_k:5:0.8: give a loss of weights \(smooth_l1, soft_cross_entropy"):
        Objective(weights=weights, late=(("top_k:5", 0.8),))
    with pytest.raises(ValueError, match="late=top_k:10:1: "):
        Objective(weights=weights, late=(("top_k:10", 1.0),))
    with pytest.raises(ValueError, match="one of them must count from the beginning"):
        Objective(weights=weights[:1], late=(("smooth_l1", 0.5),))


def test_the_targets_head_runs_once_however_many_steps_there_are(frozen, batch: Batch):
    """Counted from the compiled program: a further step costs the drafter's own layer and head, nothing else."""
    params = fresh()
    traced = {}
    for steps in (1, 3):
        calls: list[int] = []

        class Counting(Decoder):
            def logits(self, params, features_BLD, seen=calls):
                seen.append(features_BLD.size)
                return super().logits(params, features_BLD)

        counting = Counting(TARGET.config)
        task = Task(counting, DRAFTER, Objective(steps=steps, chunk=LENGTH))
        jax.eval_shape(functools.partial(eval_step, task), Frozen(frozen), params, batch)
        traced[steps] = max(calls)
    assert traced[1] == traced[3] == 4 * LENGTH * 16


def test_with_a_draft_vocabulary_only_what_it_holds_is_trained(frozen, batch: Batch):
    params = fresh()
    objective = Objective(steps=2, chunk=6, weights=(("kl", 1.0),))
    everything = sums_of(objective, frozen, params, batch, jnp.arange(VOCAB))
    plain = sums_of(objective, frozen, params, batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), everything, plain)
    some = jnp.asarray([1, 4, 9, 16, 25, 36, 49])
    sums = sums_of(objective, frozen, params, batch, some)
    features = TARGET.forward(frozen, batch.tokens_BL, batch.positions_BL, segment_mask(batch.segments_BL)).features_BLD
    best = jnp.argmax(TARGET.logits(frozen, features), axis=-1)
    for j, mask in enumerate(step_masks(batch, objective)):
        inside = jnp.isin(shift(best, j + 1), some) & mask
        assert float(sums.weight_T["kl"][j]) == int(inside.sum()) < int(mask.sum()) == int(sums.count_T[j])
    assert (sums.accept_T < plain.count_T).all() and (sums.agree_T <= sums.weight_T["kl"]).all()


def test_lm_heads_begin_as_the_targets_rows_of_the_draft_vocabulary(frozen):
    some = jnp.asarray([1, 4, 9, 16, 25, 36, 49])
    drafter = Medusa(MedusaConfig(16, tokens=2, vocab=len(some)))
    shared = read_tables(TARGET, Frozen(frozen, some))
    state = init_state(drafter, optax.sgd(1.0), jax.random.key(2), shared)
    wanted = TARGET.shared_tables(frozen).head_VD[some]
    assert state.params["heads"].shape[0] == 2 and all((head == wanted).all() for head in state.params["heads"])


def test_tokens_outside_the_mask_do_not_matter(frozen, batch: Batch):
    params = fresh()
    padding = np.asarray(batch.segments_BL) == 0
    other = batch._replace(tokens_BL=jnp.where(padding, (batch.tokens_BL + 7) % VOCAB, batch.tokens_BL))
    a, b = (sums_of(Objective(steps=2), frozen, params, x) for x in (batch, other))
    np.testing.assert_allclose(a.mean_loss(Objective(steps=2)), b.mean_loss(Objective(steps=2)), rtol=1e-6)


def test_a_perfect_drafter_would_have_simulated_tau_of_steps_plus_one(frozen, batch: Batch):
    task = Task(TARGET, DRAFTER, Objective(steps=3))
    sums = jax.jit(functools.partial(eval_step, task))(Frozen(frozen), fresh(), batch)
    perfect = sums._replace(chain_sampled_T=sums.count_T, chain_greedy_T=sums.count_T)
    assert perfect.summary(Objective(steps=3))["simulated_tau"] == pytest.approx(4.0)
    assert 1.0 <= sums.summary(Objective(steps=3))["simulated_tau"] <= 4.0


def test_training_lowers_the_loss_and_leaves_the_target_alone(frozen, batch: Batch):
    optimizer = optax.adamw(3e-3)
    step = one_step(optimizer, Objective(noise=0.0))
    state = begin(DRAFTER, optimizer)
    losses = []
    for _ in range(60):
        state, loss = step(Frozen(frozen), state, batch)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 60


def test_a_loss_that_is_not_finite_leaves_weights_and_optimizer_as_they_were(frozen, batch: Batch):
    optimizer = optax.adamw(1e-3)
    state = begin(DRAFTER, optimizer)
    broken = jax.tree.map(lambda a: a * jnp.nan, frozen)
    after, loss = one_step(optimizer, Objective())(Frozen(broken), state, batch)
    assert not np.isfinite(loss)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, (after.params, after.optimizer), (state.params, state.optimizer)))


def test_noise_is_bounded_by_the_documents_own_length(batch: Batch):
    clean = jnp.zeros((4, LENGTH, 16))
    keys = jax.random.split(jax.random.key(0), 4)
    noisy = np.abs(np.asarray(add_noise(clean, batch.segments_BL, keys, 0.2)))
    assert 0 < noisy[:, :11].max() <= 0.1 * 512 / 11
    assert 0.1 * 512 / 11 < noisy[:, 11:20].max() <= 0.1 * 512 / 9
    assert np.array_equal(add_noise(clean, batch.segments_BL, keys, 0.0), clean)


class Update(NamedTuple):
    """An update of a pair whose every axis divides, and what it is on one device."""

    step: Any
    given: tuple[Frozen, TrainState, Batch]
    params: Any
    loss: float


@pytest.fixture(scope="module")
def update(batch: Batch) -> Update:
    target, drafter = TARGET.clone(config=LlamaConfig(64, 16, 2, 4, 2, 4, 32)), Eagle(EagleConfig(16, 4, 2, 4, 32))
    frozen = jax.jit(lambda key: jax.tree.map(lambda a: a * 4, target.init_params(key)))(jax.random.key(0))
    optimizer = optax.sgd(0.1)
    step = jax.jit(functools.partial(train_step, Task(target, drafter, Objective(steps=2)), optimizer))
    given = (Frozen(frozen), begin(drafter, optimizer), jax.tree.map(lambda x: jnp.concatenate([x, x]), batch))
    alone, loss = step(*given)
    return Update(step, given, alone.params, float(loss))


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 4, 1)])
def test_one_update_on_a_mesh_equals_one_device(update: Update, mesh: tuple[int, int, int]):
    grid = make_mesh(*mesh, devices=jax.devices()[: mesh[0] * mesh[1] * mesh[2]])
    (frozen, state, batch), place = update.given, jax.device_put
    spread, loss = update.step(
        place(frozen, shardings(grid, frozen)), place(state, shardings(grid, state)), place(batch, batch_sharding(grid))
    )
    assert float(loss) == pytest.approx(update.loss, rel=1e-5)
    for a, b in zip(jax.tree.leaves(update.params), jax.tree.leaves(spread.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_unknown_losses_are_named():
    with pytest.raises(ValueError, match="'nll' is unknown: choose from"):
        Objective(weights=(("nll", 1.0),))


@pytest.mark.parametrize("vocab", [None, (1, 4, 9, 16, 25, 36, 49)])
@pytest.mark.parametrize(
    "objective",
    [
        Objective(steps=3, chunk=5, weights=(("smooth_l1", 1.0), ("soft_cross_entropy", 0.1), ("top_k:4", 1.0))),
        Objective(steps=2, chunk=7, weights=(("tvd", 1.0), ("smooth_l1", 0.3)), step_decay=0.8, feature_steps=1),
        Objective(steps=2, chunk=7, weights=(("tvdpp_exact", 1.0),)),
        Objective(steps=3, chunk=9, weights=(("kl", 1.0),), position_weights="d_pace:0.5"),
    ],
)
def test_the_gradient_is_that_of_the_sums(frozen, batch: Batch, objective: Objective, vocab):
    params, ids = jax.jit(DRAFTER.init_params)(jax.random.key(1)), None if vocab is None else jnp.asarray(vocab)

    task, key = Task(TARGET, DRAFTER, objective), jax.random.key(3)

    def loss(params, learning: bool) -> jax.Array:
        part, sums = batch_loss(task, Frozen(frozen, ids), params, batch, key, learning=learning)
        return part if learning else sums.mean_loss(objective)

    one, other = (jax.jit(jax.grad(functools.partial(loss, learning=learning)))(params) for learning in (True, False))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7), one, other)


@pytest.mark.parametrize("weighting", ["none", "cat", "d_pace:0", "exp:4"])
def test_steps_that_are_measured_alone_change_no_loss(frozen, batch: Batch, weighting: str):
    trained = Objective(steps=2, weights=(("kl", 1.0),), position_weights=weighting, noise=0.0)
    longer = dataclasses.replace(trained, steps=5, step_weights=(1.0, 1.0, 0.0, 0.0, 0.0))
    short, long = (sums_of(o, frozen, fresh(), batch) for o in (trained, longer))
    assert float(long.mean_loss(trained)) == pytest.approx(float(short.mean_loss(trained)), rel=1e-6)
    assert len(long.accept_T) == 5 and float(long.accept_T[4]) > 0
