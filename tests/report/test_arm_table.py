"""Tables of arms: capacity, what lies outside the forward passes, and what drawn and simulated texts depend on."""

from pathlib import Path
from typing import Any

from report_toys import bench_result, table_of

from jaxspec.report.given_files import read_result

SETTINGS: dict[str, Any] = {
    "target": "125m",
    "temperature": 0.0,
    "dtype": "float32",
    "max_new_tokens": 40,
    "repeats": 1,
    "draft_mode": "swor",
    "rule": "recursive-rejection",
    "machine_copy_bytes_per_second": 54e9,
    "machine_matmul_flops_per_second": 214e9,
}


def table(folder: Path, words: str, **changes: Any) -> list[str]:
    return table_of(
        folder, words, a=read_result(bench_result(folder / "b.json", **SETTINGS | changes), ["bench decode"])
    )


def test_what_is_no_forward_pass_is_a_share_of_the_round(tmp_path: Path):
    _, _, plain, chain, untimed, *_ = table(tmp_path, "a.json arms figures=round_ms,outside")
    assert plain == "| `plain` | 9.0 | 8.3 |"
    assert chain == "| `chain:3` | 12.8 | 5.9 |"
    assert untimed == "| `wide` | - | - |"


def test_the_slots_of_a_cache_are_a_figure(tmp_path: Path):
    rows = [{"arm": "plain", "batch": 1, "capacity": 16384}, {"arm": "chain:3", "batch": 1}]
    assert table(tmp_path, "a.json arms figures=capacity", rows=rows)[:4] == [
        "| arm | slots |",
        "| --- | ---: |",
        "| `plain` | 16,384 |",
        "| `chain:3` | - |",
    ]


def test_children_rule_and_simulated_acceptance_are_told_where_they_count(tmp_path: Path):
    def below(**changes: Any) -> str:
        return table(tmp_path, "a.json arms figures=round_ms", **changes)[-1]

    assert "Target 125m, greedy, batch 1, float32," in below()
    assert "greedy, acceptance simulated at 0.75, batch 1" in below(simulated_acceptance=[0.75])
    assert "greedy, acceptance simulated at 0.9, 0.5, batch 1" in below(simulated_acceptance=[0.9, 0.5])
    assert "temperature 1, swor children, recursive-rejection, batch 1" in below(temperature=1.0)
