"""Tests of `jaxspec generate` on a random tiny target: what it prints, what it writes, and how it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from random_models import POSITIONS, write_drafter, write_target

from jaxspec.__main__ import main
from jaxspec.console.cli import EXIT_INTERRUPTED
from jaxspec.data.draft_vocab import save_maps
from jaxspec.decoding.generation import run_rounds
from jaxspec.decoding.requests import Settings
from jaxspec.serving import loading, queue

PROMPTS = ["how much is 2 and 3?", "what does everybody know", "say it again, " * 3, "1", "and 12 and 14 make?"]


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def drafter(tmp_path_factory) -> Path:
    return write_drafter(tmp_path_factory.mktemp("drafter") / "head")


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"id": f"p{i}", "prompt": p}) for i, p in enumerate(PROMPTS)))
    return path


def generate(tmp_path: Path, *flags: object, code: int = 0) -> dict:
    """The JSON of a run."""
    path = tmp_path / "out.json"
    assert main(["generate", *map(str, flags), "--max-new-tokens", "24", "--json", str(path)]) == code
    return json.loads(path.read_text())


def test_one_prompt_is_streamed_and_the_pieces_are_the_text(tmp_path, target, drafter, capsys):
    result = generate(tmp_path, PROMPTS[0], "--target", target, "--drafter", drafter)
    assert capsys.readouterr().out.startswith(result["rows"][0]["text"] + "\n")
    assert result["rows"][0]["text"]


def compiled_rounds() -> int:
    """The programs of rounds so far."""
    return cast(Any, run_rounds)._cache_size()


def test_a_streamed_answer_compiles_its_rounds_once_and_before_the_clock(tmp_path, target, drafter, monkeypatch):
    before, warmed, warm_up = compiled_rounds(), [], queue.warm_up

    def counting(*args):
        warm_up(*args)
        warmed.append(compiled_rounds())

    monkeypatch.setattr(queue, "warm_up", counting)
    generate(tmp_path, PROMPTS[0], "--target", target, "--drafter", drafter, "--tree", "chain:1")
    assert compiled_rounds() == warmed[0] <= before + 1


@pytest.mark.parametrize("sampling", [(), ("--temperature", "1.0", "--top-p", "0.9", "--top-k", "50", "--seed", "3")])
def test_a_drafter_changes_the_speed_and_not_the_tokens(tmp_path, target, drafter, prompts, sampling):
    common = ("--target", target, "--prompts", prompts, "--slots", "4", *sampling)
    plain = generate(tmp_path, *common)
    drafted = generate(tmp_path, *common, "--drafter", drafter, "--tree", "dynamic:6x2x3")
    assert [r["token_ids"] for r in drafted["rows"]] == [r["token_ids"] for r in plain["rows"]]
    assert plain["tau"] == 1.0 <= drafted["tau"]


def test_a_draft_vocabulary_travels_with_its_drafter_and_must_be_the_targets(tmp_path, target, capsys):
    head = write_drafter(tmp_path / "pruned", draft_vocab=range(4, 200, 2))
    vocab = loading.load_models(str(target), drafter=head).weights.vocab
    assert vocab is not None and vocab.head_UD.shape == (98, 32)
    plain = generate(tmp_path, PROMPTS[0], "--target", target)
    drafted = generate(tmp_path, PROMPTS[0], "--target", target, "--drafter", head)
    assert drafted["rows"][0]["token_ids"] == plain["rows"][0]["token_ids"]
    foreign = write_drafter(tmp_path / "foreign", draft_vocab=(5, 300))
    assert main(["generate", "hi", "--target", str(target), "--drafter", str(foreign)]) == 1
    assert "draft vocabulary is not part of the target's 300 tokens" in capsys.readouterr().err


def test_rows_come_in_input_order_and_do_not_depend_on_the_batch(tmp_path, target, prompts):
    rows = [generate(tmp_path, "--target", target, "--prompts", prompts, "--slots", b)["rows"] for b in (4, 2)]
    assert [r["id"] for r in rows[0]] == [f"p{i}" for i in range(len(PROMPTS))]
    assert [r["text"] for r in rows[0]] == [r["text"] for r in rows[1]]


def test_json_holds_the_agreed_keys(tmp_path, target, drafter):
    result = generate(tmp_path, PROMPTS[0], "--target", target, "--drafter", drafter)
    assert {"command", "version", "git_sha", "machine", "dtype", "wall_seconds", "seed"} <= result.keys()
    assert {"id", "text", "tokens", "finish_reason", "tau", "target_calls"} <= result["rows"][0].keys()
    row = result["rows"][0]
    assert result["tree"] == "dynamic:8x3x3"
    assert result["tokens_per_second"] > 0
    assert result["tau"] == row["tau"] == pytest.approx((row["tokens"] - 1) / row["target_calls"])
    assert sum(result["accept_histogram"]) == row["target_calls"]


def test_a_bad_prompt_is_named_and_the_others_are_answered(tmp_path, target, capsys):
    path = tmp_path / "mixed.jsonl"
    lines = [{"id": "long", "prompt": "all of it " * POSITIONS}, {"id": "none", "prompt": " "}, {"prompt": "1 and 2"}]
    no_question = {"messages": [{"role": "assistant", "content": "x"}]}
    path.write_text("\n".join([*map(json.dumps, lines), '{"prompt": 3', json.dumps(no_question)]))
    result = generate(tmp_path, "--target", target, "--prompts", path, code=1)
    shown = capsys.readouterr().err
    assert f"{path}:1: prompt 'long' has" in shown and f"the target has {POSITIONS} positions" in shown
    assert f"{path}:2: prompt 'none' is empty" in shown and f"{path}:5: prompt '5' has no user turn" in shown
    assert f"{path}:4: prompt '4' is not JSON: Expecting ',' delimiter at column 13" in shown
    assert [bool(r["error"]) for r in result["rows"]] == [True, True, False, True, True]
    assert result["rows"][2]["tokens"] > 0 and result["failed"] == 4


def test_a_prompt_whose_id_another_has_and_one_of_other_bytes_are_named_by_their_lines(tmp_path, target, capsys):
    path = tmp_path / "mixed.jsonl"
    lines = [{"id": "a", "prompt": "1 and 2"}, {"id": "a", "prompt": "3"}, {"id": None, "prompt": "4"}, {"prompt": "5"}]
    path.write_bytes(b'{"prompt": "caf\xe9"}\r\n' + "\n".join(map(json.dumps, lines)).encode())
    result = generate(tmp_path, "--target", target, "--prompts", path, code=1)
    shown = capsys.readouterr().err
    assert f"{path}:1: prompt '1' is not UTF-8 text (invalid continuation byte at byte 16)" in shown
    assert f"{path}:3: prompt 'a' has the id of {path}:2: give each its own" in shown
    assert [bool(r["error"]) for r in result["rows"]] == [True, False, True, False, False]


DROPPED = {
    "tools": ({"tools": [{"name": "f", "parameters": {}}]}, "message 0: the chat template drops descriptions of tools"),
    "a system message": (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "1"}]},
        "message 0: the chat template drops a message of role system in first place",
    ),
    "calls and results": (
        {
            "messages": [
                {"role": "user", "content": "1"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "content": "2"},
            ]
        },
        "message 1: the chat template drops tool calls",
    ),
}


@pytest.mark.parametrize("part", DROPPED)
def test_a_prompt_of_which_the_template_drops_a_part_is_not_answered(tmp_path, target, capsys, part):
    template, path = tmp_path / "t.jinja", tmp_path / "p.jsonl"
    template.write_text(
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}{% endif %}{% endfor %}"
    )
    record, sentence = DROPPED[part]
    lines = [
        {"id": "whole", "prompt": "1 and 2"},
        {"id": "lost", "messages": [{"role": "user", "content": "1"}]} | record,
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    result = generate(tmp_path, "--target", target, "--template", template, "--prompts", path, code=1)
    assert (
        f"{path}:2: prompt 'lost' cannot be shown to the target: {sentence} without a word" in capsys.readouterr().err
    )
    assert [r["finish_reason"] == "error" for r in result["rows"]] == [False, True]


def test_tools_are_not_left_out_of_raw_text(tmp_path, target, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "a", "prompt": "1", "tools": [{"name": "f"}]}))
    generate(tmp_path, "--target", target, "--raw", "--prompts", path, code=1)
    assert (
        "prompt 'a' has tools, which raw text does not show: leave out --raw, or the tools" in capsys.readouterr().err
    )


@pytest.mark.parametrize("verb", ["generate", "bench decode"])
def test_prompts_are_read_and_named_before_the_target_is(tmp_path, verb, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "1 and 2", "temperature": -1}\n{"prompt"\n')
    flags = ["--prompts", str(path) if verb == "generate" else str(tmp_path / "none"), "--target", "no/such/target"]
    assert main([*verb.split(), *flags]) == 1
    shown = capsys.readouterr().err.splitlines()
    if verb == "generate":
        assert shown[0].startswith(f"jaxspec generate: {path}:1: prompt '1' temperature is -1; it must be 0")
        assert shown[1:] == [
            f"jaxspec generate: {path}:2: prompt '2' is not JSON: Expecting ':' delimiter at column 10"
        ]
    else:
        assert len(shown) == 1 and f"{tmp_path / 'none'}: no such file" in shown[0]


def test_a_data_set_is_a_prompt_file_and_its_own_answers_are_left_out(tmp_path, target):
    messages = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": "no"}]
    path, plain = tmp_path / "data.jsonl", tmp_path / "plain.txt"
    path.write_text(json.dumps({"id": "a", "messages": messages}))
    plain.write_text(PROMPTS[0] + "\n\n")
    rows = [generate(tmp_path, "--target", target, "--prompts", p)["rows"] for p in (path, plain)]
    assert rows[0][0]["text"] == rows[1][0]["text"]


def test_raw_leaves_the_chat_template_out(tmp_path, target):
    texts = [generate(tmp_path, PROMPTS[0], "--target", target, *f)["rows"][0]["text"] for f in ((), ("--raw",))]
    assert texts[0] != texts[1]


def test_an_answer_ends_at_the_last_position(tmp_path, target):
    path = tmp_path / "out.json"
    prompt = "1 " * 118  # two tokens each, template aside
    flags = ["--target", str(target), "--max-new-tokens", "200", "--temperature", "5", "--json", str(path)]
    assert main(["generate", prompt, *flags]) == 0
    assert json.loads(path.read_text())["rows"][0]["tokens"] <= POSITIONS - 2 * 118


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "give prompts"),
        (["x", "--temperature", "-1"], "temperature is -1.0; it must be 0"),
        (["x", "--top-p", "0"], "top-p is 0.0"),
        (["x", "--max-new-tokens", "0"], "max-new-tokens is 0"),
        (["x", "--tree", "bush:3", "--drafter", "d"], "tree 'bush:3' is not one of"),
        (["x", "--tree", "chain:2"], "--tree needs a --drafter"),
        (["x", "--slots", "0"], "--slots is 0"),
        (["x", "--raw", "--template", "vicuna"], "--raw leaves the chat template out"),
        (["x", "--rule", "block"], "rule block is for children drafted by sample or swor, not topk"),
        (["x", "--rule", "coin"], "coin"),
        (["x", "--draft-mode", "swor"], "--draft-mode needs a --drafter"),
        (["x", "--draft-temperature", "1"], "--draft-temperature is for drawn children"),
        (["x", "--draft-mode", "swor", "--draft-temperature", "-1", "--drafter", "d"], "draft-temperature is -1.0"),
        (["x", "--seed", "-1"], "seed is -1; it must be from 0 to 2^32 - 1"),
        (["x", "--dtype", "fp8"], "fp8"),
    ],
)
def test_wrong_flags_are_wrong_usage(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", *flags])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert sentence in " ".join(shown.split())


def test_missing_or_unfit_models_are_one_sentence(tmp_path, target, capsys):
    other = write_drafter(tmp_path / "other", width=16)
    assert main(["generate", "x", "--target", str(target), "--drafter", str(other)]) == 1
    assert "features of width 16" in capsys.readouterr().err
    assert main(["generate", "x", "--target", str(target), "--drafter", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert main(["generate", "x", "--target", str(tmp_path / "nothing")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_answers_go_to_a_file_and_a_stopped_run_goes_on(tmp_path, target, prompts, monkeypatch, capsys):
    out = tmp_path / "answers.jsonl"
    common = ("--target", target, "--prompts", prompts, "--temperature", "0.8", "--out", out, "--max-new-tokens", "24")
    whole = generate(tmp_path, *common)["rows"]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in whole]
    assert [line["token_ids"] for line in lines] == [row["token_ids"] for row in whole]
    with pytest.raises(SystemExit):
        main(["generate", *map(str, common)])
    assert "exists" in capsys.readouterr().err
    out.unlink()

    real, served = queue.serve, []

    def stopping(*args, **kwargs):
        for done in real(*args, **kwargs):
            if len(served) == 2:
                raise KeyboardInterrupt
            served.append(done.request.key)
            yield done

    monkeypatch.setattr(queue, "serve", stopping)
    assert main(["generate", *map(str, common)]) == EXIT_INTERRUPTED
    monkeypatch.setattr(queue, "serve", real)
    assert not out.exists()
    with open(f"{out}.partial", "a") as torn:
        torn.write('{"index": 1, "tok')
    assert main(["generate", *map(str, common), "--seed", "5"]) == 1
    assert "seed was 0, is 5" in capsys.readouterr().err
    again = generate(tmp_path, *common, "--slots", "1")["rows"]
    assert "2 prompts are done" in capsys.readouterr().err
    assert again == whole and not (tmp_path / "answers.jsonl.partial").exists()


@pytest.mark.parametrize(
    ("mode", "rule", "tree"),
    [
        ("sample", None, "dynamic:6x2x3"), ("swor", None, "dynamic:6x2x3"), ("swor", "traversal", "static:0,1,00,10"),
        ("sample", "block", "chain:3"), ("topk", "traversal", "static:0,1,00,10"), ("topk", "typical", "chain:3"),
    ],
)  # fmt: skip
def test_every_rule_writes_the_targets_greedy_text(tmp_path, target, drafter, prompts, mode, rule, tree):
    """At temperature 0 even typical acceptance is exact, whatever the drafts are drawn at."""
    plain = generate(tmp_path, "--target", target, "--prompts", prompts)
    flags = ["--drafter", drafter, "--tree", tree, "--draft-mode", mode, *(["--rule", rule] if rule else [])]
    flags += [] if mode == "topk" else ["--draft-temperature", "0.7"]
    drafted = generate(tmp_path, "--target", target, "--prompts", prompts, *flags)
    assert [r["token_ids"] for r in drafted["rows"]] == [r["token_ids"] for r in plain["rows"]]
    assert drafted["draft_mode"] == mode and drafted["lossless"] == (rule != "typical")


def test_typical_acceptance_says_that_it_is_lossy(tmp_path, target, drafter, capsys):
    flags = ("--drafter", drafter, "--tree", "chain:2", "--rule", "typical", "--temperature", "1")
    assert generate(tmp_path, PROMPTS[0], "--target", target, *flags)["lossless"] is False
    assert "LOSSY" in capsys.readouterr().out


def test_a_draft_vocabulary_from_a_file_changes_no_token(tmp_path, target, drafter, prompts):
    maps = tmp_path / "v.safetensors"
    save_maps(maps, np.arange(4, 200, 2), 300)
    common = ("--target", target, "--prompts", prompts, "--temperature", "0.6")
    plain = generate(tmp_path, *common)
    for flags in ((), ("--draft-mode", "swor"), ("--draft-mode", "sample")):
        drafted = generate(tmp_path, *common, "--drafter", drafter, "--draft-vocab", maps, *flags)
        assert drafted["tau"] >= 1
        if not flags:
            assert [r["token_ids"] for r in drafted["rows"]] == [r["token_ids"] for r in plain["rows"]]


def test_a_line_may_say_how_it_is_to_be_answered(tmp_path, target, drafter, capsys):
    """Each row's answer is the one it gets from flags that say the same."""
    own = [{"temperature": 0.9, "seed": 7}, {"max_new_tokens": 3}, {"temperature": 0.5, "top_k": 4, "top_p": 0.8}, {}]
    wrong = [{"temperature": -1}, {"top_p": "0.9"}, {"stop_ids": [-2]}, {"seed": -1}, {"max_new_tokens": True}]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps({"id": f"o{i}", "prompt": "1 and 2", **s}) for i, s in enumerate(own + wrong)))
    flags = ("--target", target, "--prompts", path, "--drafter", drafter, "--slots", "3")
    rows = generate(tmp_path, *flags, code=1)["rows"]
    shown = capsys.readouterr().err
    for sentence in (
        "'o4' temperature is -1; it must be 0", "'o5' is malformed: top_p is '0.9'", "'o6' is malformed: stop_ids",
        "'o7' seed is -1; it must be from 0 to 2^32 - 1", "'o8' is malformed: max_new_tokens is True",
    ):  # fmt: skip
        assert sentence in shown, shown
    assert [bool(r["error"]) for r in rows] == [False] * 4 + [True] * 5 and rows[1]["tokens"] <= 3
    assert rows[1]["token_ids"] == rows[3]["token_ids"][: rows[1]["tokens"]]
    first = next(i for i, t in enumerate(rows[3]["token_ids"]) if t == rows[3]["token_ids"][2])
    path.write_text(json.dumps({"prompt": "1 and 2", "stop_ids": [rows[3]["token_ids"][2]]}))
    stopped = generate(tmp_path, *flags)["rows"][0]
    assert stopped["token_ids"] == rows[3]["token_ids"][: first + 1] and stopped["finish_reason"] == "stop"


def test_a_request_is_cut_at_the_last_position_and_ends_at_the_models_stop_ids(target):
    models = loading.load_models(str(target))
    prompt = np.arange(POSITIONS - 5)
    request = models.request(prompt, Settings(24, 0.5, seed=3, stop_ids=(7, *models.stop_ids)), "mine")
    assert request.settings == Settings(5, 0.5, seed=3, stop_ids=(*models.stop_ids, 7)) and request.key == "mine"
    assert models.request(prompt[:9], Settings(24)).settings.max_new_tokens == 24
    for tokens, complaint in (
        (prompt[:0], "is empty"),
        (np.array([1, 300]), "has a token outside the target's vocabulary of 300"),
        (np.array([1, -1]), "has a token outside the target's vocabulary of 300"),
        (np.ones(POSITIONS, int), f"has {POSITIONS} tokens, and the target has {POSITIONS} positions"),
    ):
        with pytest.raises(ValueError, match=f"^{complaint}"):
            models.request(tokens, Settings())


def test_a_row_of_a_run_has_a_seed_of_its_own_and_all_else_of_the_run():
    run = Settings(9, 0.5, top_k=3, seed=5)
    rows = [run.for_row(i) for i in range(50)]
    assert len({row.seed for row in rows}) == 50 and run.for_row(3) == rows[3]
    assert {dataclasses.replace(row, seed=5) for row in rows} == {run}
    assert dataclasses.replace(run, seed=6).for_row(3).seed != rows[3].seed
