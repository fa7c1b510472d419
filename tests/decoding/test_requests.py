"""Requests: what cannot be is refused by name, and every row has its own settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jaxspec.data.prompts import SETTINGS
from jaxspec.decoding.requests import LAST_PARTS, Request, Settings, bucket, count_chunks, fill_up, make_requests
from jaxspec.decoding.rounds import CHUNK


@pytest.mark.parametrize(
    ("prompts", "complaint"),
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1 is empty"),
        ([[-1], [2]], "prompt 0 has a negative token"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused_by_its_row(prompts: list[list[int]], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        make_requests([Request(prompt) for prompt in prompts])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"max_new_tokens": 0}, "max-new-tokens is 0; it must be at least 1"),
        ({"max_new_tokens": -2}, "max-new-tokens is -2"),
        ({"max_new_tokens": 2**31}, "max-new-tokens is 2147483648"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"draft_temperature": -1.0}, "draft-temperature is -1.0"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_k": 2**31}, "top-k is 2147483648"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"seed": -1}, "seed is -1; it must be from 0 to"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(change: dict[str, Any], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        Settings(**change)


def test_every_row_has_its_own_settings_and_stop_ids():
    settings = [Settings(4, 0.5, stop_ids=(7,)), Settings(5, 0.0, 3, 0.9, 0.25, 11, (8, 9))]
    requests = make_requests([Request([1, 2], settings[0]), Request([3], settings[1])])
    assert requests.stop_BR.tolist() == [[7, -1], [8, 9]] and requests.budget_B.tolist() == [4, 5]
    assert requests.sampling.temperature_B.tolist() == [0.5, 0.0] and requests.sampling.top_k_B.tolist() == [0, 3]
    assert requests.draft_temperature_B.tolist() == [0.5, 0.25] and requests.sampling.seed_B.tolist() == [0, 11]
    assert make_requests([Request([1])] * 2).stop_BR.tolist() == [[-1], [-1]]
    assert make_requests([Request([1])], width=40, stop_width=3).tokens_BL.shape == (1, 40)
    filled = make_requests(fill_up([Request([1, 2], settings[0])], 3))
    assert filled.budget_B.tolist() == [4, 1, 1] and filled.length_B.tolist() == [2, 2, 2]


def test_a_prompt_is_padded_by_a_quarter_at_most_to_few_sizes():
    sizes = [bucket(length) for length in range(1, 9000)]
    assert all(length <= size for length, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert all(size <= 1.25 * length for length, size in enumerate(sizes, 1) if length >= 32)
    assert len({size for size in sizes if size <= CHUNK}) == 19 and len(set(sizes)) == 36


@pytest.mark.parametrize("width", [640, 1536, 5120])
def test_a_long_prompt_is_read_to_its_own_padded_size_in_whatever_width_it_lies(width: int):
    lengths = [n for size in (1, CHUNK, 896, 1024, 1280, 1408, width) for n in (size - 1, size, size + 1)]
    for length in (n for n in lengths if 1 <= n <= width):
        wide, last = map(int, count_chunks(length, width, CHUNK))
        assert wide * CHUNK + last * CHUNK // LAST_PARTS == max(CHUNK, bucket(length))
        assert wide >= 1 and 0 <= last < LAST_PARTS


def test_a_line_of_a_prompts_file_may_set_every_setting():
    assert list(SETTINGS) and set(SETTINGS) == {field.name for field in dataclasses.fields(Settings)}
