"""Runs that are stopped go on as if they had not been: on the mesh they were on, and on any other."""

import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toy_run
from orbax.checkpoint import v1 as ocp
from processes import ONE_OF_SEVERAL

from jaxspec.checkpoints.tracking import read_metrics
from jaxspec.parallel.mesh import make_mesh

STEPS = 6


def losses(folder: Path) -> list[float]:
    """Of every step."""
    found = [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    return [loss for _, loss in found]


def mesh_of(sizes: tuple[int, int, int]) -> jax.sharding.Mesh:
    return make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses on one device."""
    folder = tmp_path_factory.mktemp("whole")
    toy_run.train(folder, STEPS, mesh_of((1, 1, 1)))
    return losses(folder)


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 1, 1), (1, 1, 1)), ((8, 1, 1), (2, 2, 2)), ((2, 2, 2), (1, 4, 1))],
    ids=str,
)
def test_the_next_losses_are_the_same_on_another_mesh(
    tmp_path: Path,
    uninterrupted: list[float],
    before: tuple[int, int, int],
    after: tuple[int, int, int],
):
    toy_run.train(tmp_path, 4, mesh_of(before))
    assert toy_run.train(tmp_path, STEPS, mesh_of(after)).resumed_from == 4
    if before == after:
        assert losses(tmp_path) == uninterrupted
    np.testing.assert_allclose(losses(tmp_path), uninterrupted, rtol=1e-5)


def in_processes(folder: Path, steps: int, count: int, port: int) -> list[str]:
    """The run in `count` processes of one device; returns what each told."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | ONE_OF_SEVERAL
    command = [sys.executable, toy_run.__file__, str(folder), str(steps), "-1", str(count), "1"]
    started = [
        subprocess.Popen(
            [*command, f"127.0.0.1:{port}", str(rank), str(count)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    try:
        ended = [process.communicate(timeout=120) for process in started]
        assert [process.returncode for process in started] == [0] * count, ended
        return [errors for _, errors in ended]
    finally:
        for process in started:
            process.kill()


def test_the_next_losses_are_the_same_in_more_or_fewer_processes(tmp_path: Path, uninterrupted: list[float]):
    toy_run.train(tmp_path, 3, mesh_of((2, 1, 1)), save_every=1)
    damaged = max((tmp_path / "3" / "state" / "d").iterdir(), key=lambda file: file.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for told in in_processes(tmp_path, 4, 2, port):
        assert ("step 3 is skipped" in told) == ("resumed from step 2" in told)
    assert toy_run.train(tmp_path, STEPS, mesh_of((1, 1, 1))).resumed_from == 4
    np.testing.assert_allclose(losses(tmp_path), uninterrupted, rtol=1e-5)
    assert [line["step"] for line in read_metrics(tmp_path) if "eval" in line] == [4, STEPS]


def whole_state(folder: Path) -> Any:
    """All arrays of the last step."""
    path = str(folder / str(STEPS))
    stored: Any = ocp.metadata(path, checkpointable_name="state").metadata
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.load(path, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), stored))


def killed(process: Any, folder: Path, draw: random.Random) -> bool:
    """Kill the run a random while after a random step; whether that was during a save."""
    metrics, step = folder / "metrics.jsonl", draw.randrange(STEPS)
    while process.is_alive() and (not metrics.is_file() or metrics.read_text().count('"loss"') < step):
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.05))
    process.kill()
    process.join()
    return any(folder.glob("*tmp*"))


@pytest.mark.slow
def test_whatever_moment_a_run_is_killed_at_it_ends_with_the_same_bits(
    tmp_path: Path, record_property: Callable[[str, object], None]
):
    """Every fifth goes on with two devices instead of one, and its losses are the same to 1e-5."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["toy_run"])

    def start(folder: Path, devices: int = 1) -> Any:
        process = forks.Process(target=toy_run.train_alone, args=(folder, STEPS, devices))
        process.start()
        return process

    start(tmp_path / "whole").join()
    expected, state = losses(tmp_path / "whole"), whole_state(tmp_path / "whole")
    draw, during_saves, finished = random.Random(0), 0, 0
    for moment in range(50):
        folder, devices = tmp_path / str(moment), 2 if moment % 5 == 4 else 1
        during_saves += killed(start(folder), folder, draw)
        finished += (folder / str(STEPS)).is_dir()
        start(folder, devices).join()
        np.testing.assert_allclose(losses(folder), expected, rtol=1e-5)
        if devices == 1:
            assert losses(folder) == expected
            jax.tree.map(np.testing.assert_array_equal, whole_state(folder), state)
    record_property("killed during a save", during_saves)
    record_property("killed after the last save", finished)
    assert during_saves > 5 and finished < 25
