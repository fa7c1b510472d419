"""Speculative decoding of an 8B target compiles for a TPU v6e 2x4 slice, fits it, and updates its caches in place."""

import dataclasses
import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from jaxspec.decoding.rounds import Engine, Weights
from jaxspec.drafters.eagle import Eagle, EagleConfig
from jaxspec.nn.rope import RopeScaling
from jaxspec.planning import decode_program, hlo
from jaxspec.targets.decoder import Decoder, LlamaConfig
from jaxspec.trees import DynamicTree, chain
from jaxspec.verify import RULES

pytestmark = pytest.mark.usefixtures("compile_afresh")

HBM = 32e9
VOCAB = 128256
LAYERS = 32


def llama3_engine(layers: int, tree: object) -> tuple[Engine, Weights]:
    """Returns an engine shaped as Llama-3.1-8B with its EAGLE-2 head, and its bf16 weights as shapes."""
    scaling = RopeScaling("llama3", 8.0)
    target = Decoder(
        LlamaConfig(VOCAB, 4096, layers, 32, 8, 128, 14336, rope_theta=5e5, rope_scaling=scaling),
        stacked=False,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )
    head = EagleConfig(4096, 32, 8, 128, 14336, rope_theta=5e5, bias=False)
    drafter = Eagle(head, dtype=jnp.bfloat16)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda: Weights(target.init_params(key), drafter.init_params(key)))
    weights = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), shapes)
    return Engine(target, drafter, tree), weights  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    pytest.importorskip("libtpu")
    # Nothing here touches a TPU, so neither its metadata nor its lock is wanted.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return decode_program.tpu_mesh("v6e:2x4", tensor=8)


class Planned(NamedTuple):
    layers: int
    plan: decode_program.Plan


def whole(batch: int) -> Any:
    return pytest.param((batch, LAYERS), marks=pytest.mark.slow)


# A layer's part of the loop is the same in each, and 32 of them take minutes.
@pytest.fixture(scope="module", params=[(1, 4), whole(1), whole(8)], ids=lambda p: f"batch{p[0]}-layers{p[1]}")
def planned(request: pytest.FixtureRequest, mesh: jax.sharding.Mesh) -> Planned:
    batch, layers = request.param
    engine, weights = llama3_engine(layers, DynamicTree(60, 6, 10))
    return Planned(layers, decode_program.plan_rounds(engine, weights, mesh, batch=batch, capacity=4096))


def test_the_8b_decode_program_fits_a_v6e_chip(planned: Planned):
    assert planned.plan.peak < HBM, f"a chip needs {planned.plan.peak / 1e9:.2f} GB: {planned}"


def test_the_loop_makes_no_copy_of_a_cache(planned: Planned):
    assert not planned.plan.cache_copies
    assert planned.plan.aliased >= planned.plan.cache_bytes


def test_no_message_in_the_loop_spans_the_vocabulary(planned: Planned):
    assert planned.plan.sent
    assert not [message for message in planned.plan.sent if str(VOCAB) in message], f"{planned.plan.sent}"


def test_verification_sends_two_sums_a_layer_and_one_for_the_embedding(planned: Planned):
    sums = [n for message, n in planned.plan.sent.items() if re.search(r"[\[,]60,4096\]", message)]
    assert sum(sums) == 2 * planned.layers + 1, f"{planned.plan.sent}"


@pytest.mark.parametrize(
    ("topology", "mode", "rule"),
    [
        pytest.param("v6e:2x4", "swor", "recursive-rejection", marks=pytest.mark.slow),
        pytest.param("v5e:2x4", "topk", "target-draw", marks=pytest.mark.slow),
        pytest.param("v5p:2x2x1", "topk", "target-draw", marks=pytest.mark.slow),
        pytest.param("v6e:2x4", "topk", "target-draw", marks=pytest.mark.slow),
        pytest.param("v6e:2x4", "swor", "traversal", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_long_cache_stays_in_place_on_every_tpu_and_the_rounds_are_one_loop(mesh, topology, mode, rule):
    """Two layers, batch 2, 16,384 slots: a branch for every piece of the prefix, and the branches copy nothing."""
    engine, weights = llama3_engine(2, DynamicTree(16, 4, 4))
    engine = dataclasses.replace(engine, mode=mode, rule=RULES[rule])
    chips = decode_program.tpu_mesh(topology, tensor=4 if topology.startswith("v5p") else 8)
    plan = decode_program.plan_rounds(engine, weights, chips, batch=2, capacity=16384)
    assert not plan.cache_copies and not plan.host_calls and plan.aliased >= plan.cache_bytes
    assert plan.outer_loops == 1
    assert not [message for message in plan.sent if str(VOCAB) in message], f"{plan.sent}"


def test_a_cache_beyond_the_chips_is_refused_in_one_sentence(mesh: jax.sharding.Mesh):
    engine, weights = llama3_engine(1, chain(1))
    engine, weights = Engine(engine.target), Weights(weights.target)
    with pytest.raises(ValueError, match=r"batch=8 .* does not fit a chip: weights and state alone take 3\d\.\d\d GiB"):
        decode_program.plan_rounds(engine, weights, mesh, batch=8, capacity=2**23)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "jax\[tpu\]"'):
        decode_program.tpu_mesh("v6e:2x4", tensor=8)


HLO = """HloModule drawn_by_hand
%update (p: bf16[2,8,128]) -> bf16[2,8,128] {
  ROOT %u = bf16[2,8,128]{2,1,0} dynamic-update-slice(%p, %row, %zero)
}
%rewrite (p: bf16[2,8,128]) -> bf16[2,8,128] {
  %inner = bf16[2,8,128]{2,1,0} copy(%p)
  ROOT %m = bf16[2,8,128]{2,1,0} multiply(%inner, %inner)
}
%branch (p: bf16[2,8,128]) -> bf16[2,128,8] {
  ROOT %swapped = bf16[2,128,8]{1,2,0} copy(%p)
}
%body (p: (s32[], bf16[2,8,128])) -> (s32[], bf16[2,8,128]) {
  %in_place = bf16[2,8,128]{2,1,0} fusion(%p), kind=kLoop, calls=%update
  %rewritten = bf16[2,8,128]{2,1,0} fusion(%p), kind=kLoop, calls=%rewrite
  %fetch = (bf16[2,8,128]{2,1,0:S(1)}, bf16[2,8,128]{2,1,0}, u32[]) copy-start(%p)
  %twin = (bf16[2,8,128]{2,1,0}, bf16[2,8,128]{2,1,0}, u32[]) copy-start(%p)
  %small = bf16[8,128]{1,0} copy(%q)
  %sum = f32[4,8]{1,0} all-reduce(%x), to_apply=%add
  %choice = bf16[2,128,8]{1,2,0} conditional(%i, %p, %p), branch_computations={%branch, %branch}
}
ENTRY %main (p: bf16[2,8,128]) -> bf16[2,8,128] {
  %relaid = bf16[2,8,128]{1,2,0} copy(%p)
  %loop = (s32[], bf16[2,8,128]{1,2,0}) while(%start), condition=%going, body=%body
}
"""


def test_copies_are_found_in_a_hand_drawn_program():
    program = hlo.parse(HLO)
    loop = list(decode_program._in_loops(program))
    copied = [i.name for i in loop if decode_program._copies(program, i, {decode_program._dims((2, 8, 128))})]
    assert sorted(copied) == ["rewritten", "swapped", "twin"]
    assert [decode_program._named(i) for i in loop if i.kind in hlo.COLLECTIVES] == ["all-reduce f32[4,8]"]
