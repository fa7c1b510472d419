"""`jaxspec runs`: what is listed of runs in every state."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from jaxspec.__main__ import main
from jaxspec.checkpoints.tracking import session, track


def leave_run(folder: Path, name: str, kind: str, metrics: dict[int, dict[str, Any]], end: str) -> None:
    """A run's folder as training leaves it."""
    facts, begun = {"name": name, "kind": kind, "steps": 9, "config": {}}, ""
    with contextlib.suppress(KeyboardInterrupt), session(folder, facts), track(folder) as log:
        for step, found in metrics.items():
            log.write(step, **found)
        begun = (folder / "run.json").read_text()
        if end == "stopped":
            raise KeyboardInterrupt
    if end == "killed":
        (folder / "run.json").write_text(begun)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    out = tmp_path / "runs" / "compare"
    metrics: dict[int, dict[str, Any]] = {
        4: {"loss": 2.0, "eval": {"simulated_tau": 3.25}},
        8: {"loss": 1.5, "eval": {"simulated_tau": 3.0}},
    }
    leave_run(out / "hass" / "seed-1" / "run", "hass, seed 1", "train", metrics, "finished")
    leave_run(tmp_path / "runs" / "tiny", "tiny", "pretrain", {5: {"loss": 4.0}}, "stopped")
    leave_run(tmp_path / "runs" / "killed", "killed", "train", {}, "killed")
    rows = [
        {"recipe": "hass", "seed": seed, "source": source, "tau": tau}
        for seed, source, tau in [
            (1, "all", 2.5),
            (1, "all", 2.75),
            (1, "maths", 9.0),
            (2, "all", 8.0),
            (1, "all", None),
        ]
    ]
    (out / "compare.json").write_text(json.dumps({"rows": rows}))
    leave_run(tmp_path / "runs" / "zeroed", "zeroed", "train", {5: {"loss": 4.0}}, "finished")
    with (tmp_path / "runs" / "zeroed" / "metrics.jsonl").open("ab") as file:
        file.write(bytes(9) + b"\n")
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / "run.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_are_listed_with_their_progress_tau_and_state(runs: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["runs", "--json", "list.json"]) == 0
    rows = {row["name"]: row for row in json.loads((runs / "list.json").read_text())["runs"]}
    assert rows.keys() == {"hass, seed 1", "tiny", "killed", "torn", "zeroed"}
    hass = rows["hass, seed 1"]
    assert {k: hass[k] for k in ("kind", "step", "steps", "loss", "simulated_tau", "tau", "state")} == {
        "kind": "train", "step": 8, "steps": 9, "loss": 1.5, "simulated_tau": 3.25, "tau": 2.75, "state": "finished"
    }  # fmt: skip
    assert (rows["tiny"]["simulated_tau"], rows["tiny"]["tau"]) == (None, None)
    states = {"tiny": "stopped", "killed": "killed", "torn": "damaged record", "zeroed": "damaged metrics"}
    assert {name: rows[name]["state"] for name in states} == states
    shown = capsys.readouterr().out
    assert "5 runs below runs" in shown and "3.25" in shown and "compare/hass/seed-1/run" in shown


def test_a_folder_that_is_not_there_is_named(runs: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["runs", "elsewhere"]) == 1
    assert "elsewhere: no such folder" in capsys.readouterr().err
