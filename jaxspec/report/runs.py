"""Runs of `jaxspec evaluate` as a report reads them: rows, figures by task and method, and what sets them apart."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxspec.evaluation.arms import telling
from jaxspec.evaluation.metrics import summarize_all
from jaxspec.evaluation.row_checks import check, partial
from jaxspec.evaluation.rows import PLAIN, Evaluation, Row, read_evaluation

ALL = "all"
"""Name of all tasks together."""
COMPARABLE = ("target_weights", "tokenizer", "template", "prompts_sha256", "limit", "max_new_tokens", "stop_ids")
"""Settings without which answers of two runs are not those to the same questions."""
UNCOMPARED = ("format", "arms", "target", "prompts", "passes")
"""Settings that are shown in another place, or are names beside a hash."""


@dataclasses.dataclass(frozen=True, eq=False)
class ReportRun:
    """A file of rows with its name among others, and every figure that follows from it."""

    name: str
    path: Path
    sha256: str
    evaluation: Evaluation
    summary: Sequence[Mapping[str, Any]]
    problems: Sequence[str]
    """Sentences about invariants that do not hold."""
    partial: str | None = None
    """A sentence about turns that are not answered yet."""

    @functools.cached_property
    def settings(self) -> Mapping[str, Any]:
        """Settings that all rows share, without the list of questions."""
        return {name: value for name, value in self.evaluation.settings.items() if name != "asked"}

    @property
    def width(self) -> int:
        """Answers decoded side by side: those of a batch, or the slots."""
        return int(self.settings.get("slots") or self.settings["batch"])

    @functools.cached_property
    def tasks(self) -> list[str]:
        """Tasks of its rows."""
        return sorted({row.task for row in self.evaluation.rows})

    @functools.cached_property
    def temperatures(self) -> list[float]:
        """Temperatures of its rows."""
        return sorted({row.temperature for row in self.evaluation.rows})

    @property
    def failed(self) -> list[Row]:
        """Rows with an error, one a question and turn."""
        by_turn = {(row.id, row.turn): row for row in self.evaluation.rows if row.error}
        return list(by_turn.values())


class Method(NamedTuple):
    """An arm of a run."""

    run: ReportRun
    arm: str
    label: str
    """The arm's name; of several runs, the run's behind it."""
    look: int
    """Number of its colour and mark on the page."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Facts of the arm: `depth`, `nodes`, `drafter`, `tree`, `rule`, `cost`."""
        return self.run.evaluation.arms[self.arm]

    def rows(self, temperature: float, task: str = ALL) -> list[Row]:
        """Returns the rows without an error, in one order."""
        return self._rows(self.arm, temperature, task)

    def plain_rows(self, temperature: float, task: str = ALL) -> list[Row]:
        """Returns plain decoding's rows of the same run."""
        return self._rows(PLAIN, temperature, task)

    def _rows(self, arm: str, temperature: float, task: str) -> list[Row]:
        found = [
            row
            for row in self.run.evaluation.rows
            if row.arm == arm and row.temperature == temperature and task in (ALL, row.task) and not row.error
        ]
        return sorted(found, key=lambda row: row.key)

    def figures(self, temperature: float, task: str = ALL) -> Mapping[str, Any] | None:
        """Returns the figures of a task at a temperature (`metrics.summarize`); None where nothing was measured."""
        # With one task, `all` is that task.
        wanted = (task, ALL) if self.run.tasks == [task] else (task,)
        for row in self.run.summary:
            if row["method"] == self.arm and row["temperature"] == temperature and row["task"] in wanted:
                return row if row["answers"] else None
        return None


@dataclasses.dataclass(frozen=True)
class Report:
    """The runs that a page is about."""

    runs: Sequence[ReportRun]

    @property
    def methods(self) -> list[Method]:
        """Every arm with drafts of every run, in order."""
        found = [(run, arm) for run in self.runs for arm in run.evaluation.arms if arm != PLAIN]
        return [Method(run, arm, self._label(run, arm), i) for i, (run, arm) in enumerate(found)]

    @property
    def plains(self) -> list[Method]:
        """Plain decoding of every run; looks go on behind those of the methods."""
        first = len(self.methods)
        return [Method(run, PLAIN, self._label(run, PLAIN), first + i) for i, run in enumerate(self.runs)]

    def _label(self, run: ReportRun, arm: str) -> str:
        return arm if len(self.runs) == 1 else f"{arm} ({run.name})"

    @property
    def temperatures(self) -> list[float]:
        """All temperatures."""
        return sorted({temperature for run in self.runs for temperature in run.temperatures})

    @property
    def tasks(self) -> list[str]:
        """All tasks, without `all`."""
        return sorted({task for run in self.runs for task in run.tasks})

    def best(self, temperature: float, run: ReportRun | None = None) -> Method | None:
        """Returns the method of the greatest speed-up over all tasks, of one run or of all; None without one."""
        mine = [m for m in self.methods if run in (None, m.run)]
        known = [(m, f) for m in mine if (f := m.figures(temperature)) and math.isfinite(f["speedup"])]
        return max(known, key=lambda one: one[1]["speedup"])[0] if known else None


def load_runs(paths: Sequence[str]) -> Report:
    """Returns the runs of folders or files of rows, named by the part of their path that differs.

    Raises ValueError naming a path that is given twice, is none, or has no row.
    """
    files = [rows_file(path) for path in paths]
    if twice := next((p for p, f in zip(paths, files, strict=True) if files.count(f) > 1), None):
        raise ValueError(f"{twice} is given twice; give every run once")
    names = telling(paths) if len(paths) > 1 else [Path(paths[0]).resolve().name]
    return Report([_load(name, file) for name, file in zip(names, files, strict=True)])


def rows_file(path: str) -> Path:
    """Returns the file of rows of a folder, or the file itself."""
    found = Path(path)
    return found / "rows.jsonl" if found.is_dir() else found


def _load(name: str, file: Path) -> ReportRun:
    evaluation = read_evaluation(file)
    if not evaluation.rows:
        raise ValueError(f"{file}: has no row yet; let jaxspec evaluate end a first batch")
    arms = evaluation.settings.get("arms")
    if not isinstance(arms, Mapping) or PLAIN not in arms:
        raise ValueError(f"{file}: its first line names no arm {PLAIN!r}; speed-ups are over plain decoding")
    if stranger := next((row.arm for row in evaluation.rows if row.arm not in arms), None):
        raise ValueError(f"{file}: has rows of an arm {stranger!r} that its first line does not name")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    summary, problems = summarize_all(evaluation.rows, arms), check(evaluation)
    return ReportRun(name, file, digest, evaluation, summary, problems, partial(evaluation))


def differing(runs: Sequence[ReportRun]) -> dict[str, list[str]]:
    """Returns the settings in which runs differ: name -> the value of each run as text."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in UNCOMPARED)
    found = {}
    for name in names:
        values = [_text(run.settings.get(name)) for run in runs]
        if len(set(values)) > 1:
            found[name] = values
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def not_comparable(runs: Sequence[ReportRun]) -> list[str]:
    """Returns the settings whose difference means that runs did not answer the same questions alike."""
    return [name for name in differing(runs) if name in COMPARABLE]
