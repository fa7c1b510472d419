"""A table of recipes, made from a result of `jaxspec compare`: tau, and its ratio to the baseline, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxspec.report.runs import ALL
from jaxspec.report.wording import at_temperature, interval, known

OPTIONS = ("tree", "temperature", "source", "recipes", "facts", "intervals")
FACTS = {"parameters": "drafter_parameters", "passes": "drafter_passes", "seeds": "seeds"}
"""Fact of a recipe in the option `facts` -> its key in a result."""
Figures = Mapping[str, Any]
Place = tuple[str, float]
"""A tree and a temperature."""


def by_recipe(options: Mapping[str, str], found: Figures) -> tuple[list[str], list[list[str]], str]:
    """Returns the columns, the lines, one a recipe and the best first, and what their numbers depend on.

    Raises ValueError naming an option that the result has nothing for.
    """
    source, baseline = options.get("source", ALL), found["baseline"]
    rows = [row for row in found["recipes"] if row["source"] == source]
    if not rows:
        raise ValueError(f"there is no source {source!r}; there are {_listed(r['source'] for r in found['recipes'])}")
    trees = _chosen("tree", options, dict.fromkeys(row["tree"] for row in rows), most=1)
    warm = _chosen("temperature", options, dict.fromkeys(f"{t:g}" for t in sorted({r["temperature"] for r in rows})))
    places: list[Place] = [(tree, float(t)) for tree in trees for t in warm]
    here = {(row["recipe"], row["tree"], row["temperature"]): row for row in rows}
    names = _chosen("recipes", options, dict.fromkeys(row["recipe"] for row in rows))
    # A recipe without a figure in the first place stands last.
    names.sort(key=lambda name: -(here.get((name, *places[0])) or {"tau": 0.0})["tau"])
    facts = [fact for fact in options.get("facts", "").split(",") if fact]
    if stranger := next((fact for fact in facts if fact not in FACTS), None):
        raise ValueError(f"there is no fact {stranger!r}; there are {', '.join(FACTS)}")
    whole = options.get("intervals", "yes")
    if whole not in ("yes", "no"):
        raise ValueError(f"intervals={whole} must be yes or no")
    columns = ["recipe", *facts]
    for place in places:
        columns += [_place(place, len(trees) > 1), f"over `{baseline}`"]
    lines = []
    for name in names:
        mine = [here.get((name, *place)) for place in places]
        known_row = next(row for row in mine if row is not None) if any(mine) else {}
        cells = [_fact(known_row, fact) for fact in facts]
        lines.append([f"`{name}`", *cells, *(cell for row in mine for cell in _cells(row, baseline, whole == "yes"))])
    return columns, lines, _about(found, [here[key] for key in here if key[0] in names], trees, whole == "yes")


def _chosen(name: str, options: Mapping[str, str], there: Mapping[str, Any], most: int | None = None) -> list[str]:
    """Returns the values of an option, by default the first `most` of those that there are."""
    if name not in options:
        return list(there)[:most]
    given = options[name].split(",")
    if stranger := next((value for value in given if value not in there), None):
        raise ValueError(f"{name}={stranger} was not compared; there are {_listed(there)}")
    return given


def _listed(values: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _place(place: Place, with_tree: bool) -> str:
    tree, temperature = place
    return f"`{tree}`, {at_temperature(temperature)}" if with_tree else f"tau, {at_temperature(temperature)}"


def _fact(row: Figures, fact: str) -> str:
    value = row.get(FACTS[fact])
    return "-" if value is None else f"{len(value) if isinstance(value, list) else value:,}"


def _cells(row: Figures | None, baseline: str, whole: bool) -> list[str]:
    if row is None:
        return ["-", "-"]
    ratio = "1" if row["recipe"] == baseline else _told(row, "ratio", 3, whole)
    return [_told(row, "tau", 2, whole), ratio]


def _told(row: Figures, name: str, digits: int, whole: bool) -> str:
    if not known(row.get(name)):
        return "-"
    value, low, high = interval(row, name)
    ends = f" [{low:.{digits}f}, {high:.{digits}f}]" if whole and known(low) else ""
    return f"{value:.{digits}f}{ends}"


def _about(found: Figures, rows: Sequence[Figures], trees: Sequence[str], whole: bool) -> str:
    tokens = {f"{row['train_tokens'] / 1e6:.2f}M" for row in rows if row.get("train_tokens")}
    trained = " and ".join(sorted(tokens)) or "no"
    cut: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["tree"] in trees and row["drafted_tree"] != row["tree"]:
            cut.setdefault(row["drafted_tree"], {})[row["recipe"]] = None
    shorter = "".join(f", {tree} for {' and '.join(mine)}" for tree, mine in cut.items())
    brackets = "; in brackets 95 % over prompts" if whole else ""
    named = "" if len(trees) > 1 else f"tree {trees[0]}, "
    if "target" in found:  # as in results of before there is none
        named = f"target {Path(found['target']).name}, {named}"
    prompts = max(row["prompts"] for row in rows)
    return (
        f"{prompts:,} held-out prompts, {named}{trained} trained tokens, up to {found['max_new_tokens']:,} new tokens, "
        f"{found['dtype']}{shorter}{_vocabularies(found, rows)}{brackets}:"
    )


def _vocabularies(found: Figures, rows: Sequence[Figures]) -> str:
    """Returns the sizes of the draft vocabularies of the recipes in a table, with their recipes where they differ."""
    recipes, sizes = dict.fromkeys(row["recipe"] for row in rows), dict[int, list[str]]()
    for recipe in recipes:
        scored = found.get("settings", {}).get(recipe, {}).get("draft_vocab")
        if scored is not None and "tokens" in scored:
            sizes.setdefault(scored["tokens"], []).append(recipe)
    whose = {size: "" if len(mine) == len(recipes) else f" for {' and '.join(mine)}" for size, mine in sizes.items()}
    return "".join(f", a draft vocabulary of {size:,}{names}" for size, names in whose.items())
