"""Tables of the best tree by context and batch, made from results of `jaxspec lab table`."""

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
DASH = "–"
BY_DEFAULT = "size,speedup"


def by_place(options: Mapping[str, str], found: Mapping[str, Any]) -> tuple[list[str], list[list[str]], str]:
    """Returns the columns, a line for each context, and what their numbers depend on.

    Raises ValueError naming an option that the result has nothing for.
    """
    names = figure_names(options, FIGURES, BY_DEFAULT)
    batches, contexts = (_sizes(name, options, found[name]) for name in ("batches", "contexts"))
    cells = {(row["batch"], row["context"]): row for row in found["rows"]}
    lines = [[f"{c:,}", *(_cell(cells.get((b, c)), names) for b in batches)] for c in contexts]
    return ["context", *(f"batch {b}" for b in batches)], lines, _about(found, names, lines)


def _sizes(name: str, options: Mapping[str, str], known: Sequence[int]) -> list[int]:
    if name not in options:
        return list(known)
    texts = options[name].split(",")
    if stranger := next((text for text in texts if text not in map(str, known)), None):
        raise ValueError(f"nothing was searched for {name} {stranger}; there are {', '.join(map(str, known))}")
    return [int(text) for text in texts]


def _cell(row: Mapping[str, Any] | None, names: Sequence[str]) -> str:
    """Returns the text of a batch and context; a dash where costs or memory refused it."""
    if row is None:
        return DASH
    return "plain" if row["nodes"] == 1 else ", ".join(FIGURES[name](row) for name in names)


def by_result(
    options: Mapping[str, str], results: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[list[str]], str]:
    """Returns the columns, a line for each result and context, and what all results depend on.

    The first columns are what sets the results apart: targets, drafters, devices or sources of costs, limits. Raises
    ValueError if nothing does, and naming an option that a result has nothing for.
    """
    facts = [_facts(found) for found in results]
    apart = [name for name in facts[0] if len({fact[name] for fact in facts}) > 1]
    told = [name for name in apart if name != "acceptance"]
    if len({tuple(fact[name] for name in told) for fact in facts}) < len(facts):
        raise ValueError(
            f"two of the results are alike in {', '.join(n for n in facts[0] if n != 'acceptance')}: give one"
        )
    tables = [by_place(options, found) for found in results]
    if len({tuple(columns) for columns, _, _ in tables}) > 1:
        raise ValueError("the results have different batches: choose some that all have, such as batches=1,8")
    (_, *batches), shown = tables[0][0], len({line[0] for _, lines, _ in tables for line in lines}) > 1
    rows = [
        [*(f"`{fact[name]}`" if name == "drafter" else fact[name] for name in told), *line[0 if shown else 1 :]]
        for fact, (_, lines, _) in zip(facts, tables, strict=True)
        for line in lines
    ]
    same = {name: text for name, text in facts[0].items() if name not in apart}
    if not shown:
        same["context"] = f"{tables[0][1][0][0]} tokens"
    if "acceptance" in apart:
        same["acceptance"] = "each its own"
    names = figure_names(options, FIGURES, BY_DEFAULT)
    about = f"Each cell: {_meanings(names, rows)}; {', '.join(f'{name} {text}' for name, text in same.items())}:"
    return [*told, *(["context"] if shown else []), *batches], rows, about


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    """Returns what trees depend on, besides batch, context and limits, as a reader is told it."""
    costs, profile = found["made_from"]["costs"], found["made_from"]["profile"]
    return {
        **{name: costs[name] for name in ("target", "drafter", "device")},
        "costs": costs["source"],
        "dtype": costs["dtype"],
        "temperature": f"{profile['temperature'] or 0.0:g}",
        "limits": _limits(found),
        "acceptance": profile["file"],
    }


def _about(found: Mapping[str, Any], names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns what stands below a table: the figures of a cell, and everything that they depend on."""
    costs, profile = found["made_from"]["costs"], found["made_from"]["profile"]
    warm = at_temperature(profile["temperature"] or 0.0)
    return (
        f"Each cell: {_meanings(names, lines)}. Costs of {costs['device']} ({costs['source']}), "
        f"target {costs['target']}, drafter {costs['drafter']}, {costs['dtype']}; acceptance of {profile['file']}, "
        f"{warm}; {_limits(found)}:"
    )


def _meanings(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    meant = {"size": "nodes x depth", "tree": "the tree", "speedup": "times plain decoding's tokens/s", "tau": "tau"}
    refused = f" ({DASH}: beyond the costs or the memory)" if any(DASH in line for line in lines) else ""
    return ", ".join(meant[name] for name in names) + refused


def _limits(found: Mapping[str, Any]) -> str:
    limits = found["made_from"]["limits"]
    branch = "" if limits["max_branch"] is None else f", {limits['max_branch']} child a node at most"
    return f"up to {limits['max_nodes']} nodes and {limits['max_depth']} levels{branch}"
