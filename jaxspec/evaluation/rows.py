"""Rows of an evaluation: an answer of one arm to one turn of a question, with the tokens of every target call.

All figures are computed from rows alone (`metrics`), and what must hold of them is asserted from them (`row_checks`).
A file of rows has its settings in its first line: JSON Lines, so a stopped run goes on and files can be joined.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.data import jsonl
from jaxspec.decoding.answers import Answer

FORMAT = "jaxspec-evaluation/1"
PLAIN = "plain"
"""Name of the arm that decodes without drafts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One answer. A row with an `error` has no figures."""

    id: str
    """Of the question."""
    task: str
    turn: int = 0
    arm: str = PLAIN
    temperature: float = 0.0
    seed: int = 0
    """Of the run; each question's own noise follows from it."""
    prompt_tokens: int = 0
    prompt_hash: str = ""
    """Of the prompt's token ids."""
    tokens: tuple[int, ...] = ()
    """The answer, a stop id included: `L` tokens."""
    finish: str = ""
    """`stop` or `length`."""
    emitted: tuple[int, ...] = ()
    """`e_j`: tokens that each of the `R` target calls behind prefill gave, after the cut at a stop id or the budget."""
    accepted: tuple[int, ...] = ()
    """`a_j`: drafted tokens that each accepted, before that cut."""
    rejected: tuple[tuple[int, ...], ...] = ()
    """For each of them the drafted tokens behind the accepted path, the first child at each depth; empty where they
    were not kept (`evaluate --rejected`)."""
    group: str = ""
    """The batch that it was decoded in."""
    group_rows: int = 1
    """Answers of that batch."""
    group_calls: int = 0
    """Target calls of that batch: those of its longest answer."""
    prefill_seconds: tuple[float, ...] = ()
    """Of the batch, in each repeat: from the prompt to the first token."""
    decode_seconds: tuple[float, ...] = ()
    """Of the batch's rounds, in each repeat; in slots of everything, prefill included."""
    own_latency: tuple[float, ...] = ()
    """In slots, in each repeat: seconds from when its prompt was read to its last token."""
    identical: bool | None = None
    """Whether the tokens are those of plain decoding; None where a rule keeps the distribution and not the text."""
    divergence: tuple[int, float] | None = None
    """Where they first differ, and by what margin of the target's two scores."""
    error: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """The work that the row is of: there is one row of each."""
        return self.arm, self.temperature, self.seed, self.id, self.turn

    @property
    def unit(self) -> str:
        """The conversation that is resampled as a whole."""
        return f"{self.task}/{self.id}"

    @property
    def length(self) -> int:
        """New tokens, `L`."""
        return len(self.tokens)

    @property
    def calls(self) -> int:
        """Target calls without the prefill call, `R`."""
        return len(self.emitted)

    @property
    def seconds(self) -> float:
        """The row's share of its batch's time, prefill included: the median of the repeats' totals."""
        totals = np.add(self.prefill_seconds or (np.nan,), self.decode_seconds or (np.nan,))
        return float(np.median(totals)) / self.group_rows

    @property
    def ttft(self) -> float:
        """Median seconds from the prompt to the first token of its batch; NaN in slots, where it is not told apart."""
        return float("nan") if self.own_latency else float(np.median(self.prefill_seconds or (np.nan,)))

    @property
    def own_seconds(self) -> float:
        """Median seconds of the rounds until this answer ended; those of a batch go on until its longest has.

        In slots, from when its prompt was read.
        """
        if self.own_latency:
            return float(np.median(self.own_latency))
        if not self.group_calls:
            return 0.0
        return float(np.median(self.decode_seconds or (np.nan,))) * self.calls / self.group_calls


def rounds_of(answer: Answer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns `e_j` and `a_j` of an answer's target calls.

    Every call but the last gives one token more than it accepts; what the last accepts is what is left of the count.
    """
    emitted = np.bincount(answer.call_of, minlength=answer.calls + 1)[1:]
    total = int(np.dot(np.arange(len(answer.accepted)), answer.accepted))
    accepted = [int(e) - 1 for e in emitted[:-1]]
    return tuple(int(e) for e in emitted), (*accepted, *([total - sum(accepted)] if len(emitted) else []))


def to_record(row: Row) -> dict[str, Any]:
    """Returns the row as a JSON object; fields at their default are left out."""
    found = {f.name: (getattr(row, f.name), f.default) for f in dataclasses.fields(Row)}
    return {name: list(v) if isinstance(v, tuple) else v for name, (v, default) in found.items() if v != default}


def from_record(record: Mapping[str, Any]) -> Row:
    """Returns the row of a JSON object. Raises ValueError naming a field that is missing or unknown."""
    fields = {f.name: f for f in dataclasses.fields(Row)}
    if stranger := next((name for name in record if name not in fields), None):
        raise ValueError(f"has a field {stranger!r} that rows do not have")
    if missing := next((n for n in ("id", "task") if n not in record), None):
        raise ValueError(f"has no {missing!r}")
    many = [name for name, field in fields.items() if isinstance(field.default, tuple)]
    if wrong := next((name for name in many if not isinstance(record.get(name, []), list)), None):
        raise ValueError(f"{wrong!r} is no list")
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items()}
    if "rejected" in given:
        given["rejected"] = tuple(map(tuple, given["rejected"]))
    return Row(**given)


class Evaluation(NamedTuple):
    """A file of rows."""

    settings: Mapping[str, Any]
    """Of the run, with `arms`: name -> facts of each arm (`nodes`, `depth`, `tree`, `drafter`, `rule`, `cost`)."""
    rows: Sequence[Row]

    @property
    def arms(self) -> Mapping[str, Mapping[str, Any]]:
        """Facts of the arms by name, the plain one first."""
        return self.settings["arms"]


def read_evaluation(path: str | Path) -> Evaluation:
    """Returns the rows of a file. Raises ValueError naming what is missing, or the line that is no row."""
    path = Path(path)
    path = path / "rows.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the folder of jaxspec evaluate --out, or its rows.jsonl")
    lines = jsonl.read_lines(path)
    if not lines or not isinstance(lines[0], dict) or lines[0].get("format") != FORMAT:
        raise ValueError(f"{path}: is not a file of rows: its first line does not say {FORMAT!r}")
    if missing := next((name for name in ("arms", "max_new_tokens") if name not in lines[0]), None):
        raise ValueError(f"{path}: its first line has no {missing!r}: make the file anew with jaxspec evaluate")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            rows.append(from_record(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return Evaluation(lines[0], rows)
