"""Slots round by round: what every round adds, its tree, and rows that are released in the middle of their answer."""

import jax
import numpy as np
import pytest
from test_rounds import assert_same_text, batches, models, pair
from test_slots import BUDGET, ENGINES, random_rows

from jaxspec.base import ROOT
from jaxspec.decoding.answers import Answer
from jaxspec.decoding.generation import FINISH_REASONS, generate
from jaxspec.decoding.requests import make_requests
from jaxspec.decoding.rounds import Engine, Weights
from jaxspec.decoding.slots import RoundRecord, Slots


def check_tree(record: RoundRecord, row: int) -> None:
    """The accepted path goes down the tree of its round, and carries the tokens that were added."""
    tree, accepted = record.tree, int(record.accepted_B[row])
    path = tree.path_BP[row][: accepted + 1]
    assert path[0] == 0 and tree.valid_BN[row][path].all()
    assert tree.parent_BN[row][path].tolist() == [ROOT, *path[:-1].tolist()]
    assert tree.token_BN[row][path[1:]].tolist() == record.token_BP[row][:accepted].tolist()


def follow(slots: Slots, rows: list, *, leave: dict[int, int] | None = None) -> dict[int, Answer]:
    """Every request's answer, gathered round by round; those in `leave` are released after so many rounds."""
    waiting, held, tokens, rounds = list(range(len(rows)))[::-1], {}, {}, {}
    done: dict[int, Answer] = {}
    leave = {} if leave is None else leave
    while waiting or held:
        while waiting and slots.free:
            place, i = slots.free[0], waiting.pop()
            tokens[i], rounds[i] = np.asarray(slots.admit(rows[i], place)).tolist(), []
            held[place] = i
        record = slots.step()
        for place, i in list(held.items()):
            added, finish = int(record.added_B[place]), int(record.finish_B[place])
            tokens[i] += record.token_BP[place][:added].tolist()
            if added:
                rounds[i].append(int(record.accepted_B[place]))
                check_tree(record, place)
            if finish or leave.get(i) == len(rounds[i]):
                del held[place]
                slots.release(place)
                counts = np.bincount(rounds[i], minlength=slots.engine.path)
                done[i] = Answer(np.array(tokens[i]), FINISH_REASONS[finish], len(rounds[i]), counts)
    return done


@pytest.mark.parametrize("rule", ["target-draw", "adaptive", "block"])
def test_rounds_one_by_one_add_up_to_the_answer_of_the_loop(rule: str):
    engine, weights = ENGINES[rule]
    rows = random_rows(np.random.default_rng(11), 10)
    slots = Slots(engine, weights, 3, longest=30, max_new_tokens=BUDGET, stops=2)
    done = follow(slots, rows)
    assert sorted(slots.free) == [0, 1, 2]
    for i, row in enumerate(rows):
        (alone,) = generate(engine, weights, make_requests([row]))
        assert_same_text([done[i]], [alone])
        if rule == "adaptive":
            continue  # rows share the decision about their trees
        assert done[i].calls == alone.calls and done[i].accepted.tolist() == alone.accepted.tolist()


DRAFTED = [("eagle", "chain"), ("eagle", "static"), ("eagle", "dynamic"), ("eagle", "adaptive")]
DRAFTED += [("lookup", "lookup"), ("lookup", "both"), ("eagle", "ragged")]


@pytest.mark.parametrize(("drafter", "tree"), DRAFTED)
def test_every_call_says_how_many_drafts_it_verified_and_how_deep(drafter: str, tree: str):
    """The rounds of one row, recorded one by one, hold as many nodes as the loop's answer counts."""
    engine, weights = pair(drafter, tree)
    for row in random_rows(np.random.default_rng(13), 4):
        slots = Slots(engine, weights, 1, longest=30, max_new_tokens=BUDGET, stops=2)
        slots.admit(row, 0)
        (answer,), counted = generate(engine, weights, make_requests([row])), []
        while len(counted) < answer.calls:
            seen = slots.step().tree
            depths = [0] * len(seen.valid_BN[0])
            for node in np.flatnonzero(seen.valid_BN[0])[1:]:
                depths[node] = depths[seen.parent_BN[0, node]] + 1
            counted.append([int(seen.valid_BN[0].sum()) - 1, max(depths)])
        assert answer.drafted.tolist() == counted
        emitted = np.bincount(answer.call_of, minlength=answer.calls + 1)[1:]
        assert all(e - 1 <= depth <= drafted for e, (drafted, depth) in zip(emitted, counted, strict=True))


def test_rows_of_a_batch_count_their_own_drafts_and_lookup_alone_may_draft_none():
    engine, weights = pair("lookup", "lookup")
    answers = generate(engine, weights, batches()["mixed"])
    assert [len(answer.drafted) for answer in answers] == [answer.calls for answer in answers]
    drafted = np.concatenate([answer.drafted for answer in answers])
    assert set(drafted[:, 0].tolist()) == {0, 7} and (drafted[:, 0] == drafted[:, 1]).all()
    engine, weights = pair("eagle", "chain")
    assert {tuple(d) for a in generate(engine, weights, batches()["mixed"]) for d in a.drafted.tolist()} == {(3, 3)}
    (plain,) = generate(Engine(models().target), weights, make_requests(random_rows(np.random.default_rng(1), 1)))
    assert plain.drafted.tolist() == [[0, 0]] * plain.calls


def test_plain_decoding_goes_round_by_round_too():
    engine, weights = Engine(models().target), Weights(models().weights.target)
    rows = random_rows(np.random.default_rng(12), 5)
    done = follow(Slots(engine, weights, 2, longest=30, max_new_tokens=BUDGET, stops=2), rows)
    for i, row in enumerate(rows):
        assert_same_text([done[i]], generate(engine, weights, make_requests([row])))


def test_a_row_that_is_released_early_is_free_at_once_and_disturbs_no_other(compilations: list[str]):
    engine, weights = ENGINES["target-draw"]
    rows = random_rows(np.random.default_rng(13), 12)
    slots = Slots(engine, weights, 3, longest=30, max_new_tokens=BUDGET, stops=2, widths=(32,))
    follow(slots, rows[:3], leave={0: 1})
    compilations.clear()
    done = follow(slots, rows, leave={0: 1, 3: 2, 4: 1, 9: 3})
    assert not compilations and sorted(slots.free) == [0, 1, 2] and len(done) == 12
    for i, row in enumerate(rows):
        (alone,) = generate(engine, weights, make_requests([row], width=32))
        assert done[i].tokens.tolist() == alone.tokens[: len(done[i].tokens)].tolist()
        assert done[i].finish in (alone.finish, "running")
    jax.jit(lambda x: x + 43)(1.0)
    assert compilations, "the count of compilations counts nothing"
