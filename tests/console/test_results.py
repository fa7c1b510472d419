"""Tests of what programs show and leave behind."""

import json
import math
import subprocess
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import __version__
from jaxspec.console import progress, results, tables


def read_strictly(path: Path):
    """Returns the JSON in `path`, refusing NaN and Infinity, which are not JSON."""

    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_machine_facts_of_a_machine_without_accelerator():
    facts = results.machine_facts()
    assert facts["accelerator"] is None and facts["accelerator_count"] == 0
    assert facts["cpu"] and facts["cores"] >= 1 and facts["jax"]


def test_result_has_the_common_keys_and_its_own():
    found = results.result("train", dtype=jnp.bfloat16, seed=3, started=time.monotonic() - 2.0, steps=10)
    common = {"command", "version", "git_sha", "machine", "dtype", "wall_seconds", "seed"}
    assert set(found) == common | {"steps"}
    assert (found["command"], found["version"], found["dtype"], found["seed"]) == ("train", __version__, "bfloat16", 3)
    assert 2.0 <= found["wall_seconds"] < 60.0


def test_git_sha_is_that_of_the_checkout_or_none(monkeypatch, tmp_path):
    root = Path(results.__file__).parents[2]
    told = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert results.git_sha() == (told.stdout.strip() if told.returncode == 0 else None)
    monkeypatch.setattr(results, "__file__", str(tmp_path / "site-packages" / "jaxspec" / "console" / "results.py"))
    assert results.git_sha() is None


def test_json_holds_arrays_and_scalars_and_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "runs" / "a" / "result.json"
    results.write_json(
        path,
        {
            "tau": jnp.float32(2.5),
            "half": jnp.bfloat16(0.5),
            "steps": np.int64(7),
            "done": np.bool_(True),
            "losses": np.array([1.0, np.nan, np.inf]),
            "halves": jnp.ones(2, jnp.bfloat16),
            "counts": jnp.arange(3),
            "nan": math.nan,
            "name": "déjà",
            "path": Path("a/b"),
            "rows": ({"none": None, 4: 1.5},),
        },
    )
    assert read_strictly(path) == {
        "tau": 2.5,
        "half": 0.5,
        "steps": 7,
        "done": True,
        "losses": [1.0, None, None],
        "halves": [1.0, 1.0],
        "counts": [0, 1, 2],
        "nan": None,
        "name": "déjà",
        "path": "a/b",
        "rows": [{"none": None, "4": 1.5}],
    }


def test_json_replaces_the_file_at_once_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(TypeError, match="cannot hold a set"):
        results.write_json(path, {"bad": {1}})
    assert path.read_text() == "old"
    results.write_json(path, {"steps": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_json_to_an_impossible_place_fails_with_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^cannot write the result to .*result\.json: \S[^\n]*$"):
        results.write_json(tmp_path / "file" / "result.json", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"^cannot write the result to"):
        results.write_json(tmp_path / "folder", {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


def test_table_shows_its_title_and_cells_as_they_are(capsys):
    rows = [["EAGLE [static]", 3.14159, 1234567, None], ["x" * 200, np.float32(2.0), 8, math.nan]]
    tables.print_table("Decoding", ["arm", "tau", "tokens", "peer"], rows)
    shown = capsys.readouterr().out
    assert "Decoding" in shown and "EAGLE [static]" in shown and "x" * 200 in shown
    assert "3.142" in shown and "1,234,567" in shown and "nan" not in shown


def test_progress_without_a_terminal_is_a_plain_line_now_and_then(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 5))  # every look at the clock is five seconds later
    monkeypatch.setattr(results.time, "monotonic", lambda: float(next(clock)))
    with progress.progress("train", total=12, unit="steps") as line:
        for step in range(12):
            line.advance(status=f"loss {step}")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\x1b" not in err and "\r" not in err
    assert lines[0] == "train: 0/12 steps"
    assert lines[-1].startswith("train: 12/12 steps, ") and lines[-1].endswith("loss 11")
    assert 3 <= len(lines) < 12 and all("s left" in line for line in lines[1:-1])


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    with progress.progress("train", total=2, unit="steps") as line:
        line.advance(2, status="loss [2.31]")
    shown = capsys.readouterr().err
    assert "2/2" in shown and "loss [2.31]" in shown and "steps/s" in shown
