"""Rows of an evaluation: an answer of one arm to one turn of a question, with the tokens of every target call.

All figures are computed from rows alone (`metrics`), and what must hold of them is asserted from them (`row_checks`).
A file of rows has its settings in its first line: JSON Lines, so a stopped run goes on and files can be joined.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.data import jsonl
from jaxspec.decoding.answers import Answer

FORMAT = "jaxspec-evaluation/2"
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
    drafted: tuple[int, ...] = ()
    """`d_j`: drafted tokens that each verified. Rounds of adaptive trees and of prompt lookup may verify none."""
    levels: tuple[int, ...] = ()
    """`l_j`: depth of the deepest of them; of a chain it is `d_j`."""
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
    wall_seconds: tuple[float, ...] = ()
    """From before prefill to behind the last round, in each repeat: what the two above must fill."""
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


class Rounds(NamedTuple):
    """Counts of an answer's target calls, named as the fields of a row."""

    emitted: tuple[int, ...]
    accepted: tuple[int, ...]
    drafted: tuple[int, ...]
    levels: tuple[int, ...]


def rounds_of(answer: Answer) -> Rounds:
    """Returns `e_j`, `a_j`, `d_j` and `l_j` of an answer's target calls.

    Every call but the last gives one token more than it accepts; what the last accepts is what is left of the count.
    """
    emitted = np.bincount(answer.call_of, minlength=answer.calls + 1)[1:]
    total = int(np.dot(np.arange(len(answer.accepted)), answer.accepted))
    accepted = [int(e) - 1 for e in emitted[:-1]]
    accepted += [total - sum(accepted)] if len(emitted) else []
    drafted, levels = (tuple(answer.drafted[:, i].tolist()) for i in (0, 1))
    return Rounds(tuple(int(e) for e in emitted), tuple(accepted), drafted, levels)


def to_record(row: Row) -> dict[str, Any]:
    """Returns the row as a JSON object; fields at their default are left out."""
    found = {f.name: (getattr(row, f.name), f.default) for f in dataclasses.fields(Row)}
    return {name: list(v) if isinstance(v, tuple) else v for name, (v, default) in found.items() if v != default}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, float) or _whole(value)


def _time(value: Any) -> bool:
    return value is None or _real(value)  # JSON has no NaN: null stands for it


def _listed(holds: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and all(map(holds, value))


_WHOLES = functools.partial(_listed, _whole)
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "str": (lambda value: isinstance(value, str), "text"),
    "int": (_whole, "whole number"),
    "float": (_real, "number"),
    "tuple[int, ...]": (_WHOLES, "list of whole numbers"),
    "tuple[float, ...]": (functools.partial(_listed, _time), "list of numbers"),
    "tuple[tuple[int, ...], ...]": (functools.partial(_listed, _WHOLES), "list of lists of whole numbers"),
    "bool | None": (lambda value: value is None or isinstance(value, bool), "true, false or null"),
    "tuple[int, float] | None": (
        lambda v: v is None or (isinstance(v, list) and len(v) == 2 and _whole(v[0]) and _time(v[1])),
        "pair of a place and a margin",
    ),
}
"""Type of a field as it is written in `Row` -> whether a value of a JSON object is of it, and its name."""


def from_record(record: Mapping[str, Any]) -> Row:
    """Returns the row of a JSON object. Raises ValueError naming a field that is missing, unknown or no such value."""
    fields = {f.name: f for f in dataclasses.fields(Row)}
    if stranger := next((name for name in record if name not in fields), None):
        raise ValueError(f"has a field {stranger!r} that rows do not have")
    if missing := next((n for n in ("id", "task") if n not in record), None):
        raise ValueError(f"has no {missing!r}")
    types = {name: _TYPES[str(fields[name].type)] for name in record}
    if wrong := next((name for name, value in record.items() if not types[name][0](value)), None):
        raise ValueError(f"{wrong!r} is no {types[wrong][1]}")
    given = {name: _frozen(value) for name, value in record.items()}
    return Row(**given)


def _frozen(value: Any) -> Any:
    """Returns a value of a JSON object with its lists as tuples, in which NaN stands again for null."""
    if not isinstance(value, list):
        return value
    return tuple(float("nan") if one is None else _frozen(one) for one in value)


class AskedQuestion(NamedTuple):
    """A question of the run, as the first line of a file names it."""

    id: str
    task: str
    turns: int


class Evaluation(NamedTuple):
    """A file of rows."""

    settings: Mapping[str, Any]
    """Of the run, with `arms`: name -> facts of each arm (`nodes`, `depth`, `tree`, `drafter`, `rule`, `cost`);
    `asked`: an `AskedQuestion` a question; `passes`: every temperature with each of its seeds."""
    rows: Sequence[Row]

    @property
    def asked(self) -> dict[str, AskedQuestion]:
        """The questions of the run by id."""
        return {question[0]: AskedQuestion(*question) for question in self.settings["asked"]}

    @property
    def passes(self) -> list[tuple[float, int]]:
        """Temperature and seed of every pass over the questions, in the order of the run."""
        return [(temperature, seed) for temperature, seed in self.settings["passes"]]

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
    if problem := _refused(lines[0]):
        raise ValueError(f"{path}: {problem}: make the file anew with jaxspec evaluate")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            rows.append(from_record(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return Evaluation(lines[0], rows)


def _are(count: int, kinds: Sequence[Callable[[Any], bool]], value: Any) -> bool:
    """Returns whether a value is a list of at least `count` lists with a part of each of these kinds."""
    whole = isinstance(value, list) and len(value) >= count
    return whole and all(
        isinstance(one, list) and len(one) == len(kinds) and all(k(x) for k, x in zip(kinds, one, strict=True))
        for one in value
    )


def _are_arms(value: Any) -> bool:
    """Returns whether a value has facts of arms by name."""
    named = isinstance(value, dict) and all(isinstance(facts, dict) for facts in value.values())
    return named and all(_whole(facts.get(name)) for facts in value.values() for name in ("depth", "nodes"))


_text = _TYPES["str"][0]
_NEEDED: dict[str, Callable[[Any], bool]] = {
    "arms": _are_arms,
    "asked": functools.partial(_are, 1, (_text, _text, _whole)),
    "passes": functools.partial(_are, 1, (_real, _whole)),
    "max_new_tokens": _whole,
    "max_positions": _whole,
    "repeats": _whole,
    "batch": _whole,
    "stop_ids": _WHOLES,
}
"""Settings that rows are read and checked with -> whether a value can be that."""


def _refused(settings: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with a first line; None where nothing is."""
    if missing := next((name for name in _NEEDED if name not in settings), None):
        return f"its first line has no {missing!r}"
    wrong = next((name for name, holds in _NEEDED.items() if not holds(settings[name])), None)
    return None if wrong is None else f"{wrong!r} of its first line cannot be read"
