"""Folders that jaxspec wrote in other layouts are held to their checksums by every reader, and a run's folder is told
apart from its drafter's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_weights, write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.checkpoints.manifest import MANIFEST
from jaxspec.checkpoints.models import drafter_config
from jaxspec.checkpoints.runs import BestMetric, RunCheckpoints
from jaxspec.checkpoints.tracking import session
from jaxspec.distillation.task import TrainState
from jaxspec.drafters import Eagle, EagleConfig
from jaxspec.interchange import tensors
from jaxspec.interchange.hf import load_tables, load_target, stored_weights
from jaxspec.interchange.published import read_drafter

HEAD = Eagle(EagleConfig(width=32, heads=4, kv_heads=2, head_dim=8, mlp=64))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a target, a drafter, and both as exported in HuggingFace layout."""
    folder = tmp_path_factory.mktemp("exports")
    write_target(folder / "target")
    write_drafter(folder / "drafter")
    assert main(["export", str(folder / "target"), "--to", "hf", str(folder / "hf")]) == 0
    export = ["export", str(folder / "drafter"), str(folder / "eagle"), "--to", "eagle"]
    assert main([*export, "--target", str(folder / "target")]) == 0
    return folder


def flip_a_bit(file: Path) -> None:
    found = bytearray(file.read_bytes())
    found[-3] ^= 4
    file.write_bytes(found)


READERS: list[tuple[str, Callable[[Path, Path], object]]] = [
    ("eagle", lambda folder, around: read_drafter(folder)),
    ("eagle", lambda folder, around: main(["import", "drafter", str(folder), str(around / "out")])),
    ("eagle", lambda folder, around: main(["inspect", str(folder)])),
    ("eagle", lambda folder, around: main(["export", str(folder), str(around / "out")])),
    ("eagle", lambda folder, around: main(["generate", "x", *use(around / "target"), "--drafter", str(folder)])),
    ("hf", lambda folder, around: load_target(folder, dtype=jnp.float32)),
    ("hf", lambda folder, around: load_tables(folder, dtype=jnp.float32)),
    ("hf", lambda folder, around: stored_weights(folder)),
    ("hf", lambda folder, around: main(["inspect", str(folder)])),
    ("hf", lambda folder, around: main(["import", "target", str(folder), str(around / "out")])),
    ("hf", lambda folder, around: main(["generate", "x", *use(folder)])),
]


def use(target: Path) -> list[str]:
    return ["--target", str(target), "--max-new-tokens", "2"]


@pytest.mark.parametrize(("name", "read"), READERS)
def test_a_flipped_bit_of_an_export_is_told_by_every_reader(
    name: str,
    read: Callable[[Path, Path], object],
    exports: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    shutil.copytree(exports / "target", tmp_path / "target")
    folder = shutil.copytree(exports / name, tmp_path / name)
    flip_a_bit(folder / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    try:
        assert read(folder, tmp_path) == 1
        told = capsys.readouterr().err
    except ValueError as error:
        told = str(error)
    assert f"{folder}/model.safetensors: its contents changed since jaxspec wrote it" in told
    assert "\n" not in told.strip() and sorted(tmp_path.iterdir()) == before


def test_a_meant_change_is_read_without_the_manifest(exports: Path, tmp_path: Path):
    folder = shutil.copytree(exports / "eagle", tmp_path / "eagle")
    (folder / "README.md").write_text("A note that was not there.")
    read_drafter(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("silu", "SILU"))
    with pytest.raises(ValueError, match=rf"config\.json: its contents changed .* remove {MANIFEST} if you meant it"):
        read_drafter(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("SILU", "silu") + "\n")
    (folder / MANIFEST).unlink()
    read_drafter(folder)
    shutil.copy(exports / "eagle" / MANIFEST, folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: missing"):
        read_drafter(folder)


def test_tables_of_an_export_in_shards_are_checked_and_its_layers_may_be_missing(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tensors, "SHARD_BYTES", 8000)
    folder = tmp_path / "hf"
    assert main(["export", str(exports / "target"), "--to", "hf", str(folder)]) == 0
    expected = load_tables(exports / "hf", dtype=jnp.float32)[1]
    names = json.loads((folder / tensors.INDEX).read_text())["weight_map"]
    kept = {names[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    layers = set(names.values()) - kept
    assert layers
    for name in layers:
        (folder / name).unlink()
    found = load_tables(folder, dtype=jnp.float32)[1]
    for name, table in expected.items():
        np.testing.assert_array_equal(found[name], table)
    with pytest.raises(ValueError, match="missing since jaxspec wrote it"):
        load_target(folder, dtype=jnp.float32)
    file = folder / names["model.norm.weight"]
    flip_a_bit(file)
    with pytest.raises(ValueError, match=f"{file}: its contents changed since jaxspec wrote it"):
        load_tables(folder, dtype=jnp.float32)


def write_run(folder: Path, steps: tuple[int, ...]) -> Path:
    best = BestMetric("simulated_tau", rising=True)
    model = {"kind": "drafter", "config": drafter_config("eagle", HEAD), "tokenizer": None}
    facts = {
        "name": "toy",
        "kind": "train",
        "steps": 9,
        "config": {"seed": 1, "export_folder": str(folder / "drafter")},
        "best_metric": best._asdict(),
        "model": model,
    }
    with session(folder, facts), RunCheckpoints(folder, keep=9, best_metric=best) as checkpoints:
        for step in steps:
            state = TrainState(random_weights(HEAD, 0.2, step), {}, jnp.int32(step), jax.random.key(0))
            checkpoints.save(step, state, {}, {}, metrics={"simulated_tau": 2.0})
    return folder


@pytest.mark.parametrize("inside", ["", "3"])
def test_a_run_given_as_drafter_says_where_its_drafter_is(
    inside: str, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = write_run(tmp_path / "run", (3,))
    words = ["generate", "x", "--target", str(exports / "target"), "--drafter", str(run / inside)]
    assert main(words) == 1
    told = capsys.readouterr().err
    assert f"{run}: the folder of a run, not a model: `jaxspec export {run} OUT` writes its best checkpoint" in told
    write_drafter(run / "drafter")
    assert main(words) == 1
    assert f"{run}: the folder of a run, not a model: its finished model is in {run}/drafter" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_says_so(exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run", ())
    assert main(["generate", "x", "--target", str(exports / "target"), "--drafter", str(run)]) == 1
    assert "it has no checkpoint yet, and the command that began it goes on" in capsys.readouterr().err
