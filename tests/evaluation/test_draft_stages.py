"""Drafts and acceptance of servers held to golden ones: what is equal, what ties explain, and what a failure means."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jaxspec.evaluation.acceptance_stage import check_acceptance, likely_cause
from jaxspec.evaluation.draft_stages import check_hits, compare_children, first_draft, tally_drafts, unrolled_drafts
from jaxspec.evaluation.golden import GoldenAnswer, GoldenDraft
from jaxspec.evaluation.served_rounds import ServedRound, ToldAnswer, ask_rounds
from jaxspec.evaluation.statistics import share_interval
from jaxspec.serving.endpoint import RequestFailed
from jaxspec.serving.served_acceptance import Counters

TOP = [5, 6, 7, 8]
MARGINS = [1.0, 0.0005, 1.0]


@pytest.mark.parametrize(
    ("served", "equal", "tie"),
    [
        ([5], True, True),
        ([6], False, False),
        ([5, 6, 7], True, True),
        ([5, 7, 99], False, False),  # 7 may stand for 6, and then 6 is the third
        ([5, 7], True, True),  # one may have been looked up
        ([5, 6, 99], True, True),
        ([6, 5, 7], False, False),
    ],
)
def test_children_are_the_likeliest_tokens_but_for_ties(served: list[int], equal: bool, tie: bool):
    found = compare_children(TOP, MARGINS, served, 0.001)
    assert found[0] == equal and (equal or found[1] == tie)


def test_a_token_that_is_not_known_to_be_as_likely_is_no_tie():
    assert compare_children([5, 6], [None], [6], 0.001) == (False, False)
    assert compare_children([5, 6], [0.0005], [6], 0.001) == (False, True)


def golden(drafts: list[list[int]]) -> GoldenAnswer:
    """An answer 1 2 3 4 5 6, and chains of two that are drafted behind its tokens."""
    kept = [GoldenDraft(at, [[t, 90] for t in draft], [[1.0], [1.0]]) for at, draft in enumerate(drafts, 1)]
    ranks = [[0 if t == at + d + 1 else -1 for d, t in enumerate(draft)] for at, draft in enumerate(drafts, 1)]
    return GoldenAnswer([1, 2, 3, 4, 5, 6], "", [1.0] * 6, kept, ranks)


def told(*rounds: tuple[int, list[int], int], tokens: list[int] | None = None) -> ToldAnswer:
    """Chains at places of the answer, with how many of their tokens were accepted."""
    trees = [
        ServedRound(at, [at, *ids], [-1, *range(len(ids))], list(range(accepted + 1))) for at, ids, accepted in rounds
    ]
    return ToldAnswer(tokens or [1, 2, 3, 4, 5, 6], trees)


def test_drafts_are_compared_along_the_golden_chain_where_the_text_is_the_same():
    answer = golden([[2, 30], [3, 4], [9, 9], [5, 6]])
    same = told((1, [2, 30], 1), (3, [9, 9], 0), (4, [5, 6], 2))
    one, two = tally_drafts([answer], [same], 0.001)
    assert (one.compared, one.equal, two.compared, two.equal) == (3, 3, 3, 3)
    assert first_draft([one, two], [same], "float32")[0].passed and unrolled_drafts([one, two], "float32")[0].passed
    # Behind another first token the second one is another draft's.
    one, two = tally_drafts([answer], [told((1, [7, 30], 0), (2, [3, 8], 1))], 0.001)
    assert (one.compared, one.equal, two.compared, two.equal) == (2, 1, 1, 0)
    stage, cause = first_draft([one, two], [same], "bfloat16")
    assert stage.passed is False and stage.figure == 0.5 and "token 1" in stage.note and "fusion layer" in str(cause)
    stage, cause = unrolled_drafts([one._replace(equal=2), two], "bfloat16")
    assert stage.passed is False and "wrong norm" in str(cause)


def test_drafts_behind_another_text_are_not_compared():
    answer = golden([[2, 30], [3, 4], [9, 9], [5, 6]])
    parted = told((1, [2, 30], 1), (4, [0, 0], 0), tokens=[1, 2, 9, 4, 5, 6])
    assert tally_drafts([answer], [parted], 0.001)[0].compared == 1
    assert tally_drafts([answer], [told((1, [2], 1))], 0.001)[1:] == []


def test_a_server_without_its_drafter_fails_at_the_first_draft():
    answer, silent = golden([[2, 3]]), told((1, [], 0), (2, [], 0))
    stage, cause = first_draft(tally_drafts([answer], [silent], 0.001), [silent], "float32")
    assert stage.passed is False and "without its drafter" in str(cause)
    stage, cause = first_draft([], [told((5, [6], 1))], "float32")
    assert stage.passed is None and stage.note.startswith("not given by this server") and cause is None


def test_hits_are_those_of_the_golden_ranks():
    answer = golden([[2, 3], [3, 9], [9, 9], [5, 6]])
    stage, _ = check_hits([answer], [told((1, [2, 3], 2), (4, [5, 6], 2))])
    assert stage.passed and stage.figure == stage.expected == [1.0, 1.0]
    stage, _ = check_hits([answer], [told((1, [2, 3], 2), (4, [9, 9], 0))])
    assert stage.passed and stage.figure == [0.5, 1.0]  # one may be a tie
    stage, cause = check_hits([answer], [told((1, [9, 9], 0), (2, [9, 9], 0), (3, [9, 9], 0), (4, [9, 9], 0))])
    assert stage.passed is False and stage.figure == [0.0] and stage.expected == [0.75] and "RoPE" in str(cause)


class Lines:
    """A client that is answered by some chunks."""

    model = "m"

    def __init__(self, *chunks: dict[str, Any]) -> None:
        self.lines = [f"data: {json.dumps(chunk)}" for chunk in chunks]

    @contextlib.contextmanager
    def open_stream(self, _: str, __: object) -> Iterator[Iterator[str]]:
        yield iter(self.lines)


def chunk(ids: list[int], finish: str | None = None, **report: Any) -> dict[str, Any]:
    told = {"jaxspec": report} if report else {}
    return {"choices": [{"token_ids": ids, "finish_reason": finish}], **told}


TREE = {"ids": [4, 5, 6], "parents": [-1, 0, 1], "path": [0, 1]}


def read(*chunks: dict[str, Any]) -> ToldAnswer | None:
    client: Any = Lines(*chunks)
    return ask_rounds(client, {})


def test_rounds_are_read_with_their_places_and_merged_ones_left_out():
    start, end = chunk([4], round=0, tree=None), chunk([], "stop")
    found = read(start, chunk([5, 7], round=1, tree=TREE), chunk([8, 9, 4], round=3, tree=TREE), end)
    assert found is not None and found.tokens == [4, 5, 7, 8, 9, 4] and [one.at for one in found.rounds] == [1]
    assert found.rounds[0].children(0) == [1] and found.rounds[0].path == [0, 1]
    assert read(chunk([4]), end) is None  # another server
    assert read(start, chunk([5], round=1, tree={"tokens": ["a"]}), end) is None  # without ids


@pytest.mark.parametrize(
    "tree", [{**TREE, "path": [9]}, {**TREE, "parents": [-1]}, {**TREE, "ids": ["a", "b", "c"]}, {"ids": [1]}, "tree"]
)
def test_a_tree_that_is_none_is_a_failed_request(tree: Any):
    with pytest.raises(RequestFailed, match="cannot be read"):
        read(chunk([4], round=0), chunk([5], round=1, tree=tree), chunk([], "stop"))


def test_a_stream_without_an_end_is_a_failed_request():
    with pytest.raises(RequestFailed, match="finish_reason None"):
        read(chunk([4], round=0))


def served(rounds: int, *survival: float) -> Counters:
    return Counters(rounds, rounds * len(survival), rounds * sum(survival), tuple(rounds * s for s in survival))


def predicted(*survival: float, low: float | None, high: float | None) -> dict[str, Any]:
    ends = {"low": [low] * len(survival), "high": [high] * len(survival)}
    return {"rounds": 500, "survival": list(survival), **ends}


@pytest.mark.parametrize(
    ("counters", "expected", "passed"),
    [
        (served(20, 0.95), predicted(1.0, low=1.0, high=1.0), True),  # one accept fewer
        (served(20, 0.65), predicted(1.0, low=1.0, high=1.0), False),
        (served(500, 0.72), predicted(0.8, low=0.7, high=0.9), True),  # prompts differ as much
        (served(500, 0.6), predicted(0.8, low=0.7, high=0.9), False),
        (served(500, 0.8), predicted(0.8, low=None, high=None), True),
        (served(5000, 0.72), predicted(0.8, low=0.7, high=0.9), False),  # many rounds: the tolerance
        (served(5000, 0.78), predicted(0.8, low=0.79, high=0.81), True),
        (served(5000, 0.8, 0.5), predicted(0.8, 0.5, 0.3, low=0.0, high=1.0), True),  # a shorter chain
        (served(0), predicted(0.8, low=0.7, high=0.9), False),
        (served(0), predicted(low=None, high=None), None),
        (None, predicted(0.8, low=0.7, high=0.9), None),
    ],
)
def test_acceptance_is_held_to_the_tolerance_of_many_rounds_and_to_intervals_of_few(
    counters: Counters | None, expected: dict[str, Any], passed: bool | None
):
    stage, cause = check_acceptance(expected, counters)
    assert stage.passed is passed and (cause is not None) == (passed is False)
    if counters is not None and counters.drafts:
        assert f"{int(counters.drafts):,} rounds" in stage.note
        assert ("fewer than 4,000" in stage.note) == (counters.drafts < 4000)


def test_a_share_has_an_interval_at_its_ends_too():
    assert share_interval(1.0, 20).low == pytest.approx(0.8389, abs=1e-4) and share_interval(1.0, 20).high == 1.0
    assert share_interval(0.5, 1e9).high == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("served", "cause"),
    [
        ([0.0, 0.0, 0.0], "nothing is accepted"),
        ([0.3, 0.2, 0.15], "the first position is poor"),
        ([0.7, 0.05, 0.0], "the second position collapses"),
        ([0.7, 0.5, 0.05], "falls from position 3 on: trained with 2 draft steps"),
        ([0.64, 0.45, 0.32], "everything is somewhat low"),
        ([0.99, 0.99, 0.99], "too good"),
    ],
)
def test_causes_are_told_from_acceptance_by_position(served: list[float], cause: str):
    assert cause in likely_cause(np.asarray(served), np.asarray([0.7, 0.5, 0.36]))
