"""Tests of `jaxspec report`: figures are those of the rows, several runs, failed and hostile rows, refusals, looks."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_checks import check_in_chromium, check_page
from report_toys import (
    ARMS,
    DEPTH,
    PLAIN,
    TASKS,
    bench_result,
    failed_rows,
    lab_table,
    some_rows,
    tiny_tokenizer,
    write_rows,
)

from jaxspec.__main__ import main
from jaxspec.console.cli import EXIT_FAILED, EXIT_USAGE
from jaxspec.console.results import jsonable
from jaxspec.evaluation.breakdown import prompt_times
from jaxspec.evaluation.metrics import FORMULAS, summarize_all
from jaxspec.evaluation.rows import read_evaluation
from jaxspec.lab.simulate import simulate
from jaxspec.pages.chromium import find_chromium, open_page
from jaxspec.report.runs import load_runs
from jaxspec.report.tables import slower
from jaxspec.report.wording import interval, spread

HOSTILE = "<script>alert(1)</script>"
SECTIONS = {"tables", "speed", "against", "acceptance", "along", "batch", "cost", "texts", "checks", "made"}
NEEDS_CHROMIUM = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")
SCRIPTS = 2
"""The slider, and data."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of other batches, and files for the figures of cost."""
    home = tmp_path_factory.mktemp("report")
    failed = [row for t in (0.0, 1.0) for row in failed_rows("gone", "qa", "is too long", temperature=t)]
    rows = [*some_rows(12), *some_rows(12, temperature=1.0), *failed]
    write_rows(home / "one", rows, temperatures=[0.0, 1.0])
    write_rows(home / "four", some_rows(5), batch=4)
    bench_result(home / "bench.json")
    lab_table(home / "table.json")
    simulate(np.full((3, 2), 0.3), prompts=8, tokens=50).save(home / "profile.npz")
    return home


def write_page(home: Path, *words: str, runs: tuple[str, ...] = ("one",)) -> tuple[str, dict[str, Any]]:
    """Makes a page; returns its text and the verb's JSON."""
    page, out = home / "page.html", home / "report.json"
    folders = [str(home / run) for run in runs]
    assert main(["report", *folders, "--out", str(page), "--json", str(out), *words]) == 0
    return page.read_text(encoding="utf-8"), json.loads(out.read_text())


@pytest.fixture(scope="module")
def made(home: Path) -> tuple[str, dict[str, Any]]:
    """The page of two runs with all files beside them."""
    files = ["--bench", str(home / "bench.json"), "--lab", str(home / "table.json"), "--lab"]
    found = write_page(home, *files, str(home / "profile.npz"), runs=("one", "four"))
    (home / "page.html").rename(home / "two.html")
    return found


@pytest.fixture(scope="module")
def single(home: Path, made) -> tuple[str, dict[str, Any]]:
    """The page of one run, and its JSON."""
    return write_page(home)


def data_of(text: str) -> dict[str, Any]:
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def test_the_page_is_whole_and_has_every_figure(made):
    text, _ = made
    read = check_page(text, scripts=SCRIPTS)
    assert SECTIONS <= set(read.ids)
    figures = {str(given["id"]) for tag, given in read.attributes if tag == "figure"}
    assert {"speed-1", "why-2", "prompts-1", "along-1", "length-2", "chunks-1", "batch-1", "frontier-1"} <= figures
    assert {"accepted-1-1", "survival-3-1", "conditional-1-all", "round", "budget-tau-1", "calibration-1"} <= figures
    assert "http" not in text.replace("http-equiv", "")
    visible = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", text, flags=re.DOTALL)
    assert "nan" not in re.sub(r"<(?:p|dd|td|th|li|h3|desc)[^>]*>[^<]*", "", visible).lower()


def test_figures_of_the_page_are_those_of_the_rows(home: Path, made):
    text, result = made
    evaluation = read_evaluation(home / "one")
    summary = summarize_all(evaluation.rows, evaluation.arms)
    found = data_of(text)
    assert found["runs"][0]["summary"] == jsonable(summary) == result["runs"][0]["summary"]
    assert found["formulas"] == FORMULAS and all(told in text for told in ("sum e / sum R", "plain seconds / seconds"))
    for figures in summary:
        if figures["method"] != PLAIN:
            for name in ("speedup", "tau_micro", "tau_macro"):
                assert f">{spread(figures, name)}<" in text
    best = max((f for f in summary if f["task"] == "all" and f["temperature"] == 0), key=lambda f: f["speedup"])
    assert f"{best['method']} is fastest, {spread(best, 'speedup')} times plain decoding" in text


def figure_of(text: str, anchor: str) -> str:
    return text.split(f'<figure id="{anchor}"')[1].split("</figure>")[0]


def test_every_line_of_a_table_has_its_mark(single):
    """A point of each task and method, and of each prompt and method."""
    text, _ = single
    methods, tasks, prompts = len(ARMS) - 1, len(TASKS), 12 * len(TASKS)
    for anchor, points in (("speed-1", (tasks + 1) * methods), ("why-2", (tasks + 1) * methods),
                           ("prompts-1", prompts * methods)):  # fmt: skip
        figure = figure_of(text, anchor)
        drawing = figure.split('<svg class="plot"')[1].split("</svg>")[0]
        lines = figure.split("<tbody>")[1].split("</tbody>")[0].count("<tr>")
        assert drawing.count('class="mark ') == lines == points, anchor


def test_prompts_and_tasks_that_are_slower_are_named(home: Path, single):
    text, _ = single
    against = text.split('<section id="against"')[1].split("</section>")[0]
    report = load_runs([str(home / "one")])
    for method in report.methods:
        times = prompt_times(method.rows(0.0), method.plain_rows(0.0))
        late = slower(times)
        assert late == sorted((t for t in times if t.high < 1), key=lambda t: t.speedup)
        assert f"{len(late)} of {len(times)} prompts slower in each of 3 repeats" in against
        assert all(f">{t.unit}<" in against for t in late[:20])
        for task in TASKS:
            _, _, high = interval(method.figures(0.0, task) or {}, "speedup")
            line = rf">{task.replace('_', ' ')}</th><td>{method.label}</td><td>greedy</td><td>[^<]*</td>"
            assert bool(re.search(line + r'<td class="number">12</td><td>slower</td>', against)) == (high < 1)


def test_several_runs_are_told_apart_and_their_settings_compared(made):
    text, result = made
    assert [run["run"] for run in result["runs"]] == ["one", "four"]
    assert "chain:3 (one)" in text and "plain (four)" in text
    assert "Settings that differ between the runs" in text and ">batch</th><td>1</td><td>4</td>" in text
    assert "not of the same questions" not in text
    assert "2 predicted trees are of a batch that no run has" in text
    assert {one["temperature"] for one in result["best"]} == {0.0, 1.0}


def test_runs_of_other_questions_are_not_compared_in_silence(home: Path, tmp_path: Path):
    write_rows(tmp_path / "other", some_rows(2), prompts_sha256="q", machine={"cpu": "b"})
    page = tmp_path / "p.html"
    assert main(["report", str(home / "four"), str(tmp_path / "other"), "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "not of the same questions and target (prompts sha256)" in text
    assert "Fewer than 10 prompts, so that intervals are rough: math reasoning, qa, translation." in text


def test_the_page_says_how_it_was_made(home: Path, made):
    text, result = made
    for run in result["runs"]:
        assert run["sha256"] in text and run["rows"] in text
    assert "jaxspec report" in text and "--bench" in text and "a processor" in text
    assert "Left out: bench.json: wide, batch 1: no parts of a round." in text
    assert result["left_out"] == ["bench.json: wide, batch 1: no parts of a round"]
    assert "Without an answer: chain:3 (four), temperature 1; wide (four), temperature 1." in text


def test_without_files_the_page_says_what_it_lacks(home: Path):
    text, _ = write_page(home, runs=("four",))
    check_page(text, scripts=SCRIPTS)
    assert "--bench FILE" in text and "--lab FILE.npz" in text and 'id="round"' not in text
    assert "All answers were decoded in a batch of 4." in text


def test_failed_turns_are_named_and_in_no_figure(single):
    text, result = single
    assert result["runs"][0]["failed"] == 1 and "1 failed turn, left out of every figure" in text
    assert ">gone</th><td>qa</td>" in text and "is too long" in text
    assert "all invariants hold of 222 rows" in text


def test_a_run_that_failed_throughout_has_a_page(tmp_path: Path):
    write_rows(tmp_path / "bad", [*failed_rows("a", "x"), *failed_rows("b", "y")])
    text, result = write_page(tmp_path, runs=("bad",))
    check_page(text, scripts=1)
    assert "no method with drafts was measured" in text and result["texts"] == []


def test_plain_decoding_alone_has_a_page(tmp_path: Path):
    rows = [row for row in some_rows(2) if row.arm == PLAIN]
    write_rows(tmp_path / "alone", rows, arms={PLAIN: ARMS[PLAIN]})
    text, result = write_page(tmp_path, runs=("alone",))
    check_page(text, scripts=1)
    assert result["best"] == [{"temperature": 0.0, "method": None}]


def test_one_task_of_one_prompt_has_a_page_without_intervals(tmp_path: Path):
    write_rows(tmp_path / "one", some_rows(1, tasks=["solo"]))
    text, _ = write_page(tmp_path, runs=("one",))
    check_page(text, scripts=SCRIPTS)
    assert "too few measurements for an interval" in text and "not measured" not in text


def test_answers_that_end_with_prefill_have_a_page(tmp_path: Path):
    short = {"tokens": (5,), "emitted": (), "accepted": (), "group_calls": 0}
    rows = [dataclasses.replace(row, **short) for row in some_rows(2)]
    write_rows(tmp_path / "short", rows)
    text, _ = write_page(tmp_path, runs=("short",))
    check_page(text, scripts=1)
    assert "No answer has a round." in text


def test_a_run_that_has_not_ended_is_said_to_be_partial_and_its_figures_may_be_trusted(tmp_path: Path):
    asked = [[f"{task[0]}{n}", task, 1] for task in TASKS for n in range(3)]
    write_rows(tmp_path / "going", some_rows(2), asked=asked)
    text, result = write_page(tmp_path, runs=("going",))
    assert "going is partial: has rows of 6 turns and none of 3, such as" in text.split("<nav")[0]
    assert not result["runs"][0]["problems"] and "Do not trust" not in text


def test_broken_rows_are_told_at_the_top(tmp_path: Path):
    rows = some_rows(2)
    rows[1] = dataclasses.replace(rows[1], accepted=(DEPTH + 4, *rows[1].accepted[1:]))
    write_rows(tmp_path / "broken", rows)
    text, result = write_page(tmp_path, runs=("broken",))
    assert result["runs"][0]["problems"] and "Do not trust these figures" in text.split("<nav")[0]


def test_text_that_differs_from_plain_decoding_is_a_fault_and_a_tie_is_none(tmp_path: Path):
    rows = some_rows(2)
    apart = dataclasses.replace(rows[1], tokens=(9, *rows[1].tokens[1:]), identical=False, divergence=(0, 1e-6))
    write_rows(tmp_path / "tie", [rows[0], apart, *rows[2:]])
    text, _ = write_page(tmp_path, runs=("tie",))
    assert "83.33 %, 1 near ties" in text and "at a near tie" in text
    write_rows(tmp_path / "fault", [rows[0], dataclasses.replace(apart, divergence=(0, 0.5)), *rows[2:]])
    text, _ = write_page(tmp_path, runs=("fault",))
    assert "differ from plain decoding&#x27;s by more than rounding: a fault" in text


# Hostile names and texts.


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page all names of which are markup."""
    home = tmp_path_factory.mktemp("hostile")
    arms = {f"{HOSTILE}{name}" if name != PLAIN else name: facts for name, facts in ARMS.items()}
    named = [
        dataclasses.replace(
            row,
            id=f"{HOSTILE}{row.id}",
            task=f"{HOSTILE}{row.task}",
            arm=row.arm if row.arm == PLAIN else f"{HOSTILE}{row.arm}",
        )
        for row in some_rows(3)
    ]
    broken = [dataclasses.replace(row, error=HOSTILE) for row in failed_rows("x", HOSTILE)]
    broken = [dataclasses.replace(row, arm=arm) for row, arm in zip(broken, arms, strict=True)]
    folder = write_rows(home / "<img src=x onerror=alert(2)>", [*named, *broken], arms=arms, prompts=HOSTILE)
    bench_result(home / "bench.json", machine={"cpu": HOSTILE})
    words = ["report", str(folder), "--out", str(home / "page.html"), "--bench", str(home / "bench.json")]
    assert main(words) == 0
    return home / "page.html"


def test_names_stay_text_and_data_cannot_end_its_element(hostile: Path):
    text = hostile.read_text(encoding="utf-8")
    check_page(text, scripts=SCRIPTS)
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text and "<img" not in text
    assert data_of(text)["runs"][0]["settings"]["prompts"] == HOSTILE


def test_text_of_a_model_stays_text(tmp_path: Path):
    tokens = [int(i) for i in tiny_tokenizer().encode(f"{HOSTILE}<b>bold</b>" * 3)]
    rows = [dataclasses.replace(row, tokens=tuple(tokens)) for row in some_rows(1)]
    rounds = {"emitted": (1,) * (len(tokens) - 1), "accepted": (0,) * (len(tokens) - 1), "group_calls": len(tokens) - 1}
    write_rows(tmp_path / "model", [dataclasses.replace(row, **rounds) for row in rows])
    text, result = write_page(tmp_path, runs=("model",))
    check_page(text, scripts=SCRIPTS)
    assert result["texts"] and "<b>" not in text and "<script>alert" not in text
    shown = re.sub("<[^>]*>", "", text.split('class="coloured"')[1].split("</div>")[0].partition(">")[2])
    assert shown.replace("&lt;", "<").replace("&gt;", ">").startswith(f"{HOSTILE}<b>bold</b>")


def test_without_the_targets_tokenizer_texts_are_left_out_with_the_reason(tmp_path: Path, capsys):
    write_rows(tmp_path / "run", some_rows(2), target=str(tmp_path / "gone"))
    text, result = write_page(tmp_path, runs=("run",))
    check_page(text, scripts=1)  # no script without a slider
    assert "script-src" not in text.split("</head>")[0]
    assert "No text is shown" in text and "gone: no such folder" in result["texts_lacking"]
    assert "No text is shown" in capsys.readouterr().out
    text, result = write_page(tmp_path, "--target", "tiny", "--text", "qa/q1", runs=("run",))
    assert result["texts"] == ["qa/q1"] and result["texts_lacking"] is None and 'id="text-1"' in text


# Refusals.


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], EXIT_USAGE, "a report needs a run"),
        (["one"], EXIT_USAGE, "--out is missing"),
        (["one", "--out", "p.txt"], EXIT_USAGE, "must end in .html"),
        (["gone", "--out", "p.html"], EXIT_FAILED, "gone: no such file"),
        (["one", "one/rows.jsonl", "--out", "p.html"], EXIT_FAILED, "one is given twice"),
        (["one", "--out", "p.html", "--bench", "gone.json"], EXIT_FAILED, "gone.json: there is no such file"),
        (["one", "--out", "p.html", "--bench", "table.json"], EXIT_FAILED, "is no result of bench decode"),
        (["one", "--out", "p.html", "--lab", "bench.json"], EXIT_FAILED, "is no result of lab search"),
        (["one", "--out", "p.html", "--lab", "bench.json", "--lab", "bench.json"], EXIT_USAGE, "is given twice"),
        (["one", "--out", "p.html", "--text", "nobody"], EXIT_FAILED, "--text nobody: no answer of this question"),
        (["one", "--out", "p.html", "--check"], EXIT_USAGE, "--check is of documents"),
        (["one", "--markdown", "a.md"], EXIT_USAGE, "it takes no runs"),
    ],
)
def test_wrong_words_are_refused_in_a_sentence(home: Path, words, code, said, capsys, monkeypatch):
    monkeypatch.chdir(home)
    try:
        found = main(["report", *words])
    except SystemExit as stop:
        found = stop.code
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert found == code and said in complaint and complaint.startswith("jaxspec report: ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": {"chain:3": ARMS["chain:3"]}}, "names no arm 'plain'"),
        ({"arms": {PLAIN: ARMS[PLAIN]}}, "has rows of an arm 'chain:3'"),
    ],
)
def test_files_that_are_no_evaluation_are_refused(tmp_path: Path, change, said, capsys):
    write_rows(tmp_path / "run", some_rows(1), **change)
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "p.html")]) == EXIT_FAILED
    assert said in capsys.readouterr().err
    write_rows(tmp_path / "run", [])
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "p.html")]) == EXIT_FAILED
    assert "has no row yet" in capsys.readouterr().err


# In Chromium.


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_desktop_and_phone_in_light_and_dark(home: Path, made, width: int, dark: bool):
    check_in_chromium(home / "two.html", width=width, dark=dark)


@NEEDS_CHROMIUM
def test_hostile_names_run_nothing_and_fit(hostile: Path):
    check_in_chromium(hostile, width=360, dark=False)


@NEEDS_CHROMIUM
def test_the_slider_shows_an_answer_round_by_round(home: Path, made):
    with open_page(home / "two.html", width=700) as shown:
        state = "(s => [s.hidden, s.querySelector('output').textContent, s.querySelector('input').ariaValueText])"
        state += "(document.querySelector('.slider'))"
        rounds = shown.evaluate("Number(document.querySelector('.slider input').max)")
        hidden, told, spoken = shown.evaluate(state)
        assert not hidden and told == spoken and told.startswith(f"round {rounds} of {rounds}: ")
        visible = "Array.from(document.querySelectorAll('#text-1 span')).filter(s => "
        visible += "getComputedStyle(s).visibility === 'visible')"
        whole = shown.evaluate(f"{visible}.length")
        move = "(v => {{ const i = document.querySelector('.slider input'); i.value = v; "
        move += "i.dispatchEvent(new Event('input')); return {state}; }})({to})"
        assert shown.evaluate(move.format(state=state, to=0))[1] == "prefill, 1 tokens so far"
        assert shown.evaluate(f"{visible}.length") == 1
        _, told, _ = shown.evaluate(move.format(state=state, to=2))
        assert re.fullmatch(rf"round 2 of {rounds}: \d drafted accepted, \d+ tokens so far", told)
        assert shown.evaluate(f"Math.max(...{visible}.map(s => Number(s.dataset.round)))") == 2
        shown.evaluate(move.format(state=state, to=rounds))
        assert shown.evaluate(f"{visible}.length") == whole and not shown.complaints


@NEEDS_CHROMIUM
def test_rejected_drafts_are_struck_through_on_demand(tmp_path: Path):
    drafts = [int(i) for i in tiny_tokenizer().encode("<b>not so</b>")]
    rows = [
        row if row.arm == PLAIN else dataclasses.replace(row, rejected=tuple(tuple(drafts[a:3]) for a in row.accepted))
        for row in some_rows(1)
    ]
    write_rows(tmp_path / "kept", rows)
    text, _ = write_page(tmp_path, runs=("kept",))
    check_page(text, scripts=SCRIPTS)
    assert "<b>" not in text
    shown_rows = [row for row in rows if row.arm == "chain:3"]
    with open_page(tmp_path / "page.html", width=360) as shown:
        struck = "Array.from(document.querySelectorAll('#text-1 del')).filter(e => e.getClientRects().length)"
        assert shown.evaluate(f"{struck}.length") == 0
        shown.evaluate("document.querySelector('.slider [type=checkbox]').click()")
        count = shown.evaluate(f"{struck}.length")
        assert count in [sum(bool(r) for r in row.rejected) for row in shown_rows] and count > 0
        line = f"getComputedStyle({struck}[0]).textDecorationLine"
        assert shown.evaluate(line) == "line-through" and not shown.complaints
        assert shown.evaluate("document.documentElement.scrollWidth <= 360")


@NEEDS_CHROMIUM
def test_the_page_can_be_read_by_the_keyboard_and_without_its_script(home: Path, made, tmp_path: Path):
    text, _ = made
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL), encoding="utf-8")
    with open_page(bare, width=700) as shown:
        assert not shown.evaluate("document.querySelectorAll('.coloured .later').length") and not shown.complaints
        assert shown.evaluate("getComputedStyle(document.querySelector('.slider')).display") == "none"
    with open_page(home / "two.html", width=700) as shown:
        reached = "Array.from(document.querySelectorAll('.scroll, .coloured')).every(s => s.tabIndex === 0)"
        assert shown.evaluate(reached)
        assert shown.evaluate("document.querySelector('.slider input').labels[0].textContent") == "Up to round"


@NEEDS_CHROMIUM
@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out_from_their_tints(home: Path, made, dark: bool):
    luminance = (
        "(c => { const p = c.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : "
        "((v + .055) / 1.055) ** 2.4); return .2126 * p[0] + .7152 * p[1] + .0722 * p[2]; })"
    )
    with open_page(home / "two.html", width=700, dark=dark) as shown:
        for shade in ("even", "odd"):
            style = f"getComputedStyle(document.querySelector('.coloured .{shade}'))"
            ink, tint = (shown.evaluate(f"{luminance}({style}.{name})") for name in ("color", "backgroundColor"))
            assert (max(ink, tint) + 0.05) / (min(ink, tint) + 0.05) >= 7


@NEEDS_CHROMIUM
def test_a_picture_of_the_page_and_of_every_figure_is_written(home: Path, tmp_path: Path):
    text, result = write_page(home, "--png", str(tmp_path / "png"), runs=("four",))
    anchors = {str(given["id"]) for tag, given in check_page(text, scripts=SCRIPTS).attributes if tag == "figure"}
    assert {path.stem for path in (tmp_path / "png").iterdir()} == {"page", *anchors}
    assert len(result["pictures"]) == len(anchors) + 1
