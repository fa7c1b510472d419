"""`jaxspec quickstart` from start to end, with little of everything."""

import importlib
import json
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest

from jaxspec.__main__ import main
from jaxspec.data.conversations import read_conversations
from jaxspec.decoding.requests import Settings
from jaxspec.decoding.rounds import Weights
from jaxspec.parallel.mesh import make_mesh
from jaxspec.serving import loading
from jaxspec.serving.loading import Models

quickstart: Any = importlib.import_module("jaxspec.infer.quickstart")
LITTLE = ["--conversations", "30", "--held-out", "3", "--steps", "3", "--max-new-tokens", "24"]


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything measured once, on few questions; training on one device and evaluated by one step, to compile less."""
    monkeypatch.setattr(quickstart, "TINY", quickstart.TINY._replace(tuning=2, passes=1))
    monkeypatch.setattr("jaxspec.training.distill.EVAL_STEPS", 1)
    monkeypatch.setattr("jaxspec.training.resolve.make_mesh", lambda *_, **__: make_mesh(1, devices=jax.devices()[:1]))


@pytest.mark.usefixtures("little")
def test_the_main_job_reports_its_keys_and_leaves_a_drafter_that_generate_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    flags = [*LITTLE, "--trees", "chain:1", "chain:2", "--folder", "quick", "--json", "found.json"]
    assert main(["quickstart", *flags]) == 0
    shown = capfd.readouterr().out
    assert "[plain]" in shown and "[speculative]" in shown and "speed-up" in shown
    found = json.loads(Path("found.json").read_text())
    assert found["tree"] in found["tree_tokens_per_second"].keys() == {"chain:1", "chain:2"}
    assert found["identical_fraction"] == 1 or all(d["margin"] < 1e-4 for d in found["near_ties"])
    assert 1 <= found["tau"] <= 3 and found["held_out_prompts"] == 3
    assert found["speedup"] == pytest.approx(found["tokens_per_second_speculative"] / found["tokens_per_second_plain"])
    words = ["generate", "Give the area of Portugal.", "--drafter", found["drafter_checkpoint"]]
    assert main([*words, "--max-new-tokens", "8"]) == 0


def test_a_speed_up_below_1_is_explained():
    found = {"speedup": 0.4, "tau": 1.2, "conversations": 30, "tree": "chain:1"}
    usual = quickstart.TINY
    short = quickstart.slow_hint(found, usual._replace(steps=3), usual)
    assert "at a tau of 1.20" in short and "3 steps from 30 conversations only: take the usual --steps 400" in short
    assert "a larger --target gains more" in quickstart.slow_hint(found, usual, usual)
    assert quickstart.slow_hint({**found, "speedup": 1.0}, usual._replace(steps=3), usual) == ""
    nothing = quickstart.slow_hint({**found, "tree": "none"}, usual, usual)
    assert "nothing is drafted" in nothing and "cost more" not in nothing


def test_sizes_follow_the_target_unless_they_are_given():
    small, large = (
        Models(cast(Any, None), Weights({"w": np.zeros(n, bool)}), cast(Any, None), cast(Any, None))
        for n in (9, 3 * 10**7)
    )
    args = quickstart.Args(steps=7)
    assert args.sizes(small) == quickstart.TINY._replace(steps=7)
    assert args.sizes(large) == quickstart.LARGER._replace(steps=7)
    homes = [quickstart.Args(target=t).home for t in ("tiny", "smollm2", "models/Llama-3")]
    assert [str(h) for h in homes] == ["runs/quickstart", "runs/quickstart_smollm2", "runs/quickstart_Llama-3"]


def test_a_stopped_run_keeps_its_questions_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    models, args = loading.load_models("tiny"), quickstart.Args(folder=tmp_path, max_new_tokens=8)

    def questions(count: int) -> list[str]:
        return quickstart.write_questions(models, "questions", count, Settings(24, 1.0), args)

    whole = questions(40)
    written = (tmp_path / "questions.jsonl").read_text().splitlines()
    (tmp_path / "questions.jsonl").write_text("\n".join(written[:9]) + "\n" + written[9][:5])
    state = tmp_path / "questions.jsonl.state"
    state.write_text(state.read_text().splitlines()[0] + "\n")
    assert questions(40) == whole
    answers = quickstart.write_answers(models, whole[:12], args)
    assert {c.id for c in answers} <= {c.id for c in read_conversations(str(tmp_path / "answers.jsonl"))}
    monkeypatch.setattr(quickstart, "rewrite", None)  # nothing is answered twice
    monkeypatch.setattr(quickstart, "write_user_turns", None)
    assert questions(40) == whole and quickstart.write_answers(models, whole[:12], args) == answers


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [(["--steps", "0"], "--steps is 0; it must be at least 1"), (["--trees", "bush:3"], "tree 'bush:3' is not one of")],
)
def test_wrong_flags_are_wrong_usage(flags: list[str], sentence: str, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["quickstart", *flags])
    assert stop.value.code == 2
    assert sentence in " ".join(capfd.readouterr().err.split())


def test_a_run_that_was_made_with_something_else_is_replaced_and_another_goes_on(tmp_path: Path):
    run = tmp_path / "run"
    for made_with, there in (("a", True), ("a", True), ("b", False), ("b", True)):
        run.mkdir(exist_ok=True)
        quickstart.begin_anew(run, [made_with])
        assert run.exists() == there
