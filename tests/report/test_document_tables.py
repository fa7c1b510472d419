"""Tables of documents: made from results, idempotent, checked, and refused in a sentence where a comment is wrong."""

import json
from pathlib import Path

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
