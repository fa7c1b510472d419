"""The loop over chunks reads of a drafter what `scoring` returns, and of the target its LM head."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.base import SharedTables
from jaxspec.distillation.objective import Objective
from jaxspec.distillation.scoring import read_heads
from jaxspec.distillation.task import Batch, Frozen, Task
from jaxspec.drafters import (
    DRAFTERS,
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
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.targets.tables import Tables

VOCAB, SHAPE = 11, (8, 2, 1, 4, 16)
ONE_PASS: dict[str, Any] = {"tokens": 2, "layers": 2, "mask_token": 3, "embed_vocab": VOCAB}
DRAFTER: dict[str, Any] = {
    "eagle": Eagle(EagleConfig(*SHAPE)),
    "eagle with a norm": Eagle(EagleConfig(*SHAPE, head_norm=True)),
    "fspad": Fspad(FspadConfig(*SHAPE)),
    "eagle3": Eagle3(Eagle3Config(*SHAPE, vocab=VOCAB, taps=(0, 1, 2))),
    "medusa": Medusa(MedusaConfig(8, 2, vocab=VOCAB)),
    "medusa by the target's head": Medusa(MedusaConfig(8, 2)),
    "parallelspec": ParallelSpec(ParallelSpecConfig(*SHAPE, tokens=2)),
    "peagle": PEagle(PEagleConfig(*SHAPE, vocab=VOCAB, taps=(0, 1, 2), **ONE_PASS)),
    "draft_lm": DraftLM(DraftLMConfig(VOCAB, 8, 1, 2, 1, 4, 16)),
    "draft_lm with one table": DraftLM(DraftLMConfig(VOCAB, 8, 1, 2, 1, 4, 16, tied=True)),
}
TARGET = LlamaConfig(VOCAB, 8, 1, 2, 1, 4, 16)
NOTHING_BL = jnp.zeros((1, 1), jnp.int32)
NO_ROWS = Batch(NOTHING_BL, NOTHING_BL, NOTHING_BL, NOTHING_BL)
every = pytest.mark.parametrize("name", DRAFTER)


def test_every_drafter_is_here():
    assert {type(drafter) for drafter in DRAFTER.values()} == {kind.module for kind in DRAFTERS.values()}


@every
def test_logits_read_no_weights_but_those_of_scoring(name: str):
    drafter = DRAFTER[name]
    shared = SharedTables(*(jax.random.normal(jax.random.key(i), (VOCAB, 8)) for i in (0, 1)))
    params, hidden = drafter.init_params(jax.random.key(2), shared), jax.random.normal(jax.random.key(3), (1, 4, 8))

    def energy(params: Any) -> jax.Array:
        return jnp.sum(drafter.logits(params, shared, hidden, 1) ** 2)

    read = drafter.scoring(params)
    gradient = jax.grad(energy)(params)
    assert all(np.any(gradient[key] != 0) for key in read)
    assert all(np.all(leaf == 0) for key in params.keys() - read.keys() for leaf in jax.tree.leaves(gradient[key]))


@every
def test_logits_of_what_the_loop_is_given_are_those_of_everything(name: str):
    drafter, target = DRAFTER[name], Decoder(TARGET)
    frozen = target.init_params(jax.random.key(0))
    shared = target.shared_tables(frozen)
    params, hidden = drafter.init_params(jax.random.key(2), shared), jax.random.normal(jax.random.key(3), (1, 4, 8))
    heads = read_heads(Task(target, drafter, Objective()), Frozen(frozen), NO_ROWS)
    logits = drafter.logits(drafter.scoring(params), heads.shared, hidden, 1)
    np.testing.assert_array_equal(logits, drafter.logits(params, shared, hidden, 1))
    assert len(jax.tree.leaves(heads)) == (1 if drafter.vocab else 2)  # the target's head, and the drafter's rows of it


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Decoder, Tables])
def test_a_targets_logits_are_those_of_its_head_alone(kind: Any, tied: bool):
    config = LlamaConfig(VOCAB, 8, 1, 2, 1, 4, 16, tied=tied)
    params, features = Decoder(config).init_params(jax.random.key(0)), jax.random.normal(jax.random.key(1), (1, 4, 8))
    target = kind(config)
    head = target.scoring(params)
    assert len(jax.tree.leaves(head)) == 1
    np.testing.assert_array_equal(target.logits(head, features), target.logits(params, features))
