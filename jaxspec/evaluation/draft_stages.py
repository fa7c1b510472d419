"""A server's drafts held to golden ones: the first step, the steps unrolled behind it, and the ranks that were hit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxspec.evaluation.check_stages import EQUAL_DRAFTS, Found, Stage, not_given
from jaxspec.evaluation.golden import GoldenAnswer, GoldenDraft
from jaxspec.evaluation.served_rounds import ServedRound, ToldAnswer

FIRST, UNROLLED, HITS = "first draft", "unrolled drafts", "rank hits"
HITS_EQUAL = 0.98
"""Share of rounds whose hits must be equal; ties cannot be told there, so one round may always differ."""
CAUSES = {
    FIRST: (
        "the first draft step: another drafter or draft vocabulary, the fusion layer (fc), auxiliary layers (entering "
        "or leaving), norms, the order of concatenation, features shifted by one token, or d2t read as absolute ids"
    ),
    UNROLLED: (
        "the steps behind the first: the feature is fed back around the wrong norm, positions or the cache index stand "
        "still, or siblings are visible"
    ),
    HITS: (
        "drafts go wrong later in the answer: positions or RoPE of the draft, a window or mask that is too short, or "
        "the draft's cache after rounds with rejected tokens"
    ),
}


class DraftTally(NamedTuple):
    """Drafts of one depth that were compared."""

    compared: int = 0
    equal: int = 0
    ties: int = 0
    """Those that differ at a tie."""
    other: str = ""
    """Says where the first of the others is."""

    @property
    def share(self) -> float | None:
        """Share that is equal or differs at a tie."""
        return (self.equal + self.ties) / self.compared if self.compared else None

    def plus(self, equal: bool, tie: bool, place: str) -> DraftTally:
        """Returns the tally with one draft more."""
        other = self.other if equal or tie else self.other or place
        return DraftTally(self.compared + 1, self.equal + equal, self.ties + (tie and not equal), other)


def drafts_nothing(told: Sequence[ToldAnswer]) -> bool:
    """Returns whether rounds were told, and none of them drafted a token."""
    rounds = [one for answer in told for one in answer.rounds]
    return bool(rounds) and all(len(one.ids) == 1 for one in rounds)


def tally_drafts(answers: Sequence[GoldenAnswer], told: Sequence[ToldAnswer], tie: float) -> list[DraftTally]:
    """Returns by depth how the drafts of the first rounds compare, where the answers before them are the same."""
    found: list[DraftTally] = []
    for number, (answer, said) in enumerate(zip(answers, told, strict=True)):
        known = {draft.at: draft for draft in answer.drafts}
        for one in said.rounds:
            draft = known.get(one.at)
            if draft is None or said.tokens[: one.at] != answer.output_ids[: one.at]:
                continue
            for depth, (equal, tied) in enumerate(_compare(draft, one, tie)):
                found += [DraftTally()] * (depth + 1 - len(found))
                found[depth] = found[depth].plus(equal, tied, f"answer {number + 1} behind token {one.at}")
    return found


def _compare(draft: GoldenDraft, one: ServedRound, tie: float) -> Iterator[tuple[bool, bool]]:
    """Yields by depth, along the golden chain, whether the draft is equal, and whether ties explain what is not."""
    node = 0
    for top, margins in zip(draft.top, draft.margins, strict=True):
        children = one.children(node)
        if not children:
            return
        yield compare_children(top, margins, [one.ids[child] for child in children], tie)
        below = [child for child in children if one.ids[child] == top[0]]
        if not below:
            return
        node = below[0]


def compare_children(
    top: Sequence[int], margins: Sequence[float | None], served: Sequence[int], tie: float
) -> tuple[bool, bool]:
    """Returns whether a node's children are the golden ones, and whether ties explain it where they are not.

    The first must be the likeliest token. Of several the others must be among the likeliest too, but for one, which
    may be a looked-up token.
    """

    def tied(rank: int, other: int) -> bool:
        between = margins[rank : min(other, len(top) - 1)]
        return sum(math.inf if margin is None else margin for margin in between) < tie

    rank_of = {token: rank for rank, token in enumerate(top)}
    ranks = [rank_of.get(token, len(top)) for token in served]
    wanted = min(max(1, len(served) - 1), len(top) - 1) if len(top) > 1 else 1
    missing = [rank for rank in range(wanted) if rank not in ranks]
    equal = ranks[0] == 0 and not missing
    first = ranks[0] == 0 or tied(0, ranks[0])
    return equal, first and all(tied(rank, max(len(served), rank + 1)) for rank in missing)


def first_draft(tallies: Sequence[DraftTally], told: Sequence[ToldAnswer], dtype: str) -> Found:
    """Returns whether the drafts behind the first step are equal."""
    need = EQUAL_DRAFTS[dtype]
    if drafts_nothing(told):
        cause = "the server runs without its drafter, or with a tree that drafts nothing"
        return Stage(FIRST, False, None, need, "no round drafts a token"), cause
    if not tallies:
        return not_given(FIRST, "no round begins where a golden one does, behind the same tokens", need)
    return _judge(FIRST, tallies[:1], need)


def unrolled_drafts(tallies: Sequence[DraftTally], dtype: str) -> Found:
    """Returns whether the drafts of the further depths are equal."""
    if len(tallies) < 2:
        return not_given(UNROLLED, "no round that begins where a golden one does drafts a second token")
    return _judge(UNROLLED, tallies[1:], EQUAL_DRAFTS[dtype])


def _judge(name: str, tallies: Sequence[DraftTally], need: float) -> Found:
    shares = [tally.share or 0.0 for tally in tallies]
    passed = all(share >= need for share in shares)
    note = f"{tallies[0].compared} rounds compared, {sum(tally.ties for tally in tallies)} drafts differ at ties"
    if not passed:
        first = next(tally for tally, share in zip(tallies, shares, strict=True) if share < need)
        note += f"; the first that differs is of {first.other}"
    figure = [round(share, 4) for share in shares]
    return Stage(name, passed, figure[0] if name == FIRST else figure, need, note), None if passed else CAUSES[name]


def check_hits(answers: Sequence[GoldenAnswer], told: Sequence[ToldAnswer]) -> Found:
    """Returns whether the likeliest drafted token is the answer's where it is by the golden ranks, in all rounds."""
    found: dict[int, list[tuple[bool, bool]]] = {}
    for answer, said in zip(answers, told, strict=True):
        for one in said.rounds:
            if said.tokens[: one.at] == answer.output_ids[: one.at]:
                for depth, hits in enumerate(_hits(answer, said, one)):
                    found.setdefault(depth, []).append(hits)
    if not found:
        return not_given(HITS, "no round drafts behind the golden answer's tokens")
    depths = [found[depth] for depth in sorted(found)]
    unequal = [sum(served != golden for served, golden in hits) for hits in depths]
    passed = all(n <= max(1, (1 - HITS_EQUAL) * len(hits)) for n, hits in zip(unequal, depths, strict=True))
    served, golden = ([round(sum(hit[arm] for hit in hits) / len(hits), 4) for hits in depths] for arm in (0, 1))
    note = f"{len(depths[0])} rounds compared; by depth {', '.join(map(str, unequal))} differ"
    return Stage(HITS, passed, served, golden, note), None if passed else CAUSES[HITS]


def _hits(answer: GoldenAnswer, said: ToldAnswer, one: ServedRound) -> Iterator[tuple[bool, bool]]:
    """Yields by depth, along the answer, whether the likeliest drafted token is the answer's: served, and golden."""
    node = 0
    ranks = answer.ranks[one.at - 1] if one.at <= len(answer.ranks) else []
    for depth, rank in enumerate(ranks):
        children, at = one.children(node), one.at + depth
        if not children or said.tokens[at : at + 1] != answer.output_ids[at : at + 1]:
            return
        on_path = one.path[depth + 1] if len(one.path) > depth + 1 else None
        yield on_path == children[0], rank == 0
        if on_path is None:
            return
        node = on_path
