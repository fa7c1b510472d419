"""The manifest of a checkpoint: what it says, what it notices, and older formats."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from random_models import random_weights

from jaxspec.checkpoints.folders import abstract_like
from jaxspec.checkpoints.manifest import FORMAT, MANIFEST, read_manifest, verify
from jaxspec.checkpoints.models import load_drafter, load_model, save_model
from jaxspec.checkpoints.runs import RunCheckpoints
from jaxspec.drafters import DraftLM, DraftLMConfig

PARAMS = {"embed": jnp.ones((4, 2)), "layers": {"down": jnp.ones((3, 6, 2), jnp.bfloat16), "norm": jnp.ones(2)}}


def write_format_1(folder: Path, items: dict[str, Any], **about: Any) -> None:
    """As version 0.1 of jaxspec wrote models and steps."""
    ocp.save_checkpointables(str(folder), items, custom_metadata={"format": "jaxspec/1", **about})
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    sums = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    (folder / "jaxspec.sha256.json").write_text(json.dumps(sums))


def test_a_manifest_says_what_the_folder_holds(tmp_path: Path):
    about = {"metrics": {"loss": 2.5}, "provenance": {"run": "x"}, "tokenizer": {"vocab": 4}}
    save_model(tmp_path / "m", PARAMS, {"sizes": (1, 2)}, kind="target", about=about)
    manifest = json.loads((tmp_path / "m" / MANIFEST).read_text())
    assert manifest == {**read_manifest(tmp_path / "m"), "sha256": manifest["sha256"]}
    assert manifest["format"] == FORMAT and manifest["kind"] == "target" and manifest["config"] == {"sizes": [1, 2]}
    assert (
        manifest["metrics"] == {"loss": 2.5}
        and manifest["provenance"]["run"] == "x"
        and manifest["tokenizer"] == {"vocab": 4}
    )
    assert manifest["arrays"] == {
        "embed": {"shape": [4, 2], "dtype": "float32", "axes": ["vocab", "width"]},
        "layers/down": {"shape": [3, 6, 2], "dtype": "bfloat16", "axes": [None, "mlp", "width"]},
        "layers/norm": {"shape": [2], "dtype": "float32", "axes": [None]},
    }
    verify(tmp_path / "m", manifest)


def test_a_changed_manifest_is_noticed(tmp_path: Path):
    save_model(tmp_path / "m", PARAMS, {"rope_theta": 10000.0}, kind="target")
    path = tmp_path / "m" / MANIFEST
    path.write_text(path.read_text().replace("10000.0", "10001.0"))
    with pytest.raises(ValueError, match="its contents changed since it was saved"):
        load_model(tmp_path / "m")


def test_a_drafter_of_format_1_loads(tmp_path: Path):
    module = DraftLM(DraftLMConfig(24, 8, 1, 2, 1, 4, 16))
    params = random_weights(module, 0.2, 1)
    shape = {"vocab": 24, "width": 8, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 4, "mlp": 16}
    config = {"drafter": "draft_lm", "shape": shape, "about": {"tree": "chain:3"}}
    write_format_1(tmp_path / "m", {"params": params}, kind="drafter", config=config)
    found = load_drafter(tmp_path / "m")
    assert found.module == module and found.about == {"tree": "chain:3"}
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert read_manifest(tmp_path / "m")["format"] == FORMAT


def test_a_run_of_format_1_goes_on(tmp_path: Path):
    state = {"a": jnp.arange(3)}
    write_format_1(tmp_path / "5", {"state": state}, kind="run", data={"at": 7}, config={"seed": 1}, metrics={})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with RunCheckpoints(tmp_path) as run:
        restored = run.restore(None, abstract_like(state, {"a": device}))
        run.save(6, state, {}, {})
    assert restored.step == 5 and restored.data_state == {"at": 7} and restored.config == {"seed": 1}
    assert restored.state["a"].tolist() == [0, 1, 2] and (tmp_path / "5").is_dir() and (tmp_path / "6").is_dir()


def test_damage_and_halves_of_format_1_are_noticed(tmp_path: Path):
    write_format_1(tmp_path / "m", {"params": PARAMS}, kind="target", config={})
    largest = max((tmp_path / "m" / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="contents changed"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "jaxspec.sha256.json").unlink()
    with pytest.raises(ValueError, match="half of one"):
        load_model(tmp_path / "m")


def test_a_format_of_the_future_is_named(tmp_path: Path):
    save_model(tmp_path / "m", PARAMS, {}, kind="target")
    path = tmp_path / "m" / MANIFEST
    manifest = json.loads(path.read_text()) | {"format": "jaxspec/99"}
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"sha256": digest}))
    with pytest.raises(ValueError, match=f"format 'jaxspec/99', and this version reads jaxspec/1, {FORMAT}; a newer"):
        load_model(tmp_path / "m")
