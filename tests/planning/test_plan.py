"""Plans of training on TPUs that are not here: what fits, what binds, and how fast a mesh axis is on the network."""

import dataclasses
import importlib
import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxspec import config
from jaxspec.__main__ import main
from jaxspec.data.draft_vocab import save_maps
from jaxspec.distillation.compilers import lower_step
from jaxspec.planning import cost, decode_program, hlo
from jaxspec.planning.chips import CHIPS, chip_of, device_part, network_bandwidth
from jaxspec.planning.plan import PARTS, Costs, Memory, StepPlan, abstract_arguments, scored_tokens, target_shape
from jaxspec.targets.decoder import SHAPES

pytestmark = pytest.mark.usefixtures("compile_afresh", "compile_fully")

plan: Any = importlib.import_module("jaxspec.train.plan")
JOBS = [name for name in config.experiments() if name.rpartition("_")[2] in ("7b", "8b", "13b", "33b", "70b")]
SMALL = ("target=tiny", "data.batch=8", "data.length=64", "mesh.fsdp=4", "optimizer.epochs=none", "optimizer.steps=360")


def chips(*places: tuple[int, int, int], slices: tuple[int, ...] = ()) -> list[Any]:
    numbers = slices or (0,) * len(places)
    return [SimpleNamespace(coords=place, slice_index=n) for place, n in zip(places, numbers, strict=True)]


def test_an_axis_of_the_torus_has_a_link_and_a_whole_ring_two():
    v6e, link = CHIPS["v6e"], CHIPS["v6e"].link_bandwidth
    row = [(x, 0, 0) for x in range(8)]
    assert network_bandwidth(v6e, chips(*row), (8, 8, 1)) == link
    assert network_bandwidth(v6e, chips(*((x, 0, 0) for x in range(16))), (16, 16, 1)) == 2 * link
    square = [(x, y, 0) for x in range(8) for y in range(8)]
    assert network_bandwidth(v6e, chips(*square), (8, 8, 1)) == 2 * link
    v5p = CHIPS["v5p"]
    cube = [(x, y, z) for x in range(4) for y in range(4) for z in range(8)]
    assert network_bandwidth(v5p, chips(*cube), (4, 4, 8)) == 6 * v5p.link_bandwidth
    assert network_bandwidth(v5p, chips(*cube[:2]), (4, 4, 8)) == v5p.link_bandwidth


def test_slices_share_the_slower_network_and_cores_of_a_chip_need_none():
    v5e = CHIPS["v5e"]
    assert network_bandwidth(v5e, chips((0, 0, 0), (0, 0, 0), slices=(0, 1)), (4, 4, 1)) == v5e.slice_bandwidth
    assert network_bandwidth(CHIPS["v4"], chips((0, 0, 0), (0, 0, 0)), (2, 2, 1)) == math.inf


def test_a_device_of_a_chip_of_two_has_half_of_all_it_does():
    whole, half = CHIPS["tpu7x"], device_part(CHIPS["tpu7x"])
    assert 2 * half.flops == whole.flops and 2 * half.hbm_bytes == whole.hbm_bytes
    assert device_part(CHIPS["v6e"]) == CHIPS["v6e"]


@pytest.mark.parametrize(
    ("topology", "match"),
    [("v9:2x2", "there is no chip 'v9'; choose from v4, v5e"), ("v5e", "give the chip and the slice's shape"),
     ("v5e:4xx", "give the chip and the slice's shape")],
)  # fmt: skip
def test_a_topology_that_is_none_is_refused(topology: str, match: str):
    with pytest.raises(ValueError, match=match):
        chip_of(topology)


def a_plan(**costs: Any) -> StepPlan:
    given = {
        "flops": 9e12,
        "model_flops": 8e12,
        "bytes": 1e9,
        "computing": 0.01,
        "moving": 0.005,
        "largest_message": "",
    }
    given |= {"sending": {"fsdp": 0.004}, "collective_bytes": {"fsdp": 4e8}} | costs
    memory = Memory(1, 1, 1, 1, 0, 4, 16)
    return StepPlan({"fsdp": 4}, 4, memory, Costs(**given), 1000, 918e12, 1)


def test_the_roofline_is_work_or_network_whichever_is_longer():
    hidden = a_plan()
    assert hidden.costs is not None and hidden.costs.bound_by == "compute"
    assert hidden.costs.roofline == pytest.approx(0.015) and hidden.tokens_per_second == pytest.approx(1000 / 0.015)
    assert hidden.mfu == pytest.approx(8e12 / 0.015 / 918e12)
    assert hidden.chip_hours(3600) == pytest.approx(4 * 0.015)
    slow = a_plan(sending={"fsdp": 0.02, "tensor": 0.03})
    assert slow.costs is not None and slow.costs.bound_by == "network (tensor)" and slow.costs.roofline == 0.05
    assert "data.batch" in slow.advice
    assert a_plan(moving=0.02).costs.bound_by == "memory"  # type: ignore[union-attr]


def test_a_target_that_is_not_here_is_known_by_its_name(tmp_path: Path):
    assert target_shape("models/llama3-8b") == SHAPES["llama3-8b"]
    with pytest.raises(ValueError, match="there is no such folder, and no shape is called so; give a folder with its"):
        target_shape("models/unknown-9b")


def test_the_tokens_a_drafter_scores_are_given_or_those_of_its_file(tmp_path: Path):
    missing = config.load("eagle3_llama3_8b").draft_vocab
    with pytest.raises(ValueError, match=r"draft_vocab\.safetensors, which is not here: make it .*--draft-vocab 32000"):
        scored_tokens(missing, 100)
    assert scored_tokens(missing, 100, 40) == 40
    save_maps(tmp_path / "maps.safetensors", np.arange(0, 100, 4), 100)
    assert scored_tokens(str(tmp_path / "maps.safetensors"), 100) == 25
    assert scored_tokens(None, 100) is None


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An EAGLE-2 step of the bundled target on four v6e chips."""
    pytest.importorskip("libtpu")
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    assert main(["plan", "eagle2", *SMALL, "--topology", "v6e:2x2", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_a_plan_has_the_agreed_keys_and_they_fit_together(planned: dict[str, Any]):
    memory = planned["hbm_bytes_per_chip"]
    assert planned["config"] == "eagle2" and planned["topology"] == "v6e:2x2"
    assert planned["fits"] and memory["total"] < memory["capacity"] == 32 * 2**30
    assert sum(memory[part] for part in PARTS) == memory["total"]
    assert memory["optimizer"] == pytest.approx(2 * memory["drafter"], rel=0.01)  # two moments of what it holds
    assert planned["flops_per_chip"] > 0 and planned["model_flops_per_chip"] > 0
    seconds = planned["roofline_seconds_per_step"]
    work = planned["compute_seconds"] + planned["memory_seconds"]
    assert seconds == pytest.approx(max(work, sum(planned["collective_seconds"].values())))
    assert planned["mfu"] == pytest.approx(planned["model_flops_per_chip"] / seconds / 918e12)
    assert planned["tokens_per_second"] == pytest.approx(8 * 64 / seconds)
    assert planned["chip_hours"] == pytest.approx(4 * 360 * seconds / 3600)
    assert set(planned["collective_bytes"]) == {"fsdp"}


def test_the_step_has_the_flops_that_its_jaxpr_says(planned: dict[str, Any]):
    """Attention apart, which the kernel pads to 128 tokens and XLA computes again on the way back."""
    assert planned["flops_per_chip"] == pytest.approx(planned["model_flops_per_chip"], rel=0.1)


def test_a_config_that_does_not_suit_the_slice_is_one_sentence(capfd):
    pytest.importorskip("libtpu")
    assert main(["plan", "eagle2", *SMALL, "data.batch=6", "--topology", "v6e:2x2"]) == 1
    assert "data.batch is 6, and the mesh spreads rows over 4 devices: let it be a multiple" in capfd.readouterr().err
    assert main(["plan", "eagle2", *SMALL, "mesh.data=1", "--topology", "v6e:2x4"]) == 1
    assert "needs 4 devices, but there are 8" in capfd.readouterr().err
    assert main(["plan", "tiny", "--topology", "v6e:2x2"]) == 1
    assert "holds a PretrainConfig, not a DistillConfig" in capfd.readouterr().err


def test_without_libtpu_the_verb_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", "eagle2", *SMALL, "--topology", "v6e:2x2"]) == 1
    assert 'needs libtpu: pip install "jax[tpu]"' in capfd.readouterr().err


@pytest.mark.slow
def test_no_logits_are_sent_and_no_fp32_logits_of_all_tokens_exist():
    """HASS at Llama-3-8B's width, vocabulary and rows, two layers of the target, on 16 chips of v6e."""
    pytest.importorskip("libtpu")
    job = config.load("hass_llama3_8b", ["mesh.fsdp=16", "data.batch=16"])
    shape = dataclasses.replace(SHAPES["llama3-8b"], layers=2)
    mesh = decode_program.tpu_mesh("v6e:4x4", fsdp=16)
    step = plan.build_abstract(job, shape, mesh, None)
    compiled = lower_step("jit", mesh, step.task, step.optimizer, *abstract_arguments(step, None)).compile()
    program = hlo.parse(compiled.as_text() or "")
    sent = {m.largest for m in cost.cost_of(program, flops_per_second=lambda _: 1, bytes_per_second=1).sent}
    assert {s.dims for s in sent if shape.vocab in s.dims} <= {(shape.vocab, shape.width)}  # the head's own weights
    made = {s for lines in program.computations.values() for i in lines for s in i.result if s.kind == "f32"}
    of_all_tokens = job.data.length * shape.vocab  # one row a chip
    assert not [s for s in made if shape.vocab in s.dims and s.size >= of_all_tokens]


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_its_numbers(tmp_path: Path, capfd):
    pytest.importorskip("libtpu")
    big = ("target=llama3-70b", "dtype=bfloat16", "data.batch=4", "data.length=128", "mesh.fsdp=4")
    assert main(["plan", "eagle2", *big, "--topology", "v6e:2x2", "--json", str(tmp_path / "p.json")]) == 1
    assert "does not fit: the step needs" in capfd.readouterr().out
    found = json.loads((tmp_path / "p.json").read_text())
    assert not found["fits"] and found["hbm_bytes_per_chip"]["target"] > 32 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_every_job_compiles_for_its_chips_and_fits(name: str):
    pytest.importorskip("libtpu")
    job = config.load(name)
    assert isinstance(job, config.DistillConfig)
    scored = 32000 if job.draft_vocab else None
    for topology in ("v5p:4x4x8",) if name.endswith("70b") else ("v6e:8x8", "v5e:8x8"):
        found = plan.plan_config(job, topology, scored)
        assert found.fits, f"{name} on {topology}: {found.why}"
        assert found.memory.total < found.memory.capacity
    assert dataclasses.asdict(job.checkpoint)["folder"] == f"runs/{name}"
