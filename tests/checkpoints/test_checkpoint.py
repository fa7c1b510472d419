"""Checkpoints: exact, on any mesh, whole or absent, and checked when read."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from jaxspec.checkpoints import models, runs
from jaxspec.checkpoints.folders import PATIENCE, abstract_like
from jaxspec.checkpoints.manifest import MANIFEST
from jaxspec.checkpoints.models import load_model, model_kind, save_model
from jaxspec.checkpoints.runs import BestMetric, RunCheckpoints
from jaxspec.parallel.mesh import make_mesh

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


def raw(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def assert_same(a: Any, b: Any) -> None:
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


def largest_file(folder: Path) -> Path:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    return max(files, key=lambda p: p.stat().st_size)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def write_steps(folder: Path, *steps: int) -> None:
    with RunCheckpoints(folder, keep=9) as run:
        for step in steps:
            run.save(step, {"a": jnp.full(2, step)}, DATA, CONFIG)


def read(run: RunCheckpoints, step: int | None = None) -> list[int]:
    return run.restore(step, like({"a": jnp.zeros(2, int)}, one_device())).state["a"].tolist()


def numbers(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def test_the_best_steps_are_kept_besides_the_last(tmp_path: Path):
    taus = {1: 2.0, 2: None, 3: 4.0, 4: 3.0, 5: float("nan"), 6: 4.0, 7: None, 8: 1.0}
    with RunCheckpoints(tmp_path, keep=2, keep_best=1, best_metric=BestMetric("tau", rising=True)) as run:
        improving = []
        for step, tau in taus.items():
            metrics = {} if tau is None or tau != tau else {"tau": tau}
            improving.append(run.improves({"tau": tau}))
            run.save(step, {"a": jnp.full(2, step)}, DATA, CONFIG, metrics=metrics)
        assert improving == [True, False, True, False, False, False, False, False]
        assert run.best_step() == 6 and numbers(tmp_path) == [6, 7, 8]
    with RunCheckpoints(tmp_path, keep=2, keep_best=1, best_metric=BestMetric("tau", rising=False)) as run:
        assert run.best_step() == 8 and run.improves({"tau": 0.5}) and not run.improves({"loss": 0.5})


@pytest.mark.parametrize(("damage", "match"), [(flip_a_bit, "contents changed"), (Path.unlink, "missing")])
def test_a_damaged_step_is_skipped_with_a_warning_and_makes_way(tmp_path: Path, damage: Any, match: str):
    write_steps(tmp_path, 1, 2, 3)
    damage(largest_file(tmp_path / "3"))
    with RunCheckpoints(tmp_path) as run:
        with pytest.raises(ValueError, match=match):
            run.restore(3, {})
        with pytest.warns(UserWarning, match=f"{tmp_path}/3.*{match}.*; step 3 is skipped"):
            assert read(run) == [2, 2]
        assert run.latest_step() == 2
        run.save(3, {"a": jnp.full(2, 9)}, DATA, CONFIG)
        assert read(run) == [9, 9] and numbers(tmp_path) == [2, 3]


def test_a_half_written_step_is_skipped_with_a_warning_and_makes_way(tmp_path: Path):
    write_steps(tmp_path, 1, 2)
    (tmp_path / "2" / MANIFEST).unlink()
    with pytest.warns(UserWarning, match=f"{tmp_path}/2: not a checkpoint .* half of one .*; step 2 is skipped"):
        run = RunCheckpoints(tmp_path)
    with run:
        assert read(run) == [1, 1] and run.latest_step() == 1
        run.save(2, {"a": jnp.full(2, 5)}, DATA, CONFIG)
        assert read(run) == [5, 5]


def test_where_no_step_is_intact_nothing_is_loaded(tmp_path: Path):
    write_steps(tmp_path, 1, 2)
    for step in ("1", "2"):
        flip_a_bit(largest_file(tmp_path / step))
    with RunCheckpoints(tmp_path) as run, pytest.warns(UserWarning, match="is skipped"):
        with pytest.raises(ValueError, match="none of its checkpoints is intact; move the folder away to begin again"):
            read(run)


def test_a_step_saved_in_the_background_is_the_state_of_its_moment(tmp_path: Path):
    advance = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    state = advance({str(i): jnp.zeros((512, 512)) for i in range(8)})
    with RunCheckpoints(tmp_path) as run:
        run.save(1, state, DATA, CONFIG, wait=False)
        for _ in range(5):
            state = advance(state)
        run.save(6, state, DATA, CONFIG, wait=False)
        state = advance(state)
        abstract = like(state, one_device())
        for step in (1, 6):
            restored = run.restore(step, abstract).state
            assert all(bool(jnp.all(a == step)) for a in jax.tree.leaves(restored))


def test_a_run_goes_on_while_a_step_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_manifest, finish = runs.write_manifest, threading.Event()
    # `wait` returns whether the event was set within 20 s.
    monkeypatch.setattr(runs, "write_manifest", lambda *arguments: finish.wait(20) and write_manifest(*arguments))
    with RunCheckpoints(tmp_path, keep_best=1, best_metric=BestMetric("tau", rising=True)) as run:
        run.save(1, {"a": jnp.zeros(2)}, DATA, CONFIG, wait=False)
        assert not run.improves({}) and not (tmp_path / "1").exists()
        finish.set()
        run.add_metrics(1, {"tau": 2.0})
        assert run.best_step() == 1 and not run.improves({"tau": 2.0}) and run.improves({"tau": 3.0})
    assert runs.complete_steps(tmp_path) == {1: {"tau": 2.0}}
    with RunCheckpoints(tmp_path) as run:
        assert run.restore(None, like({"a": jnp.zeros(2)}, one_device())).metrics == {"tau": 2.0}


def test_a_full_disk_is_told_of_and_leaves_the_step_before(tmp_path: Path):
    """A limit on the size of files stands for the disk's."""
    large = {"a": jax.random.normal(jax.random.key(0), (512, 512))}
    told: list[str] = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunCheckpoints(tmp_path, tell=told.append) as run:
        run.save(1, large, DATA, CONFIG)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            run.save(2, large, DATA, CONFIG, wait=False)
            with pytest.raises(OSError, match="step 2 could not be saved") as failed:
                run.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        expected = f"{tmp_path}: step 2 could not be saved ({os.strerror(errno.EFBIG)}); the last complete step is 1"
        assert told == [expected] and str(failed.value) == expected
        assert [p.name for p in tmp_path.iterdir()] == ["1"]
        run.save(3, large, DATA, CONFIG)
        assert_same(run.restore(None, like(large, one_device())).state, large)


def test_failed_saves_in_a_row_stop_a_run_that_does_not_wait_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fail = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    state, told = {"a": jnp.zeros(2)}, []
    with RunCheckpoints(tmp_path, tell=told.append) as run:
        with monkeypatch.context() as patched:
            patched.setattr(runs, "write_manifest", fail)
            for step in range(1, PATIENCE + 1):
                run.save(step, state, DATA, CONFIG, wait=False)
            with pytest.raises(OSError, match=rf"step {PATIENCE} .*\(No space left on device\); no step is saved"):
                run.save(PATIENCE + 1, state, DATA, CONFIG, wait=False)
        assert len(told) == PATIENCE and not any(tmp_path.iterdir())
        run.save(PATIENCE + 1, state, DATA, CONFIG, wait=True)
        run.save(PATIENCE + 2, state, DATA, CONFIG, wait=False)
        assert run.latest_step() == PATIENCE + 2


SAVE_FOR_EVER = """
import sys, jax.numpy as jnp
from jaxspec.checkpoints.runs import RunCheckpoints
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


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="mine: holds something that jaxspec did not export, so it is left alone"):
        save_model(tmp_path / "mine", {"a": jnp.zeros(2)}, CONFIG, kind="drafter")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_save_that_fails_leaves_the_model_before_and_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_model(tmp_path / "m", {"a": jnp.zeros(2)}, CONFIG, kind="drafter")
    with monkeypatch.context() as patched:
        patched.setattr(models, "write_manifest", lambda *_: (tmp_path / "none" / "x").write_text(""))
        with pytest.raises(OSError, match="m: could not be written"):
            save_model(tmp_path / "m", {"a": jnp.ones(2)}, CONFIG, kind="drafter")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert load_model(tmp_path / "m")[0]["a"].tolist() == [0, 0]


def test_folders_that_hold_no_such_model_are_refused(tmp_path: Path):
    save_model(tmp_path / "m", {"a": jnp.zeros(2)}, CONFIG, kind="target")
    ocp.save(str(tmp_path / "foreign"), {"a": jnp.zeros(2)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "_CHECKPOINT_METADATA").write_text("{")
    write_steps(tmp_path / "run", 1)
    for name, match in {
        "m": "holds a target, not a drafter",
        "foreign": "not a checkpoint of jaxspec, or half of one",
        "empty": "not a checkpoint of jaxspec, or half of one",
        "torn": "not valid JSON",
        "run/1": "holds a run, not a drafter",
        "none": "no such folder",
    }.items():
        with pytest.raises(ValueError, match=match):
            load_model(tmp_path / name, kind="drafter")


def test_numbered_folders_that_are_no_steps_are_left_alone(tmp_path: Path):
    for name in ("2021", "1tmp", "3.tmpl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_text("{}")
    with RunCheckpoints(tmp_path, keep=1, tell=lambda _: None) as run:
        for step in (1, 2):
            run.save(step, {"a": jnp.full(2, step)}, DATA, CONFIG)
    assert not (tmp_path / "1").exists()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} >= {"2021", "1tmp", "3.tmpl", "2"}
