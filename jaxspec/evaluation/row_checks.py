"""Invariants of an evaluation's rows: what must hold whatever was measured, and what is wrong where it does not."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxspec.evaluation.equivalence import NEAR_TIE
from jaxspec.evaluation.rows import PLAIN, AskedQuestion, Evaluation, Row

OF_ERRORS = ("id", "task", "turn", "arm", "temperature", "seed", "prompt_tokens", "prompt_hash", "error")
"""Fields that a row with an error has; all others are at their default."""
FILLED = 0.95
"""Least share of the wall time of an arm's batches that their prefill and their rounds fill."""
EXACT_RULE = "target-draw"
"""The rule whose text is plain decoding's above temperature 0 too."""
ROUNDING = 1e-6
"""Seconds by which readings of a clock may be off."""


def check(evaluation: Evaluation) -> list[str]:
    """Returns a sentence for everything in a file of rows that cannot be; none for a sound file.

    A sound file may be partial: a run is still writing it, or has left it (`partial`).
    """
    asked = evaluation.asked
    found = [f"{_named(row)}: {problem}" for row in evaluation.rows for problem in _row(row, evaluation, asked)]
    return [
        *found,
        *_twice(evaluation.rows),
        *_paired(evaluation),
        *_prompts(evaluation.rows),
        *_groups(evaluation),
        *(f"{_place(*one)}: has no row, and later ones are there" for one in _lacking(evaluation)[0]),
    ]


def partial(evaluation: Evaluation) -> str | None:
    """Returns a sentence about what a run has not answered yet; None where it has answered all that it asked."""
    left = _lacking(evaluation)[1]
    if not left:
        return None
    turns, first = len({row.key[1:] for row in evaluation.rows}), _place(*left[0])
    return f"is partial: has rows of {turns:,} turns and none of {len(left):,}, such as {first}; its command goes on"


def comparable(facts: Mapping[str, Any], temperature: float) -> bool:
    """Returns whether an arm's text must be that of plain decoding, token for token."""
    return facts.get("tree") is None or temperature == 0 or facts.get("rule") == EXACT_RULE


def _row(row: Row, evaluation: Evaluation, asked: Mapping[str, AskedQuestion]) -> Iterator[str]:
    """Yields what is wrong with one row by itself."""
    facts, question = evaluation.arms.get(row.arm), asked.get(row.id)
    if facts is None:
        yield "is of an arm that the first line does not name"
        return
    if question is None:
        yield "is of a question that the first line does not name"
    elif row.task != question.task:
        yield f"is of the task {row.task}, and its question of {question.task}"
    elif not 0 <= row.turn < question.turns:
        yield f"is of a question that has {question.turns} turns"
    if (row.temperature, row.seed) not in evaluation.passes:
        yield "is of a temperature and seed that the first line does not name"
    if row.error:
        fields = [f for f in dataclasses.fields(row) if f.name not in OF_ERRORS]
        if filled := [f.name for f in fields if getattr(row, f.name) != f.default]:
            yield f"has an error and yet {', '.join(filled)}"
        return
    yield from _counts(row, int(facts["depth"]), int(facts["nodes"]))
    yield from _ending(row, evaluation.settings)
    yield from _times(row, evaluation.settings)
    exact = comparable(facts, row.temperature)
    if exact != (row.identical is not None):
        yield f"says identical={row.identical}, and its rule {'keeps' if exact else 'does not keep'} plain's text"


def _counts(row: Row, depth: int, nodes: int) -> Iterator[str]:
    """Yields what is wrong with the tokens of a row's target calls."""
    length, calls = row.length, row.calls
    if sum(row.emitted) + 1 != length:
        yield f"emits {sum(row.emitted)} tokens and one by prefill, and has {length}"
    counts = {"accepted": row.accepted, "drafted": row.drafted, "levels of": row.levels}
    if short := next((name for name, found in counts.items() if len(found) != calls), None):
        yield f"has {calls} target calls and {len(counts[short])} counts of {short} tokens"
        return
    if wrong := [a for a in row.accepted if not 0 <= a <= depth]:
        yield f"accepts {wrong[0]} tokens in a round of a tree that is {depth} deep"
    for j, (a, d, levels) in enumerate(zip(row.accepted, row.drafted, row.levels, strict=True)):
        if not 0 <= levels <= min(depth, d) or not d < nodes or (d > 0) != (levels > 0):
            yield f"round {j} drafts {d} tokens {levels} deep, which a tree of {nodes} nodes, {depth} deep, cannot"
            break
        if a > levels:
            yield f"round {j} accepts {a} tokens of drafts that are {levels} deep"
            break
    if wrong := [j for j, (e, a) in enumerate(zip(row.emitted[:-1], row.accepted, strict=False)) if e != a + 1]:
        yield f"round {wrong[0]} emits {row.emitted[wrong[0]]} tokens and accepts {row.accepted[wrong[0]]}"
    if calls and not 1 <= row.emitted[-1] <= row.accepted[-1] + 1:
        yield f"its last round emits {row.emitted[-1]} tokens and accepts {row.accepted[-1]}"
    if row.rejected and len(row.rejected) != calls:
        yield f"has {calls} target calls and the rejected drafts of {len(row.rejected)}"
    elif wrong := [j for j, (a, r) in enumerate(zip(row.accepted, row.rejected, strict=False)) if a + len(r) > depth]:
        yield f"round {wrong[0]} accepts and rejects more drafts than its tree is deep"
    if calls < math.ceil((length - 1) / (depth + 1)):
        yield f"has {calls} target calls for {length} tokens, which a tree {depth} deep cannot"
    if row.arm == PLAIN and calls != length - 1:
        yield f"is plain decoding of {length} tokens in {calls} target calls"


def _ending(row: Row, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with how a row ends."""
    stops = set(settings["stop_ids"])
    budget = min(settings["max_new_tokens"], settings["max_positions"] - row.prompt_tokens)
    if not row.tokens:
        yield "has no token"
        return
    if any(t in stops for t in row.tokens[:-1]):
        yield "goes on behind a stop id"
    if row.length > budget:
        yield f"has {row.length} tokens, more than its budget of {budget}"
    if row.finish not in ("stop", "length"):
        yield f"ended by {row.finish!r}, which is neither stop nor length"
    elif row.finish == "stop" and row.tokens[-1] not in stops:
        yield f"stopped at {row.tokens[-1]}, which is no stop id"
    elif row.finish == "length" and row.tokens[-1] in stops:
        yield f"ended by its length at {row.tokens[-1]}, which is a stop id"
    elif row.finish == "length" and row.length < budget:
        yield f"ended by its length with {row.length} tokens, and its budget is {budget}"


def _times(row: Row, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with a row's times."""
    repeats, slots = settings["repeats"], settings.get("slots")
    wanted = {"prefill_seconds": repeats, "decode_seconds": repeats, "wall_seconds": repeats}
    wanted["own_latency"] = repeats if slots else 0
    for name, count in wanted.items():
        found = getattr(row, name)
        if len(found) != count:
            yield f"has {len(found)} values of {name}, and the run has {count}"
        if not all(math.isfinite(s) and s >= 0 for s in found):
            yield f"has a value of {name} that is negative or not finite"
    parts = list(zip(row.prefill_seconds, row.decode_seconds, row.wall_seconds, strict=False))
    if over := next(((p + d, w) for p, d, w in parts if p + d > w + ROUNDING), None):
        yield f"has {over[0]:.6g} s of prefill and rounds in {over[1]:.6g} s of wall time"
    if any(own > whole + ROUNDING for own, whole in zip(row.own_latency, row.decode_seconds, strict=False)):
        yield "took longer than the whole of its slots"


def _twice(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the rows that are there twice."""
    first = {row.key: row for row in reversed(rows)}
    for key, count in Counter(row.key for row in rows).items():
        if count > 1:
            yield f"{_named(first[key])}: stands {count} times"


def _paired(evaluation: Evaluation) -> Iterator[str]:
    """Yields what differs between the arms' rows of one answer that must be equal."""
    by_arm: dict[str, dict[Any, Row]] = {arm: {} for arm in evaluation.arms}
    for row in evaluation.rows:
        by_arm.get(row.arm, {})[row.key[1:]] = row
    plain = by_arm.get(PLAIN, {})
    for row in plain.values():
        if not row.error and (not row.identical or row.divergence is not None):
            yield f"{_named(row)}: is plain decoding, and says that its tokens are others"
    for arm, mine in by_arm.items():
        if arm == PLAIN:
            continue
        for key in sorted(plain.keys() ^ mine.keys()):
            there, lacking = (PLAIN, arm) if key in plain else (arm, PLAIN)
            yield f"{_named((plain | mine)[key])}: has a row of {there} and none of {lacking}"
        for key in sorted(plain.keys() & mine.keys()):
            yield from (f"{_named(mine[key])}: {problem}" for problem in _against(mine[key], plain[key]))


def _against(row: Row, plain: Row) -> Iterator[str]:
    """Yields what is wrong with a row beside the plain row of the same answer."""
    if (row.prompt_hash, row.prompt_tokens) != (plain.prompt_hash, plain.prompt_tokens):
        yield "has another prompt than plain decoding"
    if row.error != plain.error:
        yield f"has the error {row.error!r}, and plain decoding has {plain.error!r}"
    if row.error or plain.error:
        return
    same = row.tokens == plain.tokens
    if row.divergence is not None and (same or row.identical is None):
        yield f"says that it parts from plain decoding, and its tokens {'do not' if same else 'need not be the same'}"
        return
    if row.identical is None:
        return
    if same != row.identical:
        yield f"says identical={row.identical}, and its tokens {'are' if same else 'are not'} those of plain decoding"
    if same:
        return
    if row.divergence is None:
        yield "differs from plain decoding and does not say where"
        return
    index, margin = row.divergence
    first = next(n for n, (a, b) in enumerate(itertools.zip_longest(row.tokens, plain.tokens)) if a != b)
    if index != first:
        yield f"does not part from plain decoding at token {index}, as it says, but at {first}"
    if not 0 <= margin < NEAR_TIE:
        yield f"parts from plain decoding at token {index} by a margin of {margin:.3g}, which no rounding explains"


def _prompts(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the questions whose first turn is not the same prompt in all passes."""
    known: dict[str, str] = {}
    told = set()
    for row in rows:
        if row.turn == 0 and known.setdefault(row.id, row.prompt_hash) != row.prompt_hash and row.id not in told:
            told.add(row.id)
            yield f"question {row.id}: its rows do not have one prompt"


def _groups(evaluation: Evaluation) -> Iterator[str]:
    """Yields the batches whose rows do not agree about it, and the arms whose batches have time that nothing filled."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in evaluation.rows:
        if not row.error:
            groups.setdefault((row.arm, row.temperature, row.seed, row.group), []).append(row)
    most = math.inf if evaluation.settings.get("slots") else evaluation.settings["batch"]
    parts: dict[str, float] = {}
    walls: dict[str, float] = {}
    for (arm, temperature, seed, name), mine in groups.items():
        of = f"arm {arm}, temperature {temperature:g}, seed {seed}, batch {name}"
        facts = {
            tuple(map(repr, (r.group_rows, r.group_calls, r.prefill_seconds, r.decode_seconds, r.wall_seconds)))
            for r in mine
        }
        if len(facts) > 1 or len(mine) != mine[0].group_rows:
            yield f"{of}: its {len(mine)} rows do not agree about its size or its time"
        elif len(mine) > most:
            yield f"{of}: has {len(mine)} rows, and batches of this run have {most} at most"
        elif max(r.calls for r in mine) != mine[0].group_calls:
            yield f"{of}: says {mine[0].group_calls} target calls, and its longest row has {max(r.calls for r in mine)}"
        parts[arm] = parts.get(arm, 0.0) + sum(mine[0].prefill_seconds) + sum(mine[0].decode_seconds)
        walls[arm] = walls.get(arm, 0.0) + sum(mine[0].wall_seconds)
    for arm, wall in walls.items():
        if parts[arm] < FILLED * wall:
            yield f"arm {arm}: prefill and rounds fill {parts[arm]:.4g} of {wall:.4g} s of wall time, less than 95 %"


Turn = tuple[tuple[float, int], str, int]
"""Pass, question and number of a turn."""


def _lacking(evaluation: Evaluation) -> tuple[list[Turn], list[Turn]]:
    """Returns the turns without a row: those before the last turn that has one, and those that may follow."""
    failed = {row.key[1:]: bool(row.error) for row in evaluation.rows}
    lacking: list[tuple[tuple[int, int], Turn]] = []
    last = (0, 0)
    for number, one in enumerate(evaluation.passes):
        for question in evaluation.asked.values():
            for turn in range(question.turns):
                error = failed.get((*one, question.id, turn))
                if error is None:
                    lacking.append(((number, turn), (one, question.id, turn)))
                else:
                    last = max(last, (number, turn))
                if error:
                    break  # a question whose turn failed has no later one
    # Passes follow each other, and in a pass turns do; within a turn batches come by length.
    return [turn for place, turn in lacking if place < last], [turn for place, turn in lacking if place >= last]


def _named(row: Row) -> str:
    return f"arm {row.arm}, {_place((row.temperature, row.seed), row.id, row.turn)}"


def _place(of: tuple[float, int], id: str, turn: int) -> str:
    return f"temperature {of[0]:g}, seed {of[1]}, question {id}, turn {turn}"
