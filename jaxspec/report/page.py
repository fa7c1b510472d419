"""The page about evaluations: one file with every figure, table and text, which loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxspec.console.results import jsonable
from jaxspec.data.chat import ChatTokenizer
from jaxspec.evaluation.breakdown import POSITIONS
from jaxspec.evaluation.metrics import FORMULAS
from jaxspec.evaluation.rows import Row
from jaxspec.lab.acceptance_pictures import calibration_pictures
from jaxspec.pages.markup import Markup, element, joined
from jaxspec.pages.page import (
    DataTable,
    Extras,
    Picture,
    Section,
    bullets,
    document,
    facts,
    folded,
    grid,
    paragraph,
    table,
)
from jaxspec.report.coloured_text import SCRIPT, STYLE, coloured_answers
from jaxspec.report.cost_pictures import budget_pictures, other_batches, round_picture
from jaxspec.report.given_files import GivenFiles
from jaxspec.report.round_pictures import acceptance_pictures, along_pictures, has_bins, unmeasured
from jaxspec.report.runs import Report, differing
from jaxspec.report.speed_pictures import batch_pictures, speed_pictures
from jaxspec.report.tables import checks, lead, result_tables, where_not

TITLE = "Speculative decoding, evaluated"


class AnswerTexts(NamedTuple):
    """Answers to show as text, or the reason why there are none."""

    rows: Sequence[Row] = ()
    tokenizer: ChatTokenizer | None = None
    method: str = ""
    lacking: str = ""
    """A sentence; empty where texts are shown."""


class PageOrigin(NamedTuple):
    """The making of a page, which it ends with."""

    command: str
    versions: Mapping[str, Any]


def make_page(report: Report, given: GivenFiles, texts: AnswerTexts, origin: PageOrigin) -> str:
    """Returns the page."""
    temperatures = list(enumerate(report.temperatures, 1))
    speeds = [picture for n, t in temperatures for picture in speed_pictures(report, t, n)]
    along = [picture for n, t in temperatures for picture in along_pictures(report, t, n)]
    sections = [
        Section("tables", "Tasks and methods", result_tables(report)),
        Section("speed", "Speed", _or(speeds, "No method with drafts was measured.")),
        Section("against", "Where it does not help", where_not(report)),
        Section("acceptance", "Acceptance", _acceptance(report)),
        Section("along", "Along answers and prompts", joined(_short(report), _or(along, "No answer has a round."))),
        Section("batch", "Batch", _batch(report)),
        Section("cost", "Cost", _cost(report, given)),
        Section("texts", "Answers round by round", _texts(texts)),
        Section("checks", "Checks", checks(report)),
        Section("made", "How this page was made", _made(report, given, origin)),
    ]
    foot = "All figures follow from the files of rows named above."
    return document(TITLE, lead(report), sections, foot, _extras(report, texts))


def _extras(report: Report, texts: AnswerTexts) -> Extras:
    data = [
        {"run": run.name, "rows": run.path, "sha256": run.sha256, "settings": run.settings, "summary": run.summary}
        for run in report.runs
    ]
    script = SCRIPT if texts.rows and not texts.lacking else ""
    return Extras(STYLE, script, jsonable({"formulas": FORMULAS, "runs": data}))


def _or(pictures: Sequence[Picture], otherwise: str) -> Markup:
    return grid(pictures) if pictures else paragraph(otherwise)


def _acceptance(report: Report) -> Markup:
    """Returns the figures of every method; those of the fastest are open."""
    if not report.methods:
        return paragraph("No method with drafts was measured.")
    best = next((best for t in report.temperatures if (best := report.best(t)) is not None), None)
    blocks: list[Markup] = []
    for method in report.methods:
        shown = acceptance_pictures(method, report.tasks, report.temperatures)
        if shown and (best is None or method.label == best.label or len(report.methods) == 1):
            blocks.insert(0, joined(element("h3", method.label), grid(shown)))
        elif shown:
            blocks.append(folded(f"Acceptance of {method.label}", grid(shown)))
    if lacking := unmeasured(report.methods, report.temperatures):
        blocks.append(paragraph(f"Without an answer: {'; '.join(lacking)}.", soft=True))
    note = "Shares are of all rounds, before the cut at a stop id or the budget."
    return joined(*blocks, paragraph(note, soft=True))


def _short(report: Report) -> Markup | None:
    if has_bins(report):
        return None
    return paragraph(f"tau along the answer is left out: no answer is longer than {POSITIONS} tokens.", soft=True)


def _batch(report: Report) -> Markup:
    if shown := batch_pictures(report):
        return grid(shown)
    settings = report.runs[0].settings
    where = f"{settings['slots']} slots" if settings.get("slots") else f"a batch of {settings['batch']}"
    return paragraph(
        f"All answers were decoded in {where}. For a map of batches and the frontier, give runs of jaxspec evaluate "
        "with other batches."
    )


def _cost(report: Report, given: GivenFiles) -> Markup:
    """Returns the parts of a round, the budget and calibration, or says which file each of them needs."""
    blocks: list[Markup] = []
    lacking: list[str] = []
    if given.arms:
        blocks.append(grid([round_picture(given.arms)]))
    else:
        lacking.append("the parts of a round: --bench FILE, a result of jaxspec bench decode --json")
    if given.left_out:
        blocks.append(paragraph(f"Left out: {'; '.join(given.left_out)}.", soft=True))
    budgets = [p for n, t in enumerate(report.temperatures, 1) for p in budget_pictures(report, t, n, given.trees)]
    if budgets:
        blocks.append(grid(budgets))
    else:
        lacking.append("the budget of nodes: several trees of a drafter, or --lab FILE, a result of jaxspec lab table")
    if other := other_batches(report, given.trees):
        blocks.append(paragraph(f"{other:,} predicted trees are of a batch that no run has, and left out.", soft=True))
    curves = [p for n, (name, of) in enumerate(given.profiles, 1) for p in calibration_pictures(of, name, n)]
    if curves:
        blocks.append(grid(curves))
    elif given.profiles:
        lacking.append("calibration: a profile that holds draft probabilities")
    else:
        lacking.append("calibration: --lab FILE.npz, a profile of jaxspec lab profile")
    if lacking:
        blocks.append(paragraph("Not on this page, for want of a file:", soft=True))
        blocks.append(bullets(lacking))
    return joined(*blocks)


def _texts(texts: AnswerTexts) -> Markup:
    if texts.lacking or texts.tokenizer is None or not texts.rows:
        return paragraph(texts.lacking or "No text is shown: no answer has a round.")
    return coloured_answers(texts.rows, texts.tokenizer, texts.method)


# How it was made.


def _made(report: Report, given: GivenFiles, origin: PageOrigin) -> Markup:
    versions = [(name, str(value)) for name, value in origin.versions.items() if value is not None]
    return joined(
        element("h3", "Command"),
        element("pre", origin.command),
        element("h3", "Files"),
        table(_files(report, given)),
        *_differences(report),
        element("h3", "Arms"),
        table(_arms(report)),
        element("h3", "Formulas"),
        facts([(name.replace("_", " "), told) for name, told in FORMULAS.items()]),
        element("h3", "This page"),
        facts(versions),
        *(folded(f"All settings of {run.name}", facts(_settings(run.settings))) for run in report.runs),
    )


def _files(report: Report, given: GivenFiles) -> DataTable:
    rows = [[run.name, str(run.path), run.sha256, len(run.evaluation.rows)] for run in report.runs]
    rows += [["", path, f"{digest} ...", None] for path, digest in given.hashes]
    return DataTable("Files that were read", ["run", "file", "SHA-256", "rows"], rows)


def _differences(report: Report) -> list[Markup]:
    if len(report.runs) < 2:
        return []
    names = [run.name for run in report.runs]
    apart = [[name.replace("_", " "), *values] for name, values in differing(report.runs).items()]
    if not apart:
        return [paragraph("The runs have the same settings.")]
    return [table(DataTable("Settings that differ between the runs", ["setting", *names], apart))]


def _arms(report: Report) -> DataTable:
    keys = ("drafter", "tree", "nodes", "depth", "rule", "mode", "cost", "drafter_weights")
    rows = [[method.label, *(method.facts.get(key) for key in keys)] for method in [*report.plains, *report.methods]]
    return DataTable("Methods", ["method", *(key.replace("_", " ") for key in keys)], rows)


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    named = [(name, value) for name, value in settings.items() if name != "arms"]
    found = []
    for name, value in named:
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        found += [(" ".join(filter(None, (name, key))).replace("_", " "), _said(one)) for key, one in inner]
    return found


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
