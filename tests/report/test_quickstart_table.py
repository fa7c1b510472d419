"""Tables of results of `jaxspec quickstart`: a line a measure, several runs side by side."""

from pathlib import Path
from typing import Any

import pytest
from report_toys import table_of

FOUND: dict[str, Any] = {
    "command": "quickstart",
    "machine": {"cpu": "a processor", "cores": 2, "accelerator": None, "jax": "0.10.2"},
    "dtype": "float32",
    "wall_seconds": 574.52,
    "tau": 4.6605,
    "tau_sampled": 2.8357,
    "accept_histogram": [20, 19, 1300],
    "identical_fraction": 1.0,
    "near_ties": [],
    "tokens_per_second_plain": 588.18,
    "tokens_per_second_speculative": 697.79,
    "speedup": 1.1863,
    "tree": "chain:2",
    "tree_tokens_per_second": {"chain:2": 637.6, "static:0,1": 63.14},
    "draft_vocab": 1024,
    "drafter_checkpoint": "runs/quickstart/drafter",
    "train_tokens": 790797,
    "train_seconds": 286.9,
    "conversations": 900,
    "eval": {
        "loss": 0.4,
        "top1_agreement": 0.84186,
        "expected_acceptance": 0.8566,
        "simulated_tau": 4.2711,
        "simulated_tau_greedy": 4.0962,
    },
    "held_out_prompts": 20,
}
OTHER = FOUND | {
    "drafter_checkpoint": "elsewhere/quickstart_smollm2/drafter",
    "identical_fraction": 0.85,
    "near_ties": [{"row": row, "index": 4, "margin": margin} for row, margin in ((3, 1e-6), (4, 0.0), (5, 0.5))],
    "train_seconds": 6963.1,
    "eval": {**FOUND["eval"], "simulated_tau": None},
    "machine": {"cpu": "a processor", "cores": 64, "accelerator": "a chip", "jax": "0.10.2"},
}


def test_a_run_is_a_line_a_measure(tmp_path: Path):
    assert table_of(tmp_path, "a.json quickstart", a=FOUND) == [
        "| measure | value |",
        "| --- | ---: |",
        "| held-out questions | 20 |",
        "| texts identical to plain decoding | 100 % |",
        "| tree | `chain:2` |",
        "| tau, greedy | 4.66 |",
        "| tau, temperature 1 | 2.84 |",
        "| rounds that accepted 0, 1, ... drafted tokens | 20, 19, 1,300 |",
        "| tokens/s, plain | 588 |",
        "| tokens/s, speculative | 698 |",
        "| speed-up | 1.19 |",
        "| tokens/s of the candidates on other questions | `chain:2` 638; `static:0,1` 63.1 |",
        "| held-out text: top-1 agreement | 0.842 |",
        "| held-out text: expected acceptance | 0.857 |",
        "| held-out text: simulated tau of a chain | 4.27 |",
        "| held-out text: simulated tau of a chain, greedy | 4.10 |",
        "| conversations | 900 |",
        "| trained tokens | 790,797 |",
        "| draft vocabulary | 1,024 |",
        "| training, s | 287 |",
        "| last call, s | 575 |",
        "float32, answers one at a time, prefill in their times, a processor, 2 cores: [a.json](a.json)",
    ]


def test_runs_stand_side_by_side_under_their_folders(tmp_path: Path):
    words = "a.json,b.json quickstart figures=identical,training,simulated_tau"
    assert table_of(tmp_path, words, a=FOUND, b=OTHER) == [
        "| measure | `quickstart` | `quickstart_smollm2` |",
        "| --- | ---: | ---: |",
        "| texts identical to plain decoding | 100 % | 85 %, 2 near ties, 1 differ |",
        "| training, s | 287 | 6,963 |",
        "| held-out text: simulated tau of a chain | 4.27 | - |",
        "float32, answers one at a time, prefill in their times, a processor, 2 cores and a chip: [a.json](a.json), "
        "[b.json](b.json)",
    ]


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        ("a.json quickstart figures=mood", {}, "there is no figure 'mood'; there are held_out, identical, tree, tau,"),
        ("a.json quickstart task=qa", {}, "'task=qa' is no option of quickstart; there are figures"),
        ("a.json,a.json quickstart", {}, "two of the results are of a folder 'quickstart': give one"),
        ("a.json quickstart", {"command": "evaluate"}, "is no result of quickstart"),
        ("a.json quickstart", {"accept_histogram": []}, "has no figures"),
        ("a.json quickstart", {"tau": None}, "lacks a figure or setting"),
        ("a.json quickstart", {"eval": None}, "lacks a figure or setting"),
    ],
)
def test_what_cannot_be_a_table_is_told(tmp_path: Path, words: str, changes: dict[str, Any], said: str):
    with pytest.raises(ValueError) as told:
        table_of(tmp_path, words, a=FOUND | changes)
    assert said in str(told.value)
