"""The verb `lab profile`: its profiles replay to what decoding does, and it goes on where it was stopped."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import write_drafter, write_target
from slow_replay import replay_paths

from jaxspec.console.cli import run
from jaxspec.data.prompts import encode_prompt, read_prompts
from jaxspec.decoding.requests import Settings
from jaxspec.lab import making
from jaxspec.lab.profile import Profile, load_profile
from jaxspec.lab.replay import replay
from jaxspec.serving import queue
from jaxspec.serving.loading import load_models
from jaxspec.trees import parse_tree

lab_profile: Any = importlib.import_module("jaxspec.infer.lab_profile")
TREE = "static:0,1,00,01,10,000"
PROMPTS = ("3 and 4 make 7, they say", "what do 5 and 6 make?", "8 and 9", "1 and 1 make 2, or so it seems")


class Place:
    """A target, a drafter and prompts in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = write_target(folder / "target")
        self.drafter = write_drafter(folder / "drafter")
        self.prompts = folder / "prompts.jsonl"
        lines = [{"id": str(i), "prompt": p, "source": "ab"[i % 2]} for i, p in enumerate(PROMPTS)]
        self.prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(self, *more: str, out: str = "out", prompts: bool = True) -> dict[str, Any]:
        """Returns the verb's JSON."""
        given = ("--prompts", str(self.prompts)) if prompts else ()
        common = ("--target", str(self.target), "--drafter", str(self.drafter), *given, "--out", self.at(out))
        sizes = ("--depth", "3", "--ranks", "4", "--max-new-tokens", "24", "--json", self.at("result.json"))
        assert lab_profile.main([*common, *sizes, *more]) == 0
        return json.loads(Path(self.at("result.json")).read_text())

    def at(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def result(place: Place) -> dict[str, Any]:
    return place.run("--temperature", "0", "1")


def decode(place: Place, temperature: float) -> list[int]:
    """Target calls of every prompt, decoded with the tree."""
    models = load_models(str(place.target), drafter=str(place.drafter), tree=TREE)
    settings = Settings(24, temperature, seed=0)
    requests = [
        models.request(encode_prompt(p, models.tokenizer), settings.for_row(i), i)
        for i, p in enumerate(read_prompts(place.prompts))
    ]
    found = {one.request.key: one.answer.calls for one in queue.serve(models, requests, slots=4)}
    return [found[i] for i in range(len(requests))]


@pytest.mark.parametrize("row", [0, 1])
def test_the_profile_replays_to_the_calls_of_decoding(place: Place, result: dict[str, Any], row: int):
    profile = load_profile(Path(result["rows"][row]["profile"]))
    tree: Any = parse_tree(TREE)
    calls = replay_paths(profile, tree.paths).calls_P
    assert calls.tolist() == decode(place, float(row))


def test_the_result_has_its_keys(result: dict[str, Any]):
    first = result["rows"][0]
    assert {name: result[name] for name in first} == first
    assert (result["command"], result["temperature"], result["mode"]) == ("lab profile", 0, "topk")
    assert (result["rule"], result["prompts"]) == ("target-draw", 4)
    assert [len(row) for row in result["acceptance"]] == [4, 4, 4]
    for name in ("ece_before", "ece_after"):
        assert 0 <= result[name] <= 1
    assert set(result["sources"]) == {"all", "a", "b"}
    profile = load_profile(Path(result["profile"]))
    assert len(profile.prompt_T) == result["starts"] and profile.ranks == 4
    assert set(profile.facts["hashes"]) == {"target", "drafter", "tokenizer", "template", "prompts"}


def test_texts_are_not_decoded_again(place: Place, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("decoded again")

    monkeypatch.setattr("jaxspec.serving.queue.serve", refuse)
    assert place.run("--temperature", "1")["acceptance"] == result["rows"][1]["acceptance"]


def test_finished_batches_are_not_made_again_and_damaged_ones_are(
    place: Place, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    kept = []
    monkeypatch.setattr(making, "forget", kept.append)
    place.run("--temperature", "0")
    parts = sorted((kept[0] / "ranks").iterdir())
    made, ranked = [], making.rank_texts
    monkeypatch.setattr(making, "rank_texts", lambda *a, **k: made.append(1) or ranked(*a, **k))
    place.run("--temperature", "0")
    assert parts and not made
    parts[0].write_bytes(b"PK damaged")
    again = place.run("--temperature", "0")
    assert len(made) == 1 and again["acceptance"] == result["acceptance"]


def test_rules_that_toss_coins_get_rates_alone(place: Place):
    found = place.run("--temperature", "1", "--draft-mode", "swor", out="logged")
    assert (found["rule"], found["mode"], found["kind"], found["starts"]) == ("recursive-rejection", "swor", "rates", 0)
    profile = load_profile(Path(found["profile"]))
    assert not profile.replayable and len(profile.facts["tries_DK"]) == 3
    assert profile.counts is not None and profile.counts.hits_PDK.shape == (4, 3, 4)
    assert set(found["sources"]) == {"all", "a", "b"}
    with pytest.raises(ValueError, match="trees cannot be replayed on it"):
        replay(profile, ((0,),))


def test_greedy_decoding_is_the_same_by_every_rule(place: Place, result: dict[str, Any], capsys: Any):
    found = place.run("--draft-mode", "swor")
    assert found["acceptance"] == result["acceptance"] and found["rule"] == "target-draw"
    assert "keep the same when greedy" in capsys.readouterr().err


def test_answers_of_a_file_are_profiled_as_they_stand(place: Place, result: dict[str, Any]):
    """With their tokens stored, the texts are those that the verb decodes itself."""
    models = load_models(str(place.target))
    texts = [
        json.loads(line) for line in (place.folder / "out.work" / "texts.jsonl").read_text().split("\n")[1:] if line
    ]
    answers = {note["prompt"]: note["answer"] for note in texts if note["of"] == [0.0]}
    lines = []
    for i, prompt in enumerate(read_prompts(place.prompts)):
        ids = encode_prompt(prompt, models.tokenizer).tolist()
        mask = [False] * len(ids) + [True] * len(answers[i])
        lines.append({"input_ids": ids + answers[i], "loss_mask": [int(m) for m in mask], "source": "ab"[i % 2]})
    path = place.folder / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = place.run("--answers", str(path), out="read.npz", prompts=False)
    assert found["acceptance"] == result["acceptance"] and found["profile"] == place.at("read.npz")


def refusal(place: Place, capsys: Any, *words: str) -> str:
    """The sentence with which the verb fails."""
    given = ["--target", str(place.target), "--out", place.at("none"), *words]
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(run(lab_profile.main, given, prog="jaxspec lab profile"))
    told = capsys.readouterr().err.strip()
    assert ended.value.code in (1, 2)
    return told.split("\n")[-1]


def test_bad_input_is_refused_in_a_sentence(place: Place, capsys: Any, tmp_path: Path):
    drafter, prompts = ("--drafter", str(place.drafter)), ("--prompts", str(place.prompts))
    other = write_drafter(tmp_path / "other", width=48)
    greedy = tmp_path / "greedy.jsonl"
    talk = [{"role": "user", "content": "1 and 1"}, {"role": "assistant", "content": "make 3, which is odd, they say"}]
    greedy.write_text(json.dumps({"messages": talk, "temperature": 0.7}) + "\n")
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"messages": talk[:1]}) + "\n")
    for words, told in (
        (prompts, "give one --drafter or several"),
        (drafter, "give either --prompts"),
        ((*drafter, *prompts, "--rule", "typical"), "--rule typical changes the text's distribution"),
        ((*drafter, *prompts, "--rule", "specinfer"), "take the draft mode sample"),
        ((*drafter, *prompts, "--ranks", "999"), f"{place.drafter}: the drafter scores 300 tokens, fewer than 999"),
        (("--drafter", str(other), *prompts), "made for another target"),
        ((*drafter, "--answers", str(greedy)), "holds no answer of temperature 0, but of 0.7"),
        (
            (*drafter, "--answers", str(greedy), "--temperature", "0.7", "--draft-mode", "sample"),
            "give --prompts instead",
        ),
        ((*drafter, "--answers", str(asked)), "no answer of two tokens or more"),
        ((*drafter, "--prompts", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        ((*drafter, *prompts, "--temperature", "0", "1", "--out", "x.npz"), "is one file, and there are several"),
        (("--simulate", "0.5,0.6"), "sum to 1 at most"),
        (("--simulate", "0.5", *prompts), "leave out --prompts"),
    ):
        assert told in refusal(place, capsys, *words)


def test_an_answer_of_another_target_is_refused(place: Place, capsys: Any, tmp_path: Path):
    strange = tmp_path / "strange.jsonl"
    talk = [{"role": "user", "content": "1 and 1"}, {"role": "assistant", "content": "make 3, which is odd, they say"}]
    strange.write_text(json.dumps({"messages": talk}) + "\n")
    told = refusal(place, capsys, "--drafter", str(place.drafter), "--answers", str(strange))
    assert "are what the target writes at temperature 0: give the target that wrote them" in told


def test_a_simulated_profile(tmp_path: Path):
    out = tmp_path / "s.npz"
    assert lab_profile.main(["--simulate", "0.7,0.1;0.6", "--out", str(out), "--simulated-prompts", "7"]) == 0
    profile: Profile = load_profile(out)
    assert len(profile.sources) == 7 and np.asarray(profile.facts["simulated_rates"]).shape == (2, 2)


def test_labels_tell_drafters_apart():
    assert lab_profile.labels_of(["a/one/drafter", "b/two/drafter"]) == ["one-drafter", "two-drafter"]
    assert lab_profile.labels_of(["/x/eagle", "medusa"]) == ["eagle", "medusa"]
