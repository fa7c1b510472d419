"""Metrics pages and answers of vLLM, SGLang and llama.cpp: each server tells its rounds in its own way."""

from typing import Any

import pytest

from jaxspec.serving.served_acceptance import AnswerAcceptance, Counters, Gauges, of_answer, parse_page

VLLM = {"num_spec_steps": 4, "num_accepted_draft_tokens": 6, "num_draft_tokens": 12}
SGLANG = {"spec_verify_ct": 4, "spec_num_correct_drafts": 6, "spec_num_proposed_drafts": 12}


def test_counters_that_fall_are_those_of_a_new_server():
    before, after = Counters(5, 10, 4, (4.0,)), Counters(7, 14, 7, (5.0, 2.0))
    assert after.since(before) == Counters(2, 4, 3, (1.0, 2.0))
    assert after.since(before).plus(before) == after
    with pytest.raises(ValueError, match="started again"):
        before.since(after)
    assert Counters(0, 0, 0, ()).figures()["acceptance_length"] is None


def test_a_page_without_counters_or_gauges_has_none():
    assert parse_page("") == parse_page("# nothing\nother_total 3\n") == (None, None)
    page = parse_page('sglang:spec_accept_length{tp_rank="0"} 2.5\nsglang:spec_accept_rate NaN\n')
    assert page == (None, Gauges(2.5, None))


@pytest.mark.parametrize(
    ("response", "histogram"),
    [
        ({"metrics": {"speculative_decoding": VLLM | {"acceptance_histogram": [1, 1, 1, 1]}}}, (1, 1, 1, 1)),
        ({"metrics": {"speculative_decoding": VLLM | {"acceptance_histogram": None}}}, ()),
        ({"sglext": {"spec_tokens_details": SGLANG | {"spec_correct_drafts_histogram": [0, 2, 2]}}}, (0, 2, 2)),
        ({"sglext": {"spec_tokens_details": SGLANG}, "metrics": {"other": 1}, "choices": []}, ()),
        ({"meta_info": SGLANG}, ()),
        ({"choices": [{"meta_info": SGLANG}]}, ()),
        ({"timings": {"predicted_n": 11, "draft_n": 12, "draft_n_accepted": 6}}, ()),
    ],
)
def test_answers_tell_their_rounds_in_each_servers_way(response: dict[str, Any], histogram: tuple[int, ...]):
    assert of_answer(response) == AnswerAcceptance(4, 6, 12, histogram)


@pytest.mark.parametrize(
    "response",
    [
        {},
        {"choices": None, "metrics": None, "sglext": None, "timings": None},
        {"choices": [None], "metrics": {"speculative_decoding": 3}},
        {"sglext": {"spec_tokens_details": [SGLANG, SGLANG]}},  # of several answers
        {"sglext": {"routed_experts": "x"}},
        {"meta_info": SGLANG | {"spec_verify_ct": True}},
        {"timings": {"predicted_n": 11}},  # nothing was drafted
    ],
)
def test_answers_that_tell_no_rounds_have_none(response: dict[str, Any]):
    assert of_answer(response) is None
