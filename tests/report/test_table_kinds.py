"""Kinds of tables: each has its line in the documents, with its options and figures."""

from pathlib import Path

import pytest

from jaxspec.report import quickstart_table, step_table
from jaxspec.report.documents import FIGURES, KINDS

VERBS = (Path(__file__).resolve().parents[2] / "docs/verbs.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_documented_with_its_options(kind: str):
    (line,) = [line for line in VERBS.splitlines() if line.startswith(f"| `{kind}` |")]
    assert all(f"`{option}" in line for option in KINDS[kind].options)
    assert (KINDS[kind].together is not None) == ("`A.json,B.json`" in line)


def test_every_figure_is_documented():
    figures = VERBS.partition("`figures` are columns")[2].partition("\n## ")[0]
    named = [*FIGURES, *step_table.COUNTED, *step_table.TIMED, *quickstart_table.FIGURES]
    assert [name for name in named if f"`{name}`" not in figures] == []
