"""Tables of results of `jaxspec bench train`: what a training step of each recipe computes, and its time."""

from pathlib import Path
from typing import Any

import pytest
from report_toys import table_of

TIMES = {"step_ms": 189.6, "target_ms": 77.36, "drafter_ms": 65.34, "head_and_loss_ms": 42.4, "optimizer_ms": 1.854}
TIMES |= {"rest_ms": -2.65, "mfu": 0.4799, "time_ratio": 1.0, "tokens_per_second": 5400.9}


def row(recipe: str, drafter: float, optimizer: float = 0.0, **times: float) -> dict[str, Any]:
    parts = {"target_flops": 14.5e12, "drafter_flops": drafter, "head_and_loss_flops": 3.5e12}
    total = sum(parts.values()) + optimizer
    # Ratio and total of a result have the optimizer in them.
    whole = {"flops_per_step": total, "flops_per_token": total / 1000, "flops_ratio": total / 20e12}
    about = {"recipe": recipe, "draft_steps": 3, "parameters": 251_666_432, "optimizer_flops": optimizer}
    return about | parts | whole | dict.fromkeys(TIMES) | times


COUNTED: dict[str, Any] = {
    "command": "bench train",
    "machine": {"cpu": "a processor", "cores": 2, "accelerator": None},
    "dtype": "bfloat16",
    "target": "llama3-8b",
    "batch": 1,
    "length": 1000,
    "draft_vocab": None,
    "repeats": None,
    "machine_matmul_flops_per_second": None,
    "rows": [row("eagle", 2e12), row("best a=0.7", 12e12, 29.5e12)],
}
TIMED = COUNTED | {
    "batch": 2,
    "length": 500,
    "draft_vocab": 4096,
    "repeats": 9,
    "machine_matmul_flops_per_second": 268.4e9,
    "rows": [row("eagle", 2e12, **TIMES), row("hass:3", 12e12, **{**TIMES, "time_ratio": 2.1, "mfu": 0.4169})],
}


def test_counts_leave_the_optimizer_out_of_totals_and_ratios(tmp_path: Path):
    assert table_of(tmp_path, "a.json steps", a=COUNTED) == [
        "| recipe | draft steps | GFLOP a token | target | drafter | head and loss | FLOPs over `eagle` | optimizer |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `eagle` | 3 | 20 | 14.5 | 2 | 3.5 | 1.00 | 0 |",
        "| `best a=0.7` | 3 | 30 | 14.5 | 12 | 3.5 | 1.50 | 29.5 |",
        "Target llama3-8b, a step of 1 row of 1,000 tokens, bfloat16; FLOPs are of matmuls, the optimizer's left out "
        "of total and ratio; counted and not run: [a.json](a.json)",
    ]


def test_times_stand_beside_the_counted_ratio(tmp_path: Path):
    assert table_of(tmp_path, "a.json steps", a=TIMED) == [
        "| recipe | draft steps | FLOPs over `eagle` | time over `eagle` | step, ms | target, ms | drafter, ms | "
        "head and loss, ms | optimizer, ms | rest, ms | MFU |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `eagle` | 3 | 1.00 | 1.00 | 190 | 77.4 | 65.3 | 42.4 | 1.85 | -2.65 | 48 % |",
        "| `hass:3` | 3 | 1.50 | 2.10 | 190 | 77.4 | 65.3 | 42.4 | 1.85 | -2.65 | 42 % |",
        "Target llama3-8b, a step of 2 rows of 500 tokens, a draft vocabulary of 4,096, bfloat16; FLOPs are of "
        "matmuls, the optimizer's left out of total and ratio; medians of 9 steps in turns, a processor, 2 cores, "
        "whose large matmul reached 268 GFLOP/s meanwhile: [a.json](a.json)",
    ]


def test_figures_are_chosen(tmp_path: Path):
    first, _, one, *_ = table_of(tmp_path, "a.json steps figures=parameters,tokens_per_second,total", a=TIMED)
    assert first == "| recipe | parameters | tokens/s | GFLOP a token |"
    assert one == "| `eagle` | 251,666,432 | 5,401 | 20 |"


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        ("a.json steps figures=mood", {}, "there is no figure 'mood'; there are draft_steps, parameters, total,"),
        ("a.json steps figures=total,mfu", {}, "figure 'mfu' was not timed (--count-only)"),
        ("a.json steps recipes=eagle", {}, "'recipes=eagle' is no option of steps; there are figures"),
        ("a.json,a.json steps", {}, "a table of steps is made from one file, not 2"),
        ("a.json steps", {"command": "bench decode"}, "is no result of bench train"),
        ("a.json steps", {"rows": []}, "has no figures"),
        ("a.json steps", {"rows": [{"recipe": "eagle"}]}, "lacks a figure or setting"),
    ],
)
def test_what_cannot_be_a_table_is_told(tmp_path: Path, words: str, changes: dict[str, Any], said: str):
    with pytest.raises(ValueError) as told:
        table_of(tmp_path, words, a=COUNTED | changes)
    assert said in str(told.value)
