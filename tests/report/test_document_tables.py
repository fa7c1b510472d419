"""Tables of documents: made from results, idempotent, checked, and refused in a sentence where a comment is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_toys import ARMS, failed_rows, settings, some_rows

from jaxspec.__main__ import main
from jaxspec.console.cli import EXIT_FAILED
from jaxspec.console.results import jsonable
from jaxspec.evaluation.metrics import summarize_all
from jaxspec.report.documents import renew
from jaxspec.report.wording import spread

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SUMMARY = summarize_all([*some_rows(3), *some_rows(3, temperature=0.5), *failed_rows("x", "rag")], ARMS)
TEXT = """# Results

<!-- table: results/eval.json methods -->
an old table
<!-- end -->

Between.

<!-- table: results/eval.json tasks temperature=0.5 figures=speedup method=chain:3 -->
<!-- end -->

```
<!-- table: gone.json methods -->
```

    <!-- table: gone.json methods -->
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a document and the result that its tables are made of."""
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    result = {"command": "evaluate", **settings(dtype="float32"), "failed": 2, "summary": SUMMARY}
    (tmp_path / "results/eval.json").write_text(json.dumps(jsonable(result)))
    (tmp_path / "docs/results.md").write_text(TEXT)
    return tmp_path


def test_tables_are_written_from_the_results_and_stay(folder: Path, capsys: pytest.CaptureFixture[str]):
    path = folder / "docs/results.md"
    assert main(["report", "--markdown", str(path)]) == 0
    text = path.read_text()
    assert "an old table" not in text and "\nBetween.\n" in text and text.count("gone.json") == 2
    for figures in SUMMARY:
        if figures["task"] == "all":
            assert f"| `{figures['method']}` | " in text and f" | {spread(figures, 'tau_macro')} | " in text
        elif figures["method"] == "chain:3" and figures["temperature"] == 0.5:
            assert f"| {figures['task'].replace('_', ' ')} | {spread(figures, 'speedup')} |" in text
    assert (
        "12 questions of question.jsonl (2 failed turns left out), target tiny, greedy and temperature 0.5, batch 1,"
        in text
    )
    assert "[eval.json](../results/eval.json)" in text
    assert "2 tables, written" in capsys.readouterr().out
    assert main(["report", "--markdown", str(path)]) == 0
    assert path.read_text() == text and "2 tables, current" in capsys.readouterr().out
    assert main(["report", "--markdown", str(path), "--check"]) == 0


def test_answers_of_slots_are_said_to_be(folder: Path):
    path, file = folder / "docs/results.md", folder / "results/eval.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"slots": 8}))
    assert main(["report", "--markdown", str(path)]) == 0
    assert "8 slots, float32" in path.read_text() and "batch 1" not in path.read_text()


def test_a_document_that_is_not_current_fails_in_a_sentence_and_is_not_written(folder: Path, capsys):
    path, out = folder / "docs/results.md", folder / "out.json"
    words = ["report", "--markdown", str(path), "--check"]
    assert main(words) == EXIT_FAILED
    assert path.read_text() == TEXT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxspec report: not current: ") and "results.md" in line
    assert main([*words[:-1], "--json", str(out)]) == 0
    assert json.loads(out.read_text())["documents"] == [{"document": str(path), "tables": 2, "changed": True}]
    path.write_text(path.read_text().replace("| all tasks |", "| all |"))
    assert main(words) == EXIT_FAILED
    assert main(words[:-1]) == 0 and main(words) == 0


def test_a_new_result_makes_a_document_stale(folder: Path):
    path = folder / "docs/results.md"
    renew(path, write=True)
    result = json.loads((folder / "results/eval.json").read_text())
    result["summary"][1]["tau_micro"] += 1
    (folder / "results/eval.json").write_text(json.dumps(result))
    assert renew(path, write=False).changed and renew(path, write=True).changed
    assert not renew(path, write=False).changed


def test_line_ends_of_a_document_are_kept(folder: Path):
    path = folder / "docs/results.md"
    path.write_bytes(TEXT.replace("\n", "\r\n").encode())
    renew(path, write=True)
    kept = path.read_bytes()
    assert kept.count(b"\r\n") == kept.count(b"\n") > TEXT.count("\n")
    assert not renew(path, write=False).changed


@pytest.mark.parametrize(
    ("comment", "said"),
    [
        ("<!-- table: results/eval.json -->\n<!-- end -->", "needs a file and a kind"),
        ("<!-- table: results/eval.json 'tasks -->\n<!-- end -->", "needs a file and a kind"),
        ("<!-- table: results/eval.json bars -->\n<!-- end -->", "no kind 'bars'"),
        ("<!-- table: results/gone.json tasks -->\n<!-- end -->", "results/gone.json: no such file"),
        ("<!-- table: results/eval.json tasks task=qa -->\n<!-- end -->", "'task=qa' is no option of tasks"),
        ("<!-- table: results/eval.json tasks wide -->\n<!-- end -->", "'wide' is no option"),
        ("<!-- table: results/eval.json tasks figures=speed -->\n<!-- end -->", "no figure 'speed'"),
        ("<!-- table: results/eval.json tasks method=deep -->\n<!-- end -->", "no method 'deep'"),
        ("<!-- table: results/eval.json methods task=none -->\n<!-- end -->", "no task 'none'"),
        ("<!-- table: results/eval.json tasks temperature=2 -->\n<!-- end -->", "at temperature 2"),
        ("<!-- table: results/eval.json tasks -->", "has no <!-- end -->"),
        ("<!-- table: a.json tasks -->\n<!-- table: a.json tasks -->", "a.json: no such file"),
        ("<!-- end -->", "without a <!-- table"),
    ],
)
def test_a_comment_that_cannot_be_followed_is_refused_with_its_line(folder: Path, comment: str, said: str):
    path = folder / "docs/bad.md"
    path.write_text(f"One.\n{comment}\n")
    with pytest.raises(ValueError) as told:
        renew(path, write=True)
    assert f"{path}:2: " in str(told.value) and said in str(told.value)
    assert path.read_text() == f"One.\n{comment}\n"


def test_a_table_that_does_not_end_before_the_next_is_refused(folder: Path):
    path = folder / "docs/bad.md"
    path.write_text("<!-- table: results/eval.json tasks -->\ntext\n<!-- table: results/eval.json tasks -->\n")
    with pytest.raises(ValueError, match=r"bad\.md:1: this table has no <!-- end --> before the next one"):
        renew(path, write=False)
    with pytest.raises(ValueError, match=r"gone\.md: there is no such document"):
        renew(folder / "gone.md", write=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"command": "bench decode"}, "is no result of evaluate"),
        ({"summary": []}, "has no figures"),
        ({"summary": [{"task": "all", "method": "a", "temperature": 0.0}]}, "lacks a figure or setting"),
    ],
)
def test_a_file_that_is_no_evaluation_is_refused(folder: Path, changes: dict, said: str):
    result = {"command": "evaluate", **settings(), "summary": SUMMARY, **changes}
    (folder / "results/eval.json").write_text(json.dumps(jsonable(result)))
    with pytest.raises(ValueError, match=said):
        renew(folder / "docs/results.md", write=True)


@pytest.mark.parametrize("name", ["a|b", "`x`"])
def test_names_do_not_break_a_table(folder: Path, name: str):
    summary = [{**figures, "task": name if figures["task"] == "qa" else figures["task"]} for figures in SUMMARY]
    result = {"command": "evaluate", **settings(), "summary": summary}
    (folder / "results/eval.json").write_text(json.dumps(jsonable(result)))
    path = folder / "docs/results.md"
    renew(path, write=True)
    lines = path.read_text().splitlines()
    assert any(line.startswith(f"| {name.replace('|', chr(92) + '|')} | ") for line in lines)
    assert not renew(path, write=False).changed


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_of_the_project_are_current(document: Path):
    assert not renew(document, write=False).changed


COMPARED = {
    "command": "compare",
    "baseline": "eagle2",
    "dtype": "float32",
    "max_new_tokens": 64,
    "recipes": [
        {
            "recipe": recipe,
            "source": source,
            "temperature": temperature,
            "tree": tree,
            "drafted_tree": "chain:2" if (recipe, tree) == ("medusa", "chain:3") else tree,
            "prompts": 12,
            "tau": tau + place / 10,
            "tau_low": tau - 0.5,
            "tau_high": tau + 0.5,
            "ratio": tau / 2,
            "ratio_low": tau / 2 - 0.125,
            "ratio_high": tau / 2 + 0.125,
            "seeds": [0, 1],
            "drafter_passes": 3,
            "drafter_parameters": 1234567,
            "train_tokens": 1_001_163,
        }
        for source in ("all", "gsm8k")
        for place, (tree, temperature) in enumerate([("chain:3", 0.0), ("chain:3", 1.0), ("dynamic:8x3x2", 0.0)])
        for recipe, tau in (("medusa", 1.5), ("eagle2", 2.0), ("best", 2.5))
        if (recipe, tree) != ("medusa", "dynamic:8x3x2")
    ],
}
BENCHED = {
    "command": "bench decode",
    "target": "models/smollm2",
    "machine": {"cpu": "a processor", "cores": 2},
    "temperature": 0.0,
    "dtype": "float32",
    "max_new_tokens": 40,
    "repeats": 3,
    "machine_copy_bytes_per_second": 54e9,
    "machine_matmul_flops_per_second": 214e9,
    "peer": {"name": "transformers", "version": "5.24.0", "tokens_per_second": 10.0, "identical_fraction": 1.0},
    "rows": [
        {"arm": arm, "batch": batch, "nodes": 1, "tokens_per_second": speed, "speedup": speed / 25, "tau": speed / 20,
         "efficiency": 0.5, "identical_fraction": 1.0, "round_ms": 30.26}
        for batch in (1, 4) for arm, speed in (("plain", 25.0), ("chain:3", 50.0))
    ],
}  # fmt: skip


TABLED = {
    "command": "lab table",
    "batches": [1, 64],
    "contexts": [512, 4096],
    "rows": [
        {"spec": spec, "nodes": nodes, "depth": depth, "batch": batch, "context": context, "expected_tau": tau,
         "speedup": speedup}
        for spec, nodes, depth, batch, context, tau, speedup in (
            ("static:0,1,00,000", 8, 3, 1, 512, 3.2, 2.0),
            ("none", 1, 0, 64, 512, 1.0, 1.0),
            ("static:0,1,00,000", 24, 5, 1, 4096, 4.0, 2.5),
            ("chain:3", 8, 3, 64, 4096, 3.1, 1.25),
        )
    ],
    "made_from": {
        "profile": {"file": "rates.npz", "temperature": 0.0},
        "costs": {
            "source": "roofline", "device": "v6e", "target": "llama3-8b", "drafter": "eagle2", "dtype": "bfloat16",
        },
        "limits": {"max_nodes": 64, "max_depth": 6, "max_branch": None},
    },
}  # fmt: skip


def made_with(table: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Any]:
    """The result of `lab table`, made from other costs, limits or profile."""
    made = table["made_from"]
    return {**table, "made_from": made | {part: made[part] | new for part, new in changes.items()}}


CHECKED = {
    "command": "lab check",
    "machine": {"cpu": "a processor", "cores": 2},
    "dtype": "float32",
    "target": "models/smollm2",
    "temperature": 0.0,
    "max_new_tokens": 48,
    "repeats": 2,
    "median_error": {"tokens_per_second": 0.052, "tau": 0.03, "round_seconds": 0.02, "speedup": 0.01},
    "picked_share": {"1": 1.0, "4": 0.975},
    "rows": [
        {"spec": spec, "nodes": nodes, "batch": batch, "expected_tau": tau, "measured_tau": tau, "round_seconds": 0.04,
         "measured_round_seconds": 0.05, "predicted_tokens_per_second": batch * tau / 0.04,
         "measured_tokens_per_second": batch * tau / 0.05, "error_of_tokens_per_second": 0.25,
         "error_of_tau": 0.06 / batch, "error_of_round_seconds": -0.05 * batch, "error_of_speedup": 0.0}
        for batch in (1, 4) for spec, nodes, tau in (("none", 1, 1.0), ("chain:3", 4, 1.5))
    ],
}  # fmt: skip
PEERED = {
    "command": "bench peers",
    "machine": {"cpu": "a processor", "cores": 2},
    "dtype": "float32",
    "target": "models/smollm2",
    "prompts": "runs/prompts.jsonl",
    "count": 12,
    "max_new_tokens": 64,
    "repeats": 3,
    "threads": 2,
    "copy_bandwidth": {"bytes_per_second": [1.0e10, 1.21e10], "moved": 0.21, "steady": False},
    "rows": [
        {"peer": "jaxspec plain", "version": "0.1.0", "tokens_per_second": 30.0, "x_plain": 1.0, "tau": 1.0,
         "tokens_per_second_min": 28.5, "tokens_per_second_max": 31.0,
         "decode_tokens_per_second": 32.0, "x_plain_decode": 1.0, "identical_fraction": 1.0, "near_ties": 0},
        {"peer": "llama.cpp", "version": "0.3", "tokens_per_second": 33.0, "x_plain": None, "tau": 1.0,
         "decode_tokens_per_second": None, "x_plain_decode": None, "identical_fraction": 0.75, "near_ties": 1},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            "check.json checks",
            [
                "| tree | batch | tau predicted | measured | round, ms, predicted | measured | tokens/s predicted | "
                "measured | error |",
                "| plain | 1 | 1.00 | 1.00 | 40.0 | 50.0 | 25 | 20 | +25.0% |",
                "| `chain:3` | 4 | 1.50 | 1.50 | 40.0 | 50.0 | 150 | 120 | +25.0% |",
                "4 predictions at all batches, off in the median (at worst): tokens/s by 5.2% (+25.0%), tau by 3.0% "
                "(+6.0%), a round by 2.0% (-20.0%), times plain decoding by 1.0% (+0.0%); the tree "
                "predicted best reaches of the best measured 100.0% at batch 1, 97.5% at batch 4.",
            ],
        ),
        (
            "check.json checks batches=4",
            [
                "measured | error | | --- | ---: |",
                "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | | plain | 4 |",
            ],
        ),
        (
            "peers.json peers",
            [
                "| jaxspec plain | 0.1.0 | 30 (28.5 to 31) | 1.00 | 32 | 1.00 | 1.00 | 100 % |",
                "| llama.cpp | 0.3 | 33 | - | - | - | 1.00 | 75 %, 1 near tie |",
                "12 prompts of prompts.jsonl, batch 1, greedy, float32, up to 64 new tokens, 2 threads each",
                "3 passes (least to greatest), a processor; no ratios, for the copy bandwidth moved by 21 % meanwhile:",
            ],
        ),
        (
            "compare.json recipes intervals=no facts=passes,seeds",
            [
                "| recipe | passes | seeds | tau, greedy | over `eagle2` | tau, temperature 1 | over `eagle2` |",
                "| `best` | 3 | 2 | 2.50 | 1.250 | 2.60 | 1.250 |",
                "| `eagle2` | 3 | 2 | 2.00 | 1 | 2.10 | 1 |",
                "| `medusa` | 3 | 2 | 1.50 | 0.750 | 1.60 | 0.750 |",
                "12 held-out prompts, tree chain:3, 1.00M trained tokens, up to 64 new tokens, float32, "
                "chain:2 for medusa:",
            ],
        ),
        (
            "compare.json recipes tree=dynamic:8x3x2,chain:3 temperature=0 recipes=eagle2,medusa source=gsm8k",
            [
                "| recipe | `dynamic:8x3x2`, greedy | over `eagle2` | `chain:3`, greedy | over `eagle2` |",
                "| `eagle2` | 2.20 [1.50, 2.50] | 1 | 2.00 [1.50, 2.50] | 1 |",
                "| `medusa` | - | - | 1.50 [1.00, 2.00] | 0.750 [0.625, 0.875] |",
            ],
        ),
        (
            "bench.json arms figures=nodes,tokens_per_second,speedup,tau,identical,round_ms",
            [
                "| arm | nodes | tokens/s | x plain | tau | identical | round, ms |",
                "| `plain` | 1 | 25 | 1.00 | 1.25 | 100 % | 30.3 |",
                "| `chain:3` | 1 | 50 | 2.00 | 2.50 | 100 % | 30.3 |",
                "| transformers 5.24.0 | 1 | 10 | 0.40 | 1.00 | 100 % | - |",
            ],
        ),
        ("bench.json arms batch=4 arms=chain:3 figures=tau", ["| arm | tau |", "| `chain:3` | 2.50 |"]),
        (
            "table.json trees",
            [
                "| context | batch 1 | batch 64 |",
                "| 512 | 8x3, 2.00 | plain |",
                "| 4,096 | 24x5, 2.50 | 8x3, 1.25 |",
                "Costs of v6e (roofline), target llama3-8b, drafter eagle2, bfloat16; acceptance of rates.npz, greedy;",
                "up to 64 nodes and 6 levels:",
            ],
        ),
        (
            "table.json trees contexts=4096 batches=64 figures=tree,tau",
            ["| context | batch 64 |", "| 4,096 | `chain:3`, 3.10 |", "Each cell: the tree, tau."],
        ),
        (
            "table.json,other.json trees",
            [
                "| drafter | device | context | batch 1 | batch 64 |",
                "| `eagle2` | v6e | 4,096 | 24x5, 2.50 | 8x3, 1.25 |",
                "| `medusa` | v5p | 512 | 8x3, 2.00 | plain |",
                "costs roofline, dtype bfloat16, temperature 0, limits up to 64 nodes and 6 levels, acceptance rates",
                "[table.json](table.json), [other.json](other.json)",
            ],
        ),
        (
            "table.json,other.json trees contexts=512 figures=tau",
            ["| drafter | device | batch 1 | batch 64 |", "| `medusa` | v5p |", "context 512 tokens:"],
        ),
        (
            "table.json,chains.json trees contexts=512 batches=1",
            [
                "| limits | batch 1 |",
                "| up to 64 nodes and 6 levels | 8x3, 2.00 |",
                "| up to 8 nodes and 6 levels, 1 child a node at most | 8x3, 2.00 |",
                "context 512 tokens, acceptance each its own:",
            ],
        ),
    ],
)
def test_recipes_and_arms_are_tables_too(tmp_path: Path, words: str, lines: list[str]):
    (tmp_path / "compare.json").write_text(json.dumps(COMPARED))
    (tmp_path / "bench.json").write_text(json.dumps(BENCHED))
    (tmp_path / "table.json").write_text(json.dumps(TABLED))
    (tmp_path / "other.json").write_text(json.dumps(made_with(TABLED, costs={"drafter": "medusa", "device": "v5p"})))
    chains = made_with(TABLED, limits={"max_nodes": 8, "max_branch": 1}, profile={"file": "others.npz"})
    (tmp_path / "chains.json").write_text(json.dumps(chains))
    (tmp_path / "check.json").write_text(json.dumps(CHECKED))
    (tmp_path / "peers.json").write_text(json.dumps(PEERED))
    document = tmp_path / "page.md"
    document.write_text(f"<!-- table: {words} -->\n<!-- end -->\n")
    assert main(["report", "--markdown", str(document)]) == 0
    text = " ".join(document.read_text().split())
    for line in lines:
        assert line in text
    if words.startswith("bench"):
        assert "transformers" not in text or "batch=4" not in words
        assert "Target smollm2, greedy, batch" in text and "copied 54.0 GB/s and multiplied 214 GFLOP/s" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compare.json recipes source=mt", "there is no source 'mt'; there are all, gsm8k"),
        ("compare.json recipes tree=chain:9", "tree=chain:9 was not compared; there are chain:3, dynamic:8x3x2"),
        ("compare.json recipes facts=flops", "there is no fact 'flops'; there are parameters, passes, seeds"),
        ("compare.json recipes intervals=maybe", "intervals=maybe must be yes or no"),
        ("bench.json arms batch=2", "nothing was measured in a batch of 2; there are 1, 4"),
        ("bench.json arms arms=tree", "there is no arm 'tree'; there are plain, chain:3"),
        ("bench.json arms figures=mood", "there is no figure 'mood'"),
        ("bench.json recipes", "is no result of compare"),
        ("check.json checks batches=2", "nothing was checked in a batch of 2; there are 1, 4"),
        ("table.json trees batches=2", "nothing was searched for batches 2; there are 1, 64"),
        ("table.json trees figures=mood", "there is no figure 'mood'; there are size, tree, speedup, tau"),
        (
            "table.json,table.json trees",
            "two of the results are alike in target, drafter, device, costs, dtype, temperature, limits: give one",
        ),
        ("table.json,other.json trees batches=2", "nothing was searched for batches 2; there are 1, 64"),
        ("check.json,check.json checks", "a table of checks is made from one file, not 2"),
        ("table.json,lost.json trees", "lost.json: no such file"),
    ],
)
def test_what_a_result_does_not_have_is_named(tmp_path: Path, words: str, said: str, capsys):
    (tmp_path / "compare.json").write_text(json.dumps(COMPARED))
    (tmp_path / "bench.json").write_text(json.dumps(BENCHED))
    (tmp_path / "table.json").write_text(json.dumps(TABLED))
    (tmp_path / "other.json").write_text(json.dumps(made_with(TABLED, costs={"drafter": "medusa", "device": "v5p"})))
    (tmp_path / "check.json").write_text(json.dumps(CHECKED))
    (tmp_path / "peers.json").write_text(json.dumps(PEERED))
    document = tmp_path / "page.md"
    document.write_text(f"<!-- table: {words} -->\n<!-- end -->\n")
    assert main(["report", "--markdown", str(document)]) == EXIT_FAILED
    assert said in capsys.readouterr().err
