"""Invariants of an evaluation's rows: what must hold whatever was measured, and what is wrong where it does not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxspec.evaluation.equivalence import NEAR_TIE
from jaxspec.evaluation.rows import PLAIN, Evaluation, Row

FIGURES = ("tokens", "emitted", "accepted", "prefill_seconds", "decode_seconds", "finish")
"""Fields that a row with an error leaves empty."""


def check(evaluation: Evaluation) -> list[str]:
    """Returns a sentence for everything in a file of rows that cannot be; none for a sound file."""
    found = [f"{_named(row)}: {problem}" for row in evaluation.rows for problem in _row(row, evaluation)]
    return [*found, *_twice(evaluation.rows), *_paired(evaluation), *_groups(evaluation.rows)]


def _row(row: Row, evaluation: Evaluation) -> Iterator[str]:
    """Yields what is wrong with one row by itself."""
    facts = evaluation.arms.get(row.arm)
    if facts is None:
        yield "is of an arm that the first line does not name"
        return
    if row.error:
        if filled := [name for name in FIGURES if getattr(row, name)]:
            yield f"has an error and yet {', '.join(filled)}"
        return
    yield from _counts(row, int(facts["depth"]))
    yield from _ending(row, evaluation.settings)
    repeats = len(row.decode_seconds)
    seconds = (*row.prefill_seconds, *row.decode_seconds)
    if not repeats or len(row.prefill_seconds) != repeats:
        yield f"has {len(row.prefill_seconds)} times of prefill and {repeats} of its rounds"
    if not all(math.isfinite(s) and s >= 0 for s in seconds):
        yield "has a time that is negative or not finite"


def _counts(row: Row, depth: int) -> Iterator[str]:
    """Yields what is wrong with the tokens of a row's target calls."""
    length, calls = row.length, row.calls
    if sum(row.emitted) + 1 != length:
        yield f"emits {sum(row.emitted)} tokens and one by prefill, and has {length}"
    if len(row.accepted) != calls:
        yield f"has {calls} target calls and {len(row.accepted)} counts of accepted tokens"
        return
    if not all(0 <= a <= depth for a in row.accepted):
        yield f"accepts {max(row.accepted)} tokens in a round of a tree that is {depth} deep"
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
    stops = set(settings.get("stop_ids", ()))
    if not row.tokens:
        yield "has no token"
    elif any(t in stops for t in row.tokens[:-1]):
        yield "goes on behind a stop id"
    elif row.finish == "stop" and row.tokens[-1] not in stops:
        yield f"stopped at {row.tokens[-1]}, which is no stop id"
    elif row.finish == "length" and row.length > settings["max_new_tokens"]:
        yield f"has {row.length} tokens, more than its budget of {settings['max_new_tokens']}"
    elif row.finish not in ("stop", "length"):
        yield f"ended by {row.finish!r}, which is neither stop nor length"


def _twice(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the rows that are there twice."""
    for key, count in Counter(row.key for row in rows).items():
        if count > 1:
            yield f"arm {key[0]}, question {key[3]}, turn {key[4]}: stands {count} times"


def _paired(evaluation: Evaluation) -> Iterator[str]:
    """Yields what differs between the arms' rows of one answer that must be equal."""
    plain = {row.key[1:]: row for row in evaluation.rows if row.arm == PLAIN}
    arms = [arm for arm in evaluation.arms if arm != PLAIN]
    for arm in arms:
        mine = {row.key[1:]: row for row in evaluation.rows if row.arm == arm}
        for key in plain.keys() ^ mine.keys():
            there, lacking = (PLAIN, arm) if key in plain else (arm, PLAIN)
            yield f"question {key[2]}, turn {key[3]}: has a row of {there} and none of {lacking}"
        for key in plain.keys() & mine.keys():
            yield from (f"{_named(mine[key])}: {problem}" for problem in _against(mine[key], plain[key]))


def _against(row: Row, plain: Row) -> Iterator[str]:
    """Yields what is wrong with a row beside the plain row of the same answer."""
    if row.prompt_hash != plain.prompt_hash:
        yield "has another prompt than plain decoding"
    if row.error or plain.error or row.identical is None:
        return
    same = row.tokens == plain.tokens
    if same != row.identical:
        yield f"says identical={row.identical}, and its tokens {'are' if same else 'are not'} those of plain decoding"
    if same:
        return
    if row.divergence is None:
        yield "differs from plain decoding and does not say where"
        return
    index, margin = row.divergence
    if row.tokens[:index] != plain.tokens[:index] or row.tokens[index : index + 1] == plain.tokens[index : index + 1]:
        yield f"does not part from plain decoding at token {index}, as it says"
    if margin >= NEAR_TIE:
        yield f"parts from plain decoding at token {index} by a margin of {margin:.3g}, which no rounding explains"


def _groups(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the batches whose rows do not agree about it."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if not row.error:
            groups.setdefault((row.arm, row.temperature, row.seed, row.group), []).append(row)
    for (arm, _, _, name), mine in groups.items():
        facts = {(r.group_rows, r.group_calls, r.prefill_seconds, r.decode_seconds) for r in mine}
        if len(facts) > 1 or len(mine) != mine[0].group_rows:
            yield f"arm {arm}, batch {name}: its {len(mine)} rows do not agree about its size or its time"
        elif max(r.calls for r in mine) != mine[0].group_calls:
            yield f"arm {arm}, batch {name}: says {mine[0].group_calls} target calls, and its longest row has fewer"


def _named(row: Row) -> str:
    return f"arm {row.arm}, temperature {row.temperature:g}, seed {row.seed}, question {row.id}, turn {row.turn}"
