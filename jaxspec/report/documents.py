"""Tables of documents, made from results of verbs that are kept beside them: `KINDS` names the verbs.

A table stands between two comments, and is written anew from the file that the first one names:

    <!-- table: docs/results/NAME.json KIND OPTION=VALUE ... -->
    <!-- end -->

Results of some kinds may stand together: `A.json,B.json trees`.
"""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxspec.console.disk import writing
from jaxspec.evaluation.rows import PLAIN
from jaxspec.report import arm_table, check_table, peer_table, quickstart_table, recipe_table, step_table, tree_table
from jaxspec.report.given_files import read_result
from jaxspec.report.runs import ALL
from jaxspec.report.wording import (
    at_temperature,
    counted,
    device,
    figure_names,
    identical,
    known,
    per_second,
    spoken,
    spread,
)

BEGIN = re.compile(r"<!--\s*table:\s*(?P<words>.*?)\s*-->\s*")
END = re.compile(r"<!--\s*end\s*-->\s*")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
COLUMNS = 120

Figure = Callable[[Mapping[str, Any]], str]
"""Figures of a method (`metrics.summarize`) -> the text of a cell."""
FIGURES: dict[str, tuple[str, Figure]] = {
    "tau_micro": ("tau", lambda f: spread(f, "tau_micro")),
    "tau_macro": ("tau, mean of answers", lambda f: spread(f, "tau_macro")),
    "speedup": ("x plain", lambda f: spread(f, "speedup")),
    "decode_speedup": ("x plain, prefill out", lambda f: spread(f, "decode_speedup")),
    "tokens_per_second": ("tokens/s", lambda f: _number(f["tokens_per_second"])),
    "efficiency": ("efficiency", lambda f: f"{f['efficiency']:.2f}" if known(f["efficiency"]) else "-"),
    "answers": ("answers", lambda f: f"{f['answers']:,}"),
    "identical": ("identical", identical),
}
"""Name of a figure in an option -> its column and its text."""


class Renewed(NamedTuple):
    """A document whose tables were compared with their results."""

    tables: int
    changed: bool
    """Whether a table was not current."""


Made = tuple[Sequence[str], Sequence[Sequence[str]], str]
"""Columns, lines, and what their numbers depend on."""


class AskedTable(NamedTuple):
    """A table as a comment asks for it."""

    files: Sequence[Path]
    kind: str
    options: Mapping[str, str]


def renew(document: Path, *, write: bool) -> Renewed:
    """Returns the tables of a document and whether one was not current; `write` puts the current ones in.

    Raises ValueError naming the line of a comment that cannot be followed.
    """
    if not document.is_file():
        raise ValueError(f"{document}: there is no such document")
    with document.open(encoding="utf-8", newline="") as file:
        text = file.read()
    ending = "\r\n" if "\r\n" in text else "\n"
    tables, lines = _with_tables(document, text.split(ending))
    new = ending.join(lines)
    if write and new != text:
        with writing(document), document.open("w", encoding="utf-8", newline="") as file:
            file.write(new)
    return Renewed(tables, new != text)


def _with_tables(document: Path, lines: Sequence[str]) -> tuple[int, list[str]]:
    """Returns the number of tables and the lines of a document with current tables."""
    kept: list[str] = []
    count, begun, fence = 0, 0, ""
    for number, line in enumerate(lines, 1):
        if begun:
            if END.fullmatch(line):
                begun = 0
                kept.append(line)
            elif BEGIN.fullmatch(line):
                raise ValueError(f"{document}:{begun}: this table has no <!-- end --> before the next one begins")
            continue
        mark = FENCE.match(line)
        if mark is not None and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        kept.append(line)
        if fence:
            continue
        if END.fullmatch(line):
            raise ValueError(f"{document}:{number}: an <!-- end --> without a <!-- table: ... --> before it")
        if (found := BEGIN.fullmatch(line)) is not None:
            try:
                kept += ["", *_table(document, found["words"]), ""]
            except ValueError as error:
                raise ValueError(f"{document}:{number}: {error}") from error
            begun, count = number, count + 1
    if begun:
        raise ValueError(f"{document}:{begun}: this table has no <!-- end -->")
    return count, kept


def _table(document: Path, words: str) -> list[str]:
    asked = _asked(document, words)
    kind = KINDS[asked.kind]
    results = [read_result(file, (kind.verb,)) for file in asked.files]
    for file, found in zip(asked.files, results, strict=True):
        if not isinstance(found.get(kind.key), list) or not found[kind.key]:
            raise ValueError(f"{file}: has no figures; give the result of jaxspec {kind.verb}")
    try:
        if len(results) > 1 and kind.together is not None:
            columns, rows, about = kind.together(asked.options, results)
        else:
            columns, rows, about = kind.make(asked.options, results[0])
    except (KeyError, TypeError) as error:
        names = " or ".join(map(str, asked.files))
        raise ValueError(f"{names}: lacks a figure or setting ({error}); make it again") from error
    below = f"{about} {', '.join(f'[{file.name}]({_link(document, file)})' for file in asked.files)}"
    return [*_markdown(columns, rows), "", *textwrap.wrap(below, COLUMNS, break_long_words=False,
                                                         break_on_hyphens=False)]  # fmt: skip


def _asked(document: Path, words: str) -> AskedTable:
    """Returns what a comment asks for. Raises ValueError naming the word that is wrong."""
    try:
        name, kind, *rest = shlex.split(words)
    except ValueError:
        raise ValueError("a table needs a file and a kind: <!-- table: docs/results/NAME.json tasks -->") from None
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} of tables; there are {' and '.join(KINDS)}")
    options = {}
    for word in rest:
        key, equals, value = word.partition("=")
        if not equals or key not in KINDS[kind].options:
            raise ValueError(
                f"{word!r} is no option of {kind}; there are {', '.join(KINDS[kind].options)}, each with a value"
            )
        options[key] = value
    files = [_beside(document, one) for one in name.split(",")]
    if len(files) > 1 and KINDS[kind].together is None:
        several = " and ".join(name for name, made in KINDS.items() if made.together is not None)
        raise ValueError(f"a table of {kind} is made from one file, not {len(files)}; only {several} stand together")
    return AskedTable(files, kind, options)


def _beside(document: Path, name: str) -> Path:
    """Returns the file of a name that is relative to the document's folder, or to the nearest folder above that has
    it."""
    folder = document.resolve().parent
    for place in (folder, *folder.parents):
        if (place / name).is_file():
            return place / name
    raise ValueError(f"{name}: no such file, neither beside {document.name} nor in a folder above it")


def _temperatures(options: Mapping[str, str], summary: Sequence[Mapping[str, Any]]) -> list[float]:
    known_here = sorted({float(row["temperature"]) for row in summary})
    given = options.get("temperature")
    if given is None:
        return known_here
    if given not in [f"{t:g}" for t in known_here]:
        raise ValueError(f"nothing was measured at temperature {given}; there are {', '.join(map(str, known_here))}")
    return [float(given)]


def _by_method(options: Mapping[str, str], found: Mapping[str, Any]) -> Made:
    """Returns a line a method, at all temperatures or at one."""
    summary = found["summary"]
    by_default = "answers,tau_micro,tau_macro,speedup,tokens_per_second,identical"
    figures = [FIGURES[name] for name in figure_names(options, FIGURES, by_default)]
    task, warm = options.get("task", ALL), _temperatures(options, summary)
    if not any(row["task"] == task for row in summary):
        raise ValueError(f"there is no task {task!r}")
    rows = [
        [f"`{row['method']}`", *([at_temperature(t)] if len(warm) > 1 else []), *(told(row) for _, told in figures)]
        for t in warm
        for row in summary
        if row["task"] == task and row["temperature"] == t
    ]
    columns = ["method", *(["temperature"] if len(warm) > 1 else []), *(title for title, _ in figures)]
    return columns, rows, _about(found, warm)


def _by_task(options: Mapping[str, str], found: Mapping[str, Any]) -> Made:
    """Returns a line a task, with the figures of each method at one temperature, by default the lowest."""
    summary = found["summary"]
    figures = [FIGURES[name] for name in figure_names(options, FIGURES, "tau_micro,speedup")]
    temperature = _temperatures(options, summary)[0]
    here = {(row["task"], row["method"]): row for row in summary if row["temperature"] == temperature}
    known_methods = list(dict.fromkeys(m for _, m in here if m != PLAIN))
    methods = options["method"].split(",") if "method" in options else known_methods
    if stranger := next((m for m in methods if m not in [*known_methods, PLAIN]), None):
        raise ValueError(f"there is no method {stranger!r}; there are {', '.join(known_methods)}")
    rows = []
    for task in dict.fromkeys(task for task, _ in here):
        cells = [told(here[task, m]) if (task, m) in here else "-" for m in methods for _, told in figures]
        rows.append(["all tasks" if task == ALL else spoken(task), *cells])
    columns = ["task", *(f"`{m}` {title}" for m in methods for title, _ in figures)]
    return columns, rows, _about(found, [temperature])


def _about(found: Mapping[str, Any], temperatures: Sequence[float]) -> str:
    """Returns what stands below a table: everything that its numbers depend on."""
    beside = f"{found['slots']} slots" if found.get("slots") else f"batch {found['batch']}"
    failed = f" ({counted(found['failed'], 'failed turn')} left out)" if found.get("failed") else ""
    return (
        f"{found['questions']:,} questions of {found['prompts']}{failed}, target {Path(found['target']).name}, "
        f"{' and '.join(map(at_temperature, temperatures))}, {beside}, {found['dtype']}, up to "
        f"{found['max_new_tokens']:,} new tokens, {device(found['machine'])}; in brackets 95 % over conversations:"
    )


def _link(document: Path, file: Path) -> str:
    return Path(os.path.relpath(file, document.resolve().parent)).as_posix()


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    first = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in first]


def _number(value: Any) -> str:
    return per_second(value) if known(value) else "-"


class Kind(NamedTuple):
    """A kind of tables."""

    verb: str
    """The verb whose result it is made of."""
    key: str
    """The key of its figures."""
    options: Sequence[str]
    make: Callable[[Mapping[str, str], Mapping[str, Any]], Made]
    """Options and result -> the table. Raises ValueError naming an option that the result has nothing for."""
    together: Callable[[Mapping[str, str], Sequence[Mapping[str, Any]]], Made] | None = None
    """Options and several results -> one table; None: a table has one result."""


KINDS = {
    "methods": Kind("evaluate", "summary", ("figures", "task", "temperature"), _by_method),
    "tasks": Kind("evaluate", "summary", ("figures", "method", "temperature"), _by_task),
    "recipes": Kind("compare", "recipes", recipe_table.OPTIONS, recipe_table.by_recipe),
    "arms": Kind("bench decode", "rows", arm_table.OPTIONS, arm_table.by_arm),
    "peers": Kind("bench peers", "rows", peer_table.OPTIONS, peer_table.by_peer),
    "checks": Kind("lab check", "rows", check_table.OPTIONS, check_table.by_tree),
    "trees": Kind("lab table", "rows", tree_table.OPTIONS, tree_table.by_place, tree_table.by_result),
    "steps": Kind("bench train", "rows", step_table.OPTIONS, step_table.by_step),
    "quickstart": Kind(
        "quickstart",
        "accept_histogram",
        quickstart_table.OPTIONS,
        lambda options, found: quickstart_table.by_measure(options, [found]),
        quickstart_table.by_measure,
    ),
}
"""The kinds that a comment may name."""
