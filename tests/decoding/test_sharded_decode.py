"""Speculative generation on a mesh of devices is the single device's, token for token."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from random_models import random_weights
from toys import batch_of, each_request, texts_of

from jaxspec import drafters
from jaxspec.base import Drafter, TreePolicy
from jaxspec.decoding.answers import Answer
from jaxspec.decoding.generation import generate, start
from jaxspec.decoding.requests import Requests, make_requests
from jaxspec.decoding.rounds import DecodeState, Engine, Weights
from jaxspec.decoding.slots import Slots
from jaxspec.parallel.mesh import batch_sharding, make_mesh, shardings
from jaxspec.planning import decode_program
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.trees import AdaptiveTree, BestFirstTree, DynamicTree
from jaxspec.trees.children import likeliest
from jaxspec.verify import RULES

VOCAB = 64
TARGET = Decoder(LlamaConfig(VOCAB, width=32, layers=2, heads=8, kv_heads=8, head_dim=4, mlp=32), stacked=False)
DRAFTER = drafters.Eagle(drafters.EagleConfig(width=32, heads=8, kv_heads=8, head_dim=4, mlp=32))
ENGINE = Engine(TARGET, DRAFTER, DynamicTree(12, 3, 4))
SHAPE = (32, 8, 8, 4, 32)
GROWN, AT_ONCE = DynamicTree(12, 3, 4), BestFirstTree(12, 3, 4)
RAGGED = AdaptiveTree(GROWN, (2, 4, 12), (1.0, 1.1, 4.0), 0.1, 0.1, rate=1.0, ragged=True)
OTHERS: dict[str, tuple[Drafter, TreePolicy]] = {
    "eagle, ragged": (DRAFTER, RAGGED),
    "fspad": (drafters.Fspad(drafters.FspadConfig(*SHAPE)), GROWN),
    "eagle3": (drafters.Eagle3(drafters.Eagle3Config(*SHAPE, vocab=VOCAB, taps=(0, 1))), GROWN),
    "draft_lm": (drafters.DraftLM(drafters.DraftLMConfig(VOCAB, 16, 1, 8, 8, 4, 16)), GROWN),
    "medusa": (drafters.Medusa(drafters.MedusaConfig(32, 3, vocab=VOCAB)), AT_ONCE),
    "parallelspec": (drafters.ParallelSpec(drafters.ParallelSpecConfig(*SHAPE, tokens=3)), AT_ONCE),
    "peagle": (
        drafters.PEagle(drafters.PEagleConfig(*SHAPE, vocab=VOCAB, taps=(0, 1), tokens=3, layers=1, mask_token=5)),
        AT_ONCE,
    ),
}
FAST = ("parallelspec", "eagle, ragged")


def weights() -> Weights:
    return Weights(random_weights(TARGET, 0.3, 1), random_weights(DRAFTER, 0.3, 2))


def requests() -> Requests:
    """Returns a greedy row and a sampled one, of different lengths."""
    prompts = [np.arange(5, dtype=np.int32), np.arange(20, 31, dtype=np.int32)]
    return batch_of(prompts, max_new_tokens=20, temperature=[0.0, 0.8], top_p=[1.0, 0.9], seed=[0, 7])


@functools.cache
def on_one_device() -> list[Answer]:
    return generate(ENGINE, weights(), requests())


def assert_split(state: DecodeState, tensor: int) -> None:
    """Each device holds its part of every cache's KV heads."""
    for cache in (state.cache, state.draft.cache):
        for x in cache:
            assert x.sharding.shard_shape(x.shape)[2] == 8 // tensor, f"{x.sharding}"


@pytest.mark.parametrize(("data", "tensor"), [(1, 8), (2, 4)])
def test_generation_on_a_mesh_equals_one_device(data: int, tensor: int):
    mesh = make_mesh(data, tensor=tensor)
    placed = jax.device_put(weights(), shardings(mesh, weights()))
    rows = jax.device_put(requests(), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        state = start(ENGINE, placed, rows)
        generation = generate(ENGINE, placed, rows)
    assert_split(state, tensor)
    assert texts_of(generation) == texts_of(on_one_device())
    assert [answer.calls for answer in generation] == [answer.calls for answer in on_one_device()]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)
def test_every_other_drafter_on_a_mesh_drafts_as_on_one_device(name: str):
    drafter, tree = OTHERS[name]
    engine = Engine(TARGET.clone(taps=drafter.taps), drafter, tree)
    held = Weights(weights().target, random_weights(drafter, 0.3, 2))
    mesh = make_mesh(2, tensor=4)
    alone = generate(engine, held, requests())
    placed, rows = jax.device_put(held, shardings(mesh, held)), jax.device_put(requests(), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        spread = generate(engine, placed, rows)
    assert texts_of(spread) == texts_of(alone)
    assert [a.accepted.tolist() for a in spread] == [a.accepted.tolist() for a in alone]


ROUNDS = {
    "eagle": ENGINE,
    "parallelspec": Engine(TARGET, *OTHERS["parallelspec"]),
    **{f"{rule}:{RULES[rule].modes[0]}": Engine(TARGET, DRAFTER, GROWN, mode=RULES[rule].modes[0], rule=RULES[rule])
       for rule in ("recursive-rejection", "specinfer", "traversal", "typical")},
}  # fmt: skip


def sent(engine: Engine, mesh: jax.sharding.Mesh) -> list[str]:
    """Returns what the devices send each other in a generation of eight rows."""
    held = jax.eval_shape(lambda: Weights(weights().target, random_weights(engine.drafter, 0.3, 2)))  # type: ignore[arg-type]
    return list(decode_program.plan_rounds(engine, held, mesh, batch=8, capacity=128, slots=64).sent)


@pytest.mark.parametrize(
    "name", [n if n in ("eagle", "traversal:topk") else pytest.param(n, marks=pytest.mark.slow) for n in ROUNDS]
)
def test_devices_with_rows_of_their_own_send_but_numbers_that_say_how_to_go_on(name: str):
    assert not [message for message in sent(ROUNDS[name], make_mesh(8)) if not message.endswith("[]")]


def test_devices_with_parts_of_the_vocabulary_send_their_best_and_not_all_logits():
    gathers = [message for message in sent(ENGINE, make_mesh(2, tensor=4)) if "gather" in message]
    rows, beam, best, parts = 4, 4, 4, 4
    sizes = [math.prod(map(int, re.findall(r"\d+", message.partition("[")[2]))) for message in gathers]
    assert max(sizes) == rows * beam * best * parts < rows * beam * VOCAB, f"{gathers}"


def test_slots_on_a_mesh_answer_as_one_device_does_and_compile_nothing_once_warm(compilations):
    mesh, rng = make_mesh(2, tensor=4), np.random.default_rng(0)
    queue = [
        each_request([rng.integers(0, VOCAB, n)], max_new_tokens=int(new), temperature=t, seed=int(n))[0]
        for n, new, t in zip([5, 9, 1, 12, 7, 3, 16, 2], [20, 3, 11, 1, 8, 20, 5, 14], [0.0, 0.8] * 4, strict=True)
    ]
    expected = [generate(ENGINE, weights(), make_requests([r], width=16))[0].tokens for r in queue]
    placed, found = jax.device_put(weights(), shardings(mesh, weights())), {}
    with jax.set_mesh(mesh):
        slots = Slots(ENGINE, placed, 4, longest=16, max_new_tokens=20, stops=1)
        assert_split(slots._state, 4)
        waiting, held = list(range(len(queue))), {}
        while waiting or held:
            while waiting and slots.free:
                held[row := slots.free[0]] = waiting[0]
                slots.admit(queue[waiting.pop(0)], row)
            found |= {held.pop(row): answer.tokens for row, answer in slots.run().items()}
            if len(waiting) == 4:  # the first four are in: everything is warm
                compilations.clear()
    assert not compilations
    assert_split(slots._state, 4)
    for i, tokens in enumerate(expected):
        np.testing.assert_array_equal(found[i], tokens)


def test_the_likeliest_tokens_of_a_split_vocabulary_are_those_of_the_whole():
    # Few distinct values, so that ties cross the borders of the parts.
    logits_BWV = np.random.default_rng(0).integers(0, 4, (2, 3, VOCAB)).astype(np.float32)
    whole = likeliest(logits_BWV, 5)  # type: ignore[arg-type]
    with jax.set_mesh(make_mesh(tensor=8)):
        split = jax.jit(likeliest, static_argnames="count")(logits_BWV, count=5)
    expected, token = jax.lax.top_k(jax.nn.log_softmax(logits_BWV), 5)
    for found in (whole, split):
        np.testing.assert_array_equal(found[0], token)
        np.testing.assert_allclose(found[1], expected, rtol=1e-6)
