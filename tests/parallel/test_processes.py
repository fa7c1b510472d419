"""Several processes join by flags, environment or cluster, train as one does, and fail, stop and go on together."""

import functools
import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pretrain_toy
import pytest
from processes import ONE_OF_SEVERAL, ends, finish, free_port, start, start_several, wait_for
from random_models import write_target

from jaxspec.__main__ import main
from jaxspec.checkpoints.models import load_drafter
from jaxspec.console import cli
from jaxspec.parallel import agreement
from jaxspec.parallel.mesh import make_mesh
from jaxspec.parallel.processes import ALONE, Launch, Place, place_of

ADDRESS = "10.0.0.2:8476"
VARIABLES = {"JAX_COORDINATOR_ADDRESS": ADDRESS, "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
CONFIG = """
import os
from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.data.packing import PackedBatches
from jaxspec.distillation.objective import Objective
from jaxspec.drafters import MedusaOptions

config = DistillConfig(
    name="toy",
    target="target",
    data=DataConfig("chats.jsonl", "chats.jsonl", length=64, batch=8, loss_on="assistant", eval_limit=8),
    optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=2, steps={steps}, clip_value=0.5),
    checkpoint=CheckpointConfig("run", save_every=4),
    export_folder="drafter",
    drafter="medusa",
    head=MedusaOptions(tokens=1, vocab=300),
    objective=Objective(weights=(("soft_cross_entropy", 1.0),)),
    log_every=1,
)
"""
BREAKS = """
def read(self, index, whole=PackedBatches.__getitem__):
    if index == 5 and self.shuffle and "broken" in os.getcwd():
        raise ValueError("document 3 is torn")
    return whole(self, index)

PackedBatches.__getitem__ = read
"""


def prepare(folder: Path, *, steps: int = 6) -> Path:
    """Writes a target, conversations and an experiment; returns the folder."""
    write_target(folder / "target")
    lines = []
    for i in range(40):
        turns = [{"role": "user", "content": f"{i} and 2 make"}, {"role": "assistant", "content": f"{i + 2}, they say"}]
        lines.append(json.dumps({"id": str(i), "source": "toy", "messages": turns}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    (folder / "toy.py").write_text(CONFIG.format(steps=steps))
    return folder


def succeed(runs: list[subprocess.Popen[str]]) -> None:
    for code, errors in ends(runs):
        assert code == 0, errors


def metrics(folder: Path, name: str) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize(
    ("flags", "variables", "place"),
    [
        ({}, {}, None),
        ({}, VARIABLES, Place(ADDRESS, 4, 3)),
        ({"process": 1}, VARIABLES, Place(ADDRESS, 4, 1)),
        ({"coordinator": "[fe80::1]:99", "processes": 2, "process": 0}, VARIABLES, Place("[fe80::1]:99", 2, 0)),
        ({"processes": 1}, VARIABLES | {"JAX_PROCESS_ID": "0"}, ALONE),
        ({"processes": 1}, {}, ALONE),
        ({}, {"JAX_COORDINATOR_ADDRESS": ADDRESS}, None),
    ],
)
def test_flags_come_before_the_environment_and_it_before_what_jax_finds(
    flags: dict[str, Any], variables: dict[str, str], place: Place | None, monkeypatch: pytest.MonkeyPatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place_of(Launch(**flags)) == place


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--processes", "2"], "--processes and --process go together"),
        (["--process", "0"], "--processes and --process go together"),
        (["--coordinator", ADDRESS], "--coordinator needs --processes"),
        (["--processes", "2", "--process", "1"], "--processes needs --coordinator"),
        (["--processes", "2", "--process", "2", "--coordinator", ADDRESS], "--process is 2; of 2 processes"),
        (["--processes", "2", "--process", "1", "--coordinator", "host"], "it must be HOST:PORT"),
        (["--processes", "0"], "--processes is 0"),
        (["--heartbeat-timeout", "0"], "--heartbeat-timeout is 0"),
    ],
)
def test_flags_that_do_not_fit_together_are_wrong_usage(words: list[str], complaint: str, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "eagle2", *words])
    assert stop.value.code == cli.EXIT_USAGE
    assert complaint in " ".join(capsys.readouterr().err.split())


def test_variables_that_are_no_numbers_are_wrong_usage(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    assert main(["train", "eagle2"]) == cli.EXIT_USAGE
    assert capsys.readouterr().err == (
        "jaxspec train: JAX_NUM_PROCESSES is 'two'; it must be a whole number, as --processes takes it\n"
    )


def test_a_process_alone_waits_for_nobody(tmp_path: Path):
    agreement.meet("here")
    agreement.agree("settings", {"seed": 1}, "mend it")
    agreement.check_shared(tmp_path / "none")
    assert agreement.exchange("numbers", 3) == [3] and not (tmp_path / "none").exists()


def test_a_bucket_that_is_not_mounted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "eagle2", "checkpoint.folder=gs://bucket/run"]) == 2
    assert "gs://bucket/run is on another machine" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_verbs_of_one_process_refuse_to_be_one_of_several(monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert main(["regenerate", "--prompts", "chats.jsonl", "--out", "answers.jsonl"]) == 1
    assert (
        "jaxspec regenerate runs in one process, and this is one of 4: give each its --shard" in capfd.readouterr().err
    )
    assert main(["compare", "eagle2"]) == 1
    assert "jaxspec compare runs in one process, and this is one of 4" in capfd.readouterr().err


def test_two_processes_found_by_jax_train_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Compares two processes of two devices, joined by SLURM's variables, with one process of four."""
    folder = prepare(tmp_path)
    words = ("train", "toy.py", "mesh.fsdp=2", "--json", "several.json")
    variables = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
        **ONE_OF_SEVERAL,
    }
    ranks = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    runs = [start(folder, *words, devices=2, **variables, **rank) for rank in ranks]

    monkeypatch.chdir(folder)
    monkeypatch.setattr("jaxspec.training.resolve.make_mesh", functools.partial(make_mesh, devices=jax.devices()[:4]))
    alone = ("checkpoint.folder=run_alone", "export_folder=drafter_alone", "--json", "alone.json")
    assert main([*words[:3], *alone]) == 0

    (code, told), (other, silent) = ends(runs)
    assert code == other == 0, told + silent
    assert "2 processes are here" in told and "step 6" in told and not silent
    np.testing.assert_allclose(metrics(folder / "run", "loss"), metrics(folder / "run_alone", "loss"), rtol=1e-6)
    several, one = (json.loads((folder / f"{name}.json").read_text()) for name in ("several", "alone"))
    assert several["tokens"] == one["tokens"] and several["eval"] == pytest.approx(one["eval"], rel=1e-5)
    ours, theirs = (load_drafter(folder / name).params for name in ("drafter", "drafter_alone"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, theirs)


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_and_preempted_ends_as_if_they_had_not_been(tmp_path: Path):
    """Bit for bit with the same number of processes; to a rounding error where one process takes over from two."""
    whole, torn = (prepare(tmp_path / name, steps=40) for name in ("whole", "torn"))
    words = ("train", "toy.py", "mesh.fsdp=2", "--heartbeat-timeout", "10")
    succeed(start_several([whole] * 2, *words, devices=2))

    runs = start_several([torn] * 2, *words, devices=2)
    wait_for((torn / "run" / "4").is_dir, runs)
    runs[1].kill()
    (code, errors), (killed, _) = ends(runs)
    assert (code, killed) == (cli.EXIT_PREEMPTED, -signal.SIGKILL), errors
    assert "lost" in errors and "start all 2 processes again with the same command" in errors

    runs = start_several([torn] * 2, *words, devices=2)
    wait_for((torn / "run" / "12").is_dir, runs)
    runs[0].kill()
    (killed, told), (code, errors) = ends(runs)
    assert "resumed from step" in told and killed == -signal.SIGKILL
    assert code in (cli.EXIT_PREEMPTED, -signal.SIGABRT), errors  # JAX aborts at the same moment

    runs = start_several([torn] * 2, *words, devices=2)
    wait_for((torn / "run" / "20").is_dir, runs)
    runs[1].terminate()
    for code, errors in ends(runs):
        assert code == cli.EXIT_PREEMPTED and "resume with the same command" in errors, errors

    alone = Path(shutil.copytree(torn, tmp_path / "alone"))
    succeed(start_several([torn] * 2, *words, devices=2))
    assert metrics(torn / "run", "loss") == metrics(whole / "run", "loss")
    ours, theirs = (load_drafter(folder / "drafter").params for folder in (torn, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    finish(start(alone, *words, devices=4))
    np.testing.assert_allclose(metrics(alone / "run", "loss"), metrics(whole / "run", "loss"), rtol=1e-6)


@pytest.mark.slow
def test_four_processes_pretrain_as_one_does(tmp_path: Path):
    """Two processes of each pair share a row's weights, and so read the same rows."""
    folder = tmp_path / "run"
    pretrain_toy.prepare(folder)
    words = ("pretrain", "toy.py", "mesh.tensor=2", "model.kv_heads=2", "optimizer.steps=12", "log_every=1")
    succeed(start_several([folder] * 4, *words, devices=1))
    finish(start(folder, *words, "checkpoint.folder=run_alone", "export_folder=export_alone", devices=4))
    np.testing.assert_allclose(metrics(folder / "run", "loss"), metrics(folder / "run_alone", "loss"), rtol=1e-6)


@pytest.mark.slow
def test_a_process_that_fails_brings_the_others_down_with_its_sentence(tmp_path: Path):
    folders = [prepare(tmp_path / name) for name in ("whole", "broken")]
    shared = [f"{name}={tmp_path / 'shared' / name}" for name in ("checkpoint.folder", "export_folder")]
    for folder in folders:
        (folder / "toy.py").write_text(CONFIG.format(steps=40) + BREAKS)
    (code, told), (other, errors) = ends(start_several(folders, "train", "toy.py", *shared, devices=1))
    assert code == other == cli.EXIT_FAILED
    assert "stopped, for process 1 of 2 failed: document 3 is torn" in told
    assert "process 1 of 2: document 3 is torn" in errors


@pytest.mark.slow
@pytest.mark.parametrize("differs", ["settings", "data", "folder"])
def test_hosts_that_differ_are_told_so_before_anything_is_computed(tmp_path: Path, differs: str):
    folders = [prepare(tmp_path / name) for name in ("first", "second")]
    shared = [f"{name}={tmp_path / 'shared' / name}" for name in ("checkpoint.folder", "export_folder")]
    if differs == "settings":
        (folders[1] / "toy.py").write_text(CONFIG.format(steps=7))
    if differs == "data":
        lines = (folders[1] / "chats.jsonl").read_text().replace("they say", "we say")
        (folders[1] / "chats.jsonl").write_text(lines)
    words = ["train", "toy.py", *(shared if differs != "folder" else [])]
    complaint = {
        "settings": "process 1 differs from process 0 (optimizer.steps was 6, is 7): start the same command",
        "data": "process 1 differs from process 0 (data.eval was ",
        "folder": "run: process 1 does not see what process 0 writes there",
    }[differs]
    for code, errors in ends(start_several(folders, *words, devices=1)):
        assert code == cli.EXIT_FAILED and complaint in errors, errors


@pytest.mark.slow
def test_a_process_that_nobody_joins_gives_up(tmp_path: Path):
    place = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--join-timeout", "5", "--process")
    for process in "01":
        [(code, errors)] = ends([start(tmp_path, "train", "eagle2", *place, process)])
        assert code == cli.EXIT_PREEMPTED
        assert f"process {process} of 2 waited 5 s at 127.0.0.1:" in errors and "not all were there" in errors
