"""Checkpoints: exact, on any mesh, whole or absent, and checked when read."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from jaxspec.checkpoint import CHECKSUMS, RunCheckpoints, abstract_like, load_model, model_kind, save_model
from jaxspec.sharding import make_mesh

DATA, CONFIG = {"next_index": 3}, {"name": "x", "sizes": [1, 2]}


def make_state(seed: int = 0) -> dict[str, Any]:
    params = {
        "embed": jax.random.normal(jax.random.key(seed), (8, 4)),
        "layers": {"norm": jnp.ones((2, 4), jnp.bfloat16)},
    }
    optimizer = optax.adamw(1e-3).init(params)
    return {"params": params, "optimizer": optimizer, "step": jnp.int32(7), "key": jax.random.key(seed + 1)}


def like(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return abstract_like(tree, jax.tree.map(lambda _: sharding, tree))


def one_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def assert_same(a: Any, b: Any) -> None:
    def raw(x: Any) -> np.ndarray:
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(
        np.array_equal(raw(x), raw(y)) and x.dtype == y.dtype
        for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def test_a_restored_state_is_the_one_saved_keys_and_data_place_included(tmp_path: Path):
    state = make_state()
    with RunCheckpoints(tmp_path / "run") as run:
        run.save(7, state, DATA, CONFIG, metrics={"loss": 1.5})
    with RunCheckpoints(tmp_path / "run") as run:
        restored = run.restore(None, like(state, one_device()))
    assert restored.step == 7 and restored.data_state == DATA and restored.config == CONFIG
    assert_same(restored.state, state)


def test_a_state_saved_on_one_mesh_is_restored_on_another(tmp_path: Path):
    first, second = make_mesh(4, 2, 1), make_mesh(1, 2, 1, devices=jax.devices()[:2])
    saved = jax.device_put({"embed": make_state()["params"]["embed"]}, NamedSharding(first, P("data", "fsdp")))
    wanted = NamedSharding(second, P(None, "fsdp"))
    with RunCheckpoints(tmp_path) as run:
        run.save(1, saved, DATA, CONFIG)
        restored = run.restore(1, like(saved, wanted)).state
    assert restored["embed"].sharding == wanted
    assert_same(restored, saved)


def test_only_the_last_steps_are_kept(tmp_path: Path):
    with RunCheckpoints(tmp_path, keep=2) as run:
        assert run.latest_step() is None
        for step in (1, 2, 3):
            run.save(step, {"a": jnp.full(2, step)}, DATA, CONFIG)
        run.save(3, {"a": jnp.full(2, 9)}, DATA, CONFIG)
        assert run.latest_step() == 3
        assert run.restore(None, like({"a": jnp.full(2, 3)}, one_device())).state["a"].tolist() == [3, 3]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "3"]


def test_a_step_that_is_not_there_is_named(tmp_path: Path):
    with RunCheckpoints(tmp_path) as run:
        with pytest.raises(ValueError, match="holds no complete checkpoint"):
            run.restore(None, {})
        with pytest.raises(ValueError, match="5: no such checkpoint"):
            run.restore(5, {})


@pytest.mark.parametrize("wanted", [{"a": jnp.zeros(3)}, {"b": jnp.zeros(2)}, {"a": jnp.zeros(2), "b": jnp.zeros(2)}])
def test_a_state_of_another_form_is_refused(tmp_path: Path, wanted: dict[str, jax.Array]):
    with RunCheckpoints(tmp_path) as run:
        run.save(1, {"a": jnp.zeros(2)}, DATA, CONFIG)
        with pytest.raises(ValueError, match="does not fit this run"):
            run.restore(1, like(wanted, one_device()))


SAVE_FOR_EVER = """
import sys, jax.numpy as jnp
from jaxspec.checkpoint import RunCheckpoints
state = {str(i): jnp.full((512, 512), i, jnp.float32) for i in range(12)}
run = RunCheckpoints(sys.argv[1])
run.save(1, state, {}, {})
print("saved", flush=True)
run.save(2, state, {}, {})
"""


def test_a_kill_during_a_save_leaves_the_step_before(tmp_path: Path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, tmp_path], stdout=subprocess.PIPE, env=environment
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"saved\n"
        while not list(tmp_path.glob("2.*tmp*")):
            assert child.poll() is None
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
    assert not (tmp_path / "2").exists()
    state = {str(i): jnp.full((512, 512), i, jnp.float32) for i in range(12)}
    with RunCheckpoints(tmp_path) as run:
        assert run.latest_step() == 1 and not list(tmp_path.glob("*tmp*"))
        assert_same(run.restore(None, like(state, one_device())).state, state)
        run.save(2, state, DATA, CONFIG)
        assert run.latest_step() == 2


def largest_file(folder: Path) -> Path:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS]
    return max(files, key=lambda p: p.stat().st_size)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(("damage", "match"), [(flip_a_bit, "contents changed"), (Path.unlink, "missing")])
def test_damage_is_found_and_the_file_named(tmp_path: Path, damage: Any, match: str):
    save_model(tmp_path / "m", {"a": jax.random.normal(jax.random.key(0), (64, 64))}, CONFIG, kind="drafter")
    file = largest_file(tmp_path / "m")
    damage(file)
    with pytest.raises(ValueError, match=f"{file.name}: .*{match}"):
        load_model(tmp_path / "m")


def test_a_model_loads_without_knowing_its_shapes(tmp_path: Path):
    params = make_state()["params"]
    save_model(tmp_path / "m", params, CONFIG, kind="drafter")
    loaded, config = load_model(tmp_path / "m", kind="drafter")
    assert config == CONFIG and model_kind(tmp_path / "m") == "drafter"
    assert_same(loaded, params)


def test_a_model_loads_onto_a_mesh_and_replaces_the_one_before(tmp_path: Path):
    sharding = NamedSharding(make_mesh(8), P("data"))
    save_model(tmp_path / "m", {"b": jnp.zeros(3)}, CONFIG, kind="drafter")
    save_model(tmp_path / "m", {"a": jnp.arange(16)}, CONFIG, kind="drafter")
    params, _ = load_model(tmp_path / "m", sharding=sharding)
    assert list(params) == ["a"] and params["a"].sharding == sharding


def test_folders_that_hold_no_such_model_are_refused(tmp_path: Path):
    save_model(tmp_path / "m", {"a": jnp.zeros(2)}, CONFIG, kind="target")
    ocp.save(str(tmp_path / "foreign"), {"a": jnp.zeros(2)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "_CHECKPOINT_METADATA").write_text("{")
    for name, match in {
        "m": "holds a target, not a drafter",
        "foreign": "format None, not 'jaxspec/1'",
        "empty": "not a checkpoint of jaxspec, or half of one",
        "torn": "not valid JSON",
        "none": "no such folder",
    }.items():
        with pytest.raises(ValueError, match=match):
            load_model(tmp_path / name, kind="drafter")
