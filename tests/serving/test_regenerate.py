"""Tests of `jaxspec regenerate`: whose words it keeps, and that kills, shards and batches leave no trace."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from random_models import write_target

from jaxspec.__main__ import main
from jaxspec.data.conversations import read_conversations
from jaxspec.decoding.requests import Settings
from jaxspec.serving import loading
from jaxspec.serving.dialogue import check_results, steps_of
from jaxspec.serving.queue import Queue, answer_batches
from jaxspec.serving.regeneration import parse_temperatures, user_header, write_user_turns

QUESTIONS = ("how much is 2 and 3?", "what does everybody know", "1", "and 12 and 14 make?", "say so again", "why")
MIXTURE = ("--temperatures", "0,0.7:1,1.5:2", "--seed", "5")


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Twelve conversations of two sources, every third of two turns."""
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    lines = []
    for i in range(12):
        messages = [message("system", "be brief"), message("user", f"{i}: {QUESTIONS[i % 6]}")]
        messages += [message("assistant", "NO")]
        if i % 3 == 0:
            messages += [message("user", "and then?"), message("assistant", "NO")]
        lines.append({"id": f"c{i}", "source": "ab"[i % 2], "messages": messages})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def regenerate(out: Path, target: Path, *flags: object, code: int = 0) -> dict:
    """The JSON of a run into `out`."""
    path = out.with_suffix(".result")
    common = ["--out", str(out), "--target", str(target), "--max-new-tokens", "40", "--json", str(path)]
    assert main(["regenerate", *common, *map(str, flags)]) == code
    return json.loads(path.read_text())


def lines_of(path: Path) -> list[str]:
    return sorted(path.read_text().split("\n")[:-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, target, prompts) -> Path:
    """The file that one run writes, unfinished answers included."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    regenerate(out, target, "--prompts", prompts, "--batch", "4", "--keep-unfinished")
    return out


def test_user_turns_are_kept_and_answers_are_the_targets(whole, prompts):
    given = {c.id: c for c in read_conversations(prompts)}
    written = read_conversations(whole)
    finish = {r["id"]: r["finish"] for r in map(json.loads, lines_of(whole))}
    assert sorted(given) == sorted(c.id for c in written)
    for c in written:
        others = [m for m in c.messages if m["role"] != "assistant"]
        assert others == [m for m in given[c.id].messages if m["role"] != "assistant"][: len(others)]
        assert all(m["content"] != "NO" for m in c.messages)
        if finish[c.id] == "stop":
            assert [m["role"] for m in c.messages] == [m["role"] for m in given[c.id].messages]
    assert "stop" in finish.values()


def test_a_second_answer_reads_the_first(whole, target):
    models = loading.load_models(str(target))
    two = next(c for c in read_conversations(whole) if sum(m["role"] == "assistant" for m in c.messages) == 2)
    tokens = models.tokenizer.encode_prompt(two.messages[:-1])
    queue = Queue([models.request(tokens, Settings(max_new_tokens=40))], batch=4)
    (((_, answer, *_),),) = answer_batches(models, queue, max_new_tokens=40)
    assert models.tokenizer.decode(answer.tokens) == two.messages[-1]["content"]


def test_the_batch_leaves_no_trace(tmp_path, target, prompts, whole):
    out = tmp_path / "out.jsonl"
    regenerate(out, target, "--prompts", prompts, "--batch", "3", "--keep-unfinished")
    assert lines_of(out) == lines_of(whole)


@pytest.mark.parametrize("sampling", [(), ("--temperature", "1", "--seed", "5"), MIXTURE])
def test_shards_together_are_the_whole(tmp_path, target, prompts, whole, sampling):
    flags = ("--prompts", prompts, "--batch", "4", "--keep-unfinished", *sampling)
    if sampling:
        whole = tmp_path / "whole.jsonl"
        regenerate(whole, target, *flags)
    parts = [tmp_path / f"part{i}.jsonl" for i in range(2)]
    for i, part in enumerate(parts):
        regenerate(part, target, *flags, "--shard", f"{i}/2")
    assert sorted(lines_of(parts[0]) + lines_of(parts[1])) == lines_of(whole)


def test_a_killed_run_goes_on_and_a_torn_line_is_dropped(tmp_path, target, prompts, whole, capsys):
    out = tmp_path / "out.jsonl"
    flags = ("--prompts", prompts, "--batch", "4", "--keep-unfinished")
    regenerate(out, target, *flags, "--limit", "5")
    torn = out.read_bytes()[:-20]
    out.write_bytes(torn)
    result = regenerate(out, target, *flags)
    assert result["resumed_from"] == 4
    assert lines_of(out) == lines_of(whole)
    assert "4 conversations are done, 8 are left" in capsys.readouterr().err
    assert regenerate(out, target, *flags)["tokens"] == 0
    assert lines_of(out) == lines_of(whole)
    assert capsys.readouterr().err.startswith(f"{out}: all 12 conversations are already done; ")


def test_each_conversation_is_answered_at_its_own_temperature_in_whatever_batch_and_after_whatever_kill(
    tmp_path, target, prompts, whole
):
    parts = {name: tmp_path / f"{name}.jsonl" for name in ("torn", "undisturbed", "warm")}
    flags = ("--prompts", prompts, "--keep-unfinished", *MIXTURE)
    regenerate(parts["torn"], target, *flags, "--batch", "4", "--limit", "5")
    parts["torn"].write_bytes(parts["torn"].read_bytes()[:-20])
    counted = regenerate(parts["torn"], target, *flags, "--batch", "4")
    assert counted["resumed_from"] == 4 and counted["temperatures"] == MIXTURE[1]
    regenerate(parts["undisturbed"], target, *flags, "--batch", "3")
    assert lines_of(parts["torn"]) == lines_of(parts["undisturbed"])
    drawn = Counter(json.loads(line)["temperature"] for line in lines_of(parts["torn"]))
    assert drawn.keys() <= {0, 0.7, 1.5} and len(drawn) > 1
    assert {row["temperature"]: row["conversations"] for row in counted["by_temperature"]} == drawn
    regenerate(parts["warm"], target, "--prompts", prompts, "--keep-unfinished", "--seed", "5", "--temperature", "1.5")
    alone = [*lines_of(whole), *lines_of(parts["warm"])]
    assert all(line in alone for line in lines_of(parts["torn"]) if json.loads(line)["temperature"] in (0, 1.5))


def test_temperatures_are_drawn_by_weight_and_a_weight_of_0_never():
    mixture = parse_temperatures("0,0.3:2,1:0")
    drawn = Counter(mixture.draw(3, index) for index in range(3000))
    assert drawn.keys() == {0.0, 0.3} and abs(drawn[0.3] / 3000 - 2 / 3) < 0.03
    assert [mixture.draw(3, i) for i in range(50)] != [mixture.draw(4, i) for i in range(50)]


def test_unfinished_answers_are_counted_and_dropped_and_not_tried_again(tmp_path, target, prompts, whole):
    out = tmp_path / "out.jsonl"
    first = regenerate(out, target, "--prompts", prompts, "--batch", "4")
    finished = [line for line in lines_of(whole) if json.loads(line)["finish"] == "stop"]
    assert lines_of(out) == finished
    assert first["unfinished"] == 12 - len(finished) > 0
    again = regenerate(out, target, "--prompts", prompts, "--batch", "4")
    assert (again["resumed_from"], again["tokens"], again["sources"]) == (12, 0, first["sources"])


def test_prompts_are_known_by_what_they_ask_and_not_by_their_file(tmp_path, target, capsys):
    """The same under another path goes on; another under the same id is refused; new ones are added."""
    asked = [{"messages": [message("user", f"{i} and {i}?")]} for i in range(3)]
    flags = ("--keep-unfinished",)

    def write(name: str, records: list) -> Path:
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in records))
        return tmp_path / name

    out = tmp_path / "out.jsonl"
    regenerate(out, target, "--prompts", write("first.jsonl", asked[:2]), *flags)
    again = regenerate(out, target, "--prompts", write("moved.jsonl", asked), *flags)
    assert (again["resumed_from"], len(lines_of(out))) == (2, 3)
    before = lines_of(out)
    regenerate(out, target, "--prompts", write("moved.jsonl", [asked[2], *asked[:2]]), *flags, code=1)
    assert "holds an answer to another conversation '1' than the prompts do now" in capsys.readouterr().err
    assert lines_of(out) == before


def test_a_file_that_another_process_writes_is_refused_until_that_has_ended(tmp_path, target, prompts, capsys):
    out = tmp_path / "out.jsonl"
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom jaxspec.data import jsonl\n"
        "jsonl.hold(Path(sys.argv[1]), of=Path('x'))\nprint('held', flush=True)\ntime.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program, f"{out}.state"], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    words = ["regenerate", "--out", str(out), "--target", str(target), "--prompts", str(prompts), "--limit", "1"]
    assert main(words) == 1
    assert f"{out}: another process is writing it" in capsys.readouterr().err
    other.kill()
    other.wait()
    other.stdout.close()
    assert main([*words, "--keep-unfinished", "--max-new-tokens", "8"]) == 0


def test_counts_are_by_source(tmp_path, target, prompts):
    result = regenerate(tmp_path / "out.jsonl", target, "--prompts", prompts, "--batch", "4")
    assert [row["source"] for row in result["sources"]] == ["a", "b"]
    assert sum(row["conversations"] + row["unfinished"] for row in result["sources"]) == 12
    assert result["tokens_per_second"] > 0


def test_other_settings_or_a_foreign_file_are_refused(tmp_path, target, prompts, whole, capsys):
    flags = ["regenerate", "--target", str(target), "--prompts", str(prompts)]
    assert main([*flags, "--out", str(whole), "--seed", "9"]) == 1
    assert "was begun with" in capsys.readouterr().err
    foreign = tmp_path / "mine.jsonl"
    foreign.write_text('{"a": 1}\n')
    assert main([*flags, "--out", str(foreign)]) == 1
    assert "no run of this verb began it" in capsys.readouterr().err
    assert foreign.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "--prompts, or a number with --from-scratch"),
        (["--prompts", "p", "--shard", "4/4"], "--shard is '4/4'"),
        (["--prompts", "p", "--shard", "x"], "--shard is 'x'"),
        (["--prompts", "p", "--limit", "0"], "--limit is 0"),
        (["--from-scratch", "-3"], "--from-scratch is -3"),
        (["--prompts", "p", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompts", "p", "--temperature", "1", "--temperatures", "0"], "or several with --temperatures"),
        (["--prompts", "p", "--temperatures", "0,-1"], "temperatures hold -1"),
        (["--prompts", "p", "--temperatures", "0:-1,1"], "weights of temperatures hold -1"),
        (["--prompts", "p", "--temperatures", "0:0,1:0"], "not all 0"),
        (["--prompts", "p", "--temperatures", "0,0:2"], "temperatures hold one twice"),
        (["--prompts", "p", "--temperatures", "0,warm"], "temperatures are '0,warm'; they must be numbers"),
        (["--prompts", "p", "--temperatures", ""], "temperatures are ''; they must be numbers"),
        (["--prompts", "p", "--temperatures", "nan"], "temperatures hold nan"),
    ],
)
def test_wrong_flags_are_wrong_usage(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["regenerate", "--out", "o", *flags])
    assert stop.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_two_conversations_of_one_id_are_refused_or_the_later_left_out(tmp_path, target, capsys):
    path, out = tmp_path / "twice.jsonl", tmp_path / "o"
    path.write_text("\n\n".join([json.dumps({"id": "x", "messages": [message("user", "hi")]})] * 2))
    assert main(["regenerate", "--out", str(out), "--target", str(target), "--prompts", str(path)]) == 1
    assert f"{path}, line 3: has the id 'x' of {path}, line 1: give each its own (--skip" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["twice.jsonl"]
    done = regenerate(out, target, "--prompts", path, "--skip-bad", "--keep-unfinished")
    assert done["left_out"] == {"records left out: the id of another": 1} and len(lines_of(out)) == 1


def test_what_the_template_drops_stops_a_run_before_it_begins_or_is_counted(tmp_path, target, capsys):
    path, out, template = tmp_path / "p.jsonl", tmp_path / "o", tmp_path / "t.jinja"
    template.write_text("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    lost = {"id": "lost", "messages": [message("user", "1")], "tools": [{"name": "f"}]}
    late = {"id": "late", "messages": [*map(message, ("user", "assistant", "system", "user"), "1234")]}
    path.write_text("\n".join(json.dumps(r) for r in (lost, {"id": "a", "messages": [message("user", "2")]}, late)))
    words = ["regenerate", "--out", str(out), "--target", str(target), "--prompts", str(path), "--template"]
    assert main([*words, str(template)]) == 1
    said = capsys.readouterr().err
    assert f"{path}, line 1: conversation 'lost' of p: message 0: the chat template drops descriptions of tools" in said
    assert not out.with_name("o.state").exists()
    flags = ("--prompts", path, "--template", template, "--skip-bad", "--keep-unfinished")
    done = regenerate(out, target, *flags, "--max-new-tokens", "4")
    assert done["left_out"] == {"records left out: dropped by the template": 1} and done["conversations"] == 2
    template.rename(tmp_path / "moved.jinja")
    flags = ("--prompts", path, "--template", tmp_path / "moved.jinja", "--skip-bad", "--keep-unfinished")
    assert regenerate(out, target, *flags, "--max-new-tokens", "4")["tokens"] == 0
    late = next(json.loads(line) for line in lines_of(out) if '"late"' in line)
    if late["finish"] == "unfit":
        assert "unfit is 'late': message 2: the chat template drops a message of role system" in capsys.readouterr().err


def test_prompts_that_cannot_be_read_begin_no_output(tmp_path, target, capsys):
    words = ["regenerate", "--out", str(tmp_path / "o"), "--target", str(target), "--prompts"]
    (tmp_path / "bad.jsonl").write_text('{"id": "x", "messages": [')
    for name in ("absent.jsonl", "bad.jsonl"):
        assert main([*words, str(tmp_path / name)]) == 1
        assert name in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_prompts_without_a_question_are_said_to_be_that(tmp_path, target, capsys):
    (tmp_path / "text.txt").write_text("Once upon a time.")
    assert main(
        ["regenerate", "--out", str(tmp_path / "o"), "--target", str(target), "--prompts", str(tmp_path / "text.txt")]
    )
    shown = capsys.readouterr().err
    assert (
        "has no user turn that the target can answer" in shown and "unfit is 'text.txt:1': has no user's turn" in shown
    )


def test_a_result_that_no_answer_can_call_is_refused():
    turns = [message("tool", "r"), message("user", "u"), message("tool", "s")]
    check_results(turns[1:])
    with pytest.raises(ValueError, match="message 0: a tool's result stands before the first user's turn"):
        check_results(turns)


def test_runs_hold_what_is_said_before_each_answer():
    system, user, answer = message("system", "s"), message("user", "u"), message("assistant", "a")
    steps = steps_of([answer, system, answer, user, answer, answer, user])
    assert [step.others for step in steps] == [(system, user), (user,)]
    assert steps_of([system]) == []


def test_the_target_writes_different_user_turns_behind_its_own_header(target):
    models = loading.load_models(str(target))
    assert user_header(models.tokenizer) == ("<|begin|><|user|>", "<|end|><|assistant|>")
    turns = list(write_user_turns(models, 6, seed=1, batch=4))
    assert len({t.text for t in turns}) == 6
    assert all(t.text and "<|" not in t.text for t in turns)
    assert list(write_user_turns(models, 3, seed=1, batch=4)) == turns[:3]


def test_an_answer_that_was_cut_is_read_back_as_unfinished(whole):
    finish = {r["id"]: r["finish"] for r in map(json.loads, lines_of(whole))}
    assert {c.unfinished for c in read_conversations(whole)} == {True, False}
    assert all(c.unfinished == (finish[c.id] == "length") for c in read_conversations(whole))


def test_from_scratch_needs_no_data(tmp_path, target):
    out = tmp_path / "out.jsonl"
    regenerate(out, target, "--from-scratch", "4", "--batch", "4", "--keep-unfinished")
    written = read_conversations(out)
    assert len(written) == 4 and all(c.source == "scratch" for c in written)
    assert all([m["role"] for m in c.messages] == ["user", "assistant"] for c in written)
