"""A table of the best tree by context and batch, made from a result of `jaxspec lab table`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxspec.report.wording import at_temperature, figure_names

OPTIONS = ("batches", "contexts", "figures")
FIGURES = {
    "size": lambda row: f"{row['nodes']}x{row['depth']}",
    "tree": lambda row: f"`{row['spec']}`",
    "speedup": lambda row: f"{row['speedup']:.2f}",
    "tau": lambda row: f"{row['expected_tau']:.2f}",
}
"""Figure of a tree in the option `figures` -> its text."""
BY_DEFAULT = "size,speedup"


def by_place(options: Mapping[str, str], found: Mapping[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Returns the columns, a line for each context, and what their numbers depend on.

    Raises ValueError naming an option that the result has nothing for.
    """
    names = figure_names(options, FIGURES, BY_DEFAULT)
    batches, contexts = (_sizes(name, options, found[name]) for name in ("batches", "contexts"))
    cells = {(row["batch"], row["context"]): row for row in found["rows"]}
    lines = [[f"{c:,}", *(_cell(cells[b, c], names) for b in batches)] for c in contexts]
    return ["context", *(f"batch {b}" for b in batches)], lines, _about(found, names)


def _sizes(name: str, options: Mapping[str, str], known: Sequence[int]) -> list[int]:
    if name not in options:
        return list(known)
    texts = options[name].split(",")
    if stranger := next((text for text in texts if text not in map(str, known)), None):
        raise ValueError(f"nothing was searched for {name} {stranger}; there are {', '.join(map(str, known))}")
    return [int(text) for text in texts]


def _cell(row: Mapping[str, Any], names: Sequence[str]) -> str:
    return "plain" if row["nodes"] == 1 else ", ".join(FIGURES[name](row) for name in names)


def _about(found: Mapping[str, Any], names: Sequence[str]) -> str:
    """Returns what stands below a table: the figures of a cell, and everything that they depend on."""
    meant = {"size": "nodes x depth", "tree": "the tree", "speedup": "times plain decoding's tokens/s", "tau": "tau"}
    made = found["made_from"]
    costs, profile, limits = made["costs"], made["profile"], made["limits"]
    warm = at_temperature(profile["temperature"] or 0.0)
    branch = "" if limits["max_branch"] is None else f", {limits['max_branch']} child a node at most"
    return (
        f"Each cell: {', '.join(meant[name] for name in names)}. Costs of {costs['device']} ({costs['source']}), "
        f"target {costs['target']}, drafter {costs['drafter']}, {costs['dtype']}; acceptance of {profile['file']}, "
        f"{warm}; up to {limits['max_nodes']} nodes and {limits['max_depth']} levels{branch}:"
    )
