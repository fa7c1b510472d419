"""Drafters trained from hidden states that other projects dumped, as online."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dump_toys import (
    COUNT,
    TAPS,
    Text,
    check_store,
    dump_specforge,
    dump_speculators,
    imported,
    write_foreign_target,
)

from jaxspec.__main__ import main
from jaxspec.config import DistillConfig, load
from jaxspec.data.chat import ChatTokenizer
from jaxspec.distillation.loss import batch_loss
from jaxspec.distillation.objective import Objective
from jaxspec.distillation.task import Frozen, Task
from jaxspec.interchange.hf import load_tables, load_target
from jaxspec.parallel.mesh import batch_sharding, make_mesh
from jaxspec.training.batches import place_rows, read_data
from jaxspec.training.distill import read_features
from jaxspec.training.resolve import attention_blocks, drafter_for

CONFIG = """
from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig

config = DistillConfig(
    name="toy",
    target="target",
    data=DataConfig("none", "none", length=64, batch=8, loss_on="assistant"),
    optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=1, steps=2, clip_value=0.5),
    checkpoint=CheckpointConfig("run"),
    export_folder="drafter",
)
"""
EAGLE3 = """
from jaxspec.config import derive
from jaxspec.distillation.objective import Objective

objective = Objective(steps=2, weights=(("soft_cross_entropy", 1.0),), noise=0.0)
config = derive("toy.py", name="toy3", drafter="eagle3", objective=objective)
"""
ONE = make_mesh(devices=jax.devices()[:1])


@pytest.fixture
def folder(folder: Path) -> Path:
    """The folder beside the target, with two configs."""
    (folder / "toy.py").write_text(CONFIG)
    (folder / "toy3.py").write_text(EAGLE3)
    return folder


def loss_of(taps: tuple[int, ...], *changes: str, stored: bool) -> float:
    """The loss of fresh weights on the first batch: of the target's own pass, or of what is stored."""
    found = load("toy.py", ["data.train=out/train", "data.eval=out/eval", "data.length=64", *changes])
    data = read_data(found, ChatTokenizer.load("target"), ONE)
    if not stored:
        batch, whole = data.train[0], load_target("target", dtype=jnp.float32)
        target, frozen = whole.module, whole.params
    else:
        batch = read_features(load_with_features(found), data, taps).train[0]
        target, frozen = load_tables("target", dtype=jnp.float32)
    objective = Objective(weights=(("soft_cross_entropy", 1.0),), noise=0, steps=2)
    drafter, _ = drafter_for(found, target.config)
    task = Task(target.clone(taps=drafter.taps, **attention_blocks(found, ONE)), drafter, objective)
    params = jax.jit(drafter.init_params)(jax.random.key(0), target.shared_tables(frozen))
    rows = place_rows(batch_sharding(ONE), cast(Any, SimpleNamespace(batch=len(batch["tokens"]), rows=None)), batch)
    sums = jax.jit(lambda p, r: batch_loss(task, Frozen(frozen), p, r, jax.random.key(1), learning=False)[1])
    return float(sums(params, rows).mean_loss(objective))


def load_with_features(config: DistillConfig) -> DistillConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, features="out"))


@pytest.mark.parametrize(
    "changes", [("drafter=eagle3", "head.taps=2,4,5"), ("drafter=eagle",)], ids=["eagle3", "eagle"]
)
def test_the_loss_from_a_dump_is_that_of_training_online_within_its_dtype(
    folder: Path, texts: list[Text], changes: tuple[str, ...]
):
    dump_speculators(folder / "dump", texts)
    imported("dump")
    taps = TAPS if "drafter=eagle3" in changes else ()
    online, offline = (loss_of(taps, *changes, stored=stored) for stored in (False, True))
    assert abs(online - offline) < 5e-3 * online and online != offline


def test_a_drafter_is_trained_and_exported_for_a_target_that_cannot_be_run(folder: Path, texts: list[Text]):
    write_foreign_target(folder / "foreign", folder / "target", rope_scaling={"rope_type": "unheard-of"})
    dump_specforge(folder / "dump", texts, behind=False)
    done = imported("dump", target="foreign")
    check_store(texts)
    assert done["finding"]["centred"] is False
    verb, config, *words = done["train_with"].split()[1:]
    assert [verb, config] == ["train", "eagle3"]
    assert main(["train", "toy3.py", *words, "--json", "train.json"]) == 0
    trained = json.loads(Path("train.json").read_text())
    assert trained["documents"]["train"]["documents"] == COUNT - 2 and np.isfinite(trained["loss"])
    assert main(["export", "drafter", "served", "--to", "speculators", "--target", "foreign"]) == 0
    described = json.loads(Path("served/config.json").read_text())["speculators_config"]
    assert described["verifier"]["architectures"] == ["StrangeForConditionalGeneration"]
    assert main(["train", "toy.py", "target=foreign", "data.train=out/train", "data.eval=out/eval"]) == 1


@pytest.mark.slow
def test_steps_from_a_dump_are_those_of_training_online_within_its_dtype(folder: Path, texts: list[Text]):
    dump_speculators(folder / "dump", texts)
    imported("dump")
    words = ("data.train=out/train", "data.eval=out/eval", "head.taps=2,4,5", "optimizer.steps=4", "log_every=1")
    lines = {}
    for name, more in {"online": (), "offline": ("data.features=out",)}.items():
        places = (f"checkpoint.folder={name}", f"export_folder={name}_drafter")
        assert main(["train", "toy3.py", *words, *places, *more]) == 0
        told = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        lines[name] = [line["loss"] for line in told if "loss" in line]
    assert len(lines["online"]) >= 4 and lines["online"][3] < lines["online"][0]
    np.testing.assert_allclose(lines["offline"], lines["online"], rtol=5e-3)
