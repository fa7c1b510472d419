"""Slots round by round: what every round adds, its tree, and rows that are released in the middle of their answer."""

import jax
import numpy as np
import pytest
from test_rounds import assert_same_text, models
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
