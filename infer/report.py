"""Write one page about evaluations: tables with intervals, plots, answers coloured by round, where drafts do not help.

RUNS are folders of `jaxspec evaluate`, or their rows.jsonl. The page is one HTML file that loads nothing; all figures
follow from the rows. With --markdown, write the tables of a document instead, or with --check say whether they are
current.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from jaxspec.console import cli, marks, results
from jaxspec.pages.pictures import check_page_flags, write_page
from jaxspec.parallel.agreement import say
from jaxspec.report.documents import renew
from jaxspec.report.given_files import GivenFiles, read_given
from jaxspec.report.page import AnswerTexts, PageOrigin, make_page
from jaxspec.report.pieces import choose_answers, load_tokenizer, pieces_of
from jaxspec.report.runs import Report, load_runs
from jaxspec.report.tables import broken_invariants


@dataclass(frozen=True, kw_only=True)
class Args:
    """Command line of `jaxspec report`."""

    runs: marks.Positional[tuple[str, ...]] = ()
    """Folders of jaxspec evaluate, or files of rows. Runs with other batches give a map of batches."""
    out: Path | None = None
    """The page, a file that ends in .html."""
    png: Path | None = None
    """Folder for pictures of the page and of every figure; needs Chromium."""
    bench: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Result of jaxspec bench decode --json, for the parts of a round; repeat the flag for more."""
    lab: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Acceptance profile (.npz) for calibration, or result of jaxspec lab search or lab table --json for predicted
    trees; repeat the flag for more."""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Question whose answer is shown coloured by round, by its id or TASK/ID; repeat the flag for more. Default: one
    of each of four tasks."""
    target: str | None = None
    """Place of the target whose tokenizer decodes the answers. Default: the one that the run names."""
    markdown: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Document whose tables are written anew from the results that they name; repeat the flag for more."""
    check: bool = False
    """With --markdown: write nothing, and fail where a document is not current."""
    json: Path | None = None
    """Write the result to this file."""

    def __post_init__(self) -> None:
        if self.markdown:
            if given := [n for n in ("runs", "out", "png", "bench", "lab", "text", "target") if getattr(self, n)]:
                raise ValueError(f"--markdown writes a document; it takes no {given[0]}")
            return
        if self.check:
            raise ValueError("--check is of documents: name one with --markdown FILE.md")
        if not self.runs:
            raise ValueError("a report needs a run: give the folder of jaxspec evaluate --out, or --markdown FILE.md")
        if self.out is None:
            raise ValueError("--out is missing: name the page, such as --out report.html")
        check_page_flags(self.out, self.png)
        for name in ("bench", "lab", "text"):
            given = getattr(self, name)
            if twice := [one for one in given if given.count(one) > 1]:
                raise ValueError(f"--{name} {twice[0]} is given twice; give each once")


def main(argv: Sequence[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec report", description=__doc__ or "")
    if args.markdown:
        return write_documents(args, started)
    assert args.out is not None
    given, report = read_given(args.bench, args.lab), load_runs(args.runs)
    texts = find_texts(args, report)
    command = shlex.join(["jaxspec", "report", *argv])
    page = make_page(report, given, texts, PageOrigin(command, results.versions()))
    pictures = write_page(args.out, page, args.png)
    if texts.lacking:
        sys.stdout.write(f"{texts.lacking}\n")
    for run in report.runs:
        if run.problems:
            say(f"warning: {run.name}: do not trust its figures: {broken_invariants(run)}")
    if args.json is not None:
        results.write_json(args.json, make_result(args, report, (given, texts), pictures, started))
    return 0


def find_texts(args: Args, report: Report) -> AnswerTexts:
    """Returns the answers to show, of the fastest method at the lowest temperature where drafts were measured.

    Without the target's tokenizer there are none, and the reason is told. Raises ValueError for a question that no run
    has.
    """
    best = next(((t, m) for t in report.temperatures if (m := report.best(t)) is not None), None)
    if best is None:
        return AnswerTexts(lacking="No text is shown: no method with drafts was measured.")
    temperature, method = best
    rows = choose_answers(method.rows(temperature), args.text)
    try:
        tokenizer = load_tokenizer(method.run.settings, args.target)
    except (ValueError, OSError) as error:
        reason = cli.sentence(error).rstrip(".")
        return AnswerTexts(lacking=f"No text is shown: {reason}. Name the target's place with --target.")
    try:
        for row in rows:
            pieces_of(row, tokenizer)
    except ValueError as error:
        return AnswerTexts(lacking=f"No text is shown: {cli.sentence(error)}")
    return AnswerTexts(rows, tokenizer, method.label)


def make_result(
    args: Args, report: Report, read: tuple[GivenFiles, AnswerTexts], pictures: list[Path], started: float
) -> dict[str, Any]:
    """Returns the verb's JSON."""
    given, texts = read
    return results.result(
        "report",
        dtype=str(report.runs[0].settings.get("dtype")),
        seed=None,
        started=started,
        page=args.out,
        pictures=pictures,
        runs=[
            {
                "run": run.name,
                "rows": run.path,
                "sha256": run.sha256,
                "problems": list(run.problems),
                "failed": len(run.failed),
                "summary": list(run.summary),
            }
            for run in report.runs
        ],
        best=[
            {"temperature": t, "method": None if (best := report.best(t)) is None else best.label}
            for t in report.temperatures
        ],
        texts=[row.unit for row in texts.rows],
        texts_lacking=texts.lacking or None,
        left_out=list(given.left_out),
    )


def write_documents(args: Args, started: float) -> int:
    """Writes the tables of documents, or only compares them; returns the exit code."""
    changed = {path: renew(path, write=not args.check) for path in args.markdown}
    stale = [str(path) for path, one in changed.items() if one.changed]
    if args.json is not None:
        rows = [{"document": path, "tables": one.tables, "changed": one.changed} for path, one in changed.items()]
        results.write_json(
            args.json, results.result("report", dtype="float32", seed=None, started=started, documents=rows)
        )
    if args.check and stale:
        raise ValueError(f"not current: {', '.join(stale)}; write the tables with jaxspec report --markdown FILE.md")
    for path, one in changed.items():
        word = "current" if args.check or not one.changed else "written"
        sys.stdout.write(f"{path}: {one.tables} tables, {word}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
