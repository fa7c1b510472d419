"""The page about a search for draft trees: one file with all its figures, which loads and runs nothing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxspec.lab.acceptance_pictures import acceptance_pictures, calibration_pictures
from jaxspec.lab.costs import differences
from jaxspec.lab.findings import SearchFinding
from jaxspec.lab.flags import digest
from jaxspec.lab.map_picture import map_picture, plain_cells
from jaxspec.lab.predicted import Comparison
from jaxspec.lab.predicted_pictures import predicted_section
from jaxspec.lab.size_pictures import sensitivity_picture, size_pictures
from jaxspec.lab.tree_picture import tree_picture
from jaxspec.pages.markup import Content, Markup, element, joined
from jaxspec.pages.page import DataTable, Picture, Section, bullets, document, facts, folded, grid, paragraph, table

TITLE = "A search for draft trees"
SOURCES = {
    "measured": "measured: a clock on the machine",
    "compiled": "compiled: not run; from the compiler's programs, cycles and traffic for the chip",
    "roofline": "roofline: not run; bytes at the bandwidth or FLOPs at the peak, so that nothing is faster",
}
TERMS = [
    ("tau", "tokens per target call, the bonus token included; prefill and its token are not counted"),
    ("tokens/s", "tau times the batch over the seconds of a round: of all rows together, without prefill"),
    ("x plain", "tokens/s over those of plain decoding by the same costs"),
    ("nodes", "positions of the target's call for a row, the root included; one node is plain decoding"),
    ("chosen", "of the prompts that choose the fastest tree, or the smallest that they cannot tell from it within 1 %"),
    ("intervals", "95 %, by resampling prompts; of costs there is no interval"),
    ("halves", "one half of the prompts chooses the trees, all figures of trees are of the other half"),
]
COLUMNS = ["search", "batch", "context", "nodes", "levels", "tau", "tokens/s", "plain tokens/s", "x plain"]
COLUMNS += ["shapes tried"]


class Making(NamedTuple):
    """The making of a page, which it ends with."""

    command: str
    versions: Mapping[str, Any]
    """Names and versions of programs, machine, commit; None is left out."""


def make_page(findings: Sequence[SearchFinding], comparison: Comparison, measured: int, making: Making) -> str:
    """Returns the page; `measured` is the number of files that the comparison was made of."""
    by_profile = {f.names.profile: [g for g in findings if g.names.profile == f.names.profile] for f in findings}
    several = len(by_profile) > 1
    sizes = [(name, size_pictures(mine, i)) for i, (name, mine) in enumerate(by_profile.items(), 1)]
    profiles = [(name, mine[0].flags.inputs.profile) for name, mine in by_profile.items()]
    accepted = [acceptance_pictures(profile, name, i) for i, (name, profile) in enumerate(profiles, 1)]
    calibrated = [calibration_pictures(profile, name, i) for i, (name, profile) in enumerate(profiles, 1)]
    maps = [map_picture(f, i) for i, f in enumerate(findings, 1)]
    errors = [sensitivity_picture(f, i) for i, f in enumerate(findings, 1)]
    sections = [
        Section("best", "The best trees", joined(table(best_table(findings)), _cautions(findings))),
        Section("trees", "The trees drawn", drawn_trees(findings)),
        Section("size", "How large a tree pays", joined(*(_sizes(name, p, several) for name, p in sizes))),
        Section("acceptance", "Acceptance by depth and rank", joined(*map(grid, accepted))),
        Section("calibration", "Calibration of the drafter", _or_none(calibrated)),
        Section("map", "Batch and context", joined(paragraph(where_plain(findings)), grid(maps))),
        Section("measured", "Prediction against measurement", predicted_section(comparison, measured)),
        Section("errors", "If a figure were off", grid(errors)),
        Section("made", "How this page was made", _made(findings, making)),
    ]
    return document(TITLE, lead(findings), sections, "Predictions, unless a figure says that it was measured.")


def _sizes(name: str, pictures: Sequence[Sequence[Picture]], several: bool) -> Markup:
    return joined(element("h3", f"Acceptance of {name}") if several else None, *map(grid, pictures))


def _or_none(pictures: Sequence[Sequence[Picture]]) -> Markup:
    if not any(pictures):
        return paragraph("No profile holds the draft probabilities of children.")
    return joined(*(grid(mine) for mine in pictures if mine))


def drawn_trees(findings: Sequence[SearchFinding]) -> Markup:
    """Returns the drawings of the chosen trees, and a sentence for searches where none pays."""
    pays = [f for f in findings if f.choice.chosen.shape]
    trees = [tree_picture(f"tree-{i}", f.names.whole, f.choice.chosen.shape, f.shares) for i, f in enumerate(pays, 1)]
    others = [f.names.whole for f in findings if not f.choice.chosen.shape]
    told = f"No tree pays, and plain decoding is fastest: {'; '.join(others)}." if others else None
    return joined(grid(trees) if trees else None, None if told is None else paragraph(told))


def _cautions(findings: Sequence[SearchFinding]) -> Markup:
    return joined(*(paragraph(text, soft=True) for text in cautions(findings)))


def cautions(findings: Sequence[SearchFinding]) -> list[str]:
    """Returns what a reader must know: models that differ, simulated texts, choices that prompts do not confirm."""
    found = []
    for f in findings:
        of = f.flags.made_from(f.search)
        models = [f"{of[part]['drafter']} for {of[part]['target']}" for part in ("profile", "costs")]
        if models[0] != models[1]:
            found.append(f"{f.names.whole}: acceptance is of {models[0]}, costs are of {models[1]}.")
        if f.flags.inputs.profile.facts.get("kind") == "simulated":
            found.append(f"{f.names.profile}: ranks are drawn from given rates, each place by itself.")
        found += [f"{f.names.whole}: {told}." for told in (f.choice.doubt, f.search.left_out) if told is not None]
    return list(dict.fromkeys(found))


def lead(findings: Sequence[SearchFinding]) -> Markup:
    """Returns the answers, a sentence a search."""
    return bullets(map(answer, findings))


def answer(finding: SearchFinding) -> Markup:
    """Returns the chosen tree of a search in a sentence."""
    chosen = finding.choice.chosen
    where = f", batch {chosen.batch}, context {chosen.context:,}: "
    if not chosen.shape:
        level = chosen.tokens_per_second.value
        text = f"no tree pays; plain decoding gives {level:,.4g} tokens/s."
    else:
        text = (
            f"a tree of {chosen.tree.nodes} nodes and {chosen.tree.depth} levels, {chosen.tau.value:.2f} tokens per "
            f"target call, {finding.speedup:.2f} times the tokens/s of plain decoding."
        )
    return joined(element("strong", finding.names.whole), where, text)


def best_table(findings: Sequence[SearchFinding]) -> DataTable:
    """Returns the chosen tree of every search, with intervals."""
    rows = []
    for f in findings:
        chosen, plain = f.choice.chosen, f.choice.plain.tokens_per_second.value
        speed = chosen.tokens_per_second
        spread = f"{_short(speed.value)} [{_short(speed.low)}, {_short(speed.high)}]"
        sizes = chosen.batch, chosen.context, chosen.tree.nodes, chosen.tree.depth
        rows.append([f.names.whole, *sizes, str(chosen.tau), spread, plain, f.speedup, f.search.candidates.tried])
    return DataTable("Best trees, with 95 % intervals over prompts", COLUMNS, rows)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def where_plain(findings: Sequence[SearchFinding]) -> str:
    """Returns in a sentence where drafts do not help."""
    found = [(f.names.whole, b, c) for f in findings for b, c in plain_cells(f)]
    if not found:
        return "A tree pays at every batch and context that was tried."
    tried = sum(len(f.cells) for f in findings)
    cells = "; ".join(f"{name}: batch {b}, context {c:,}" for name, b, c in found[:8])
    return f"Plain decoding is fastest at {len(found)} of {tried}: {cells}{' and others' if len(found) > 8 else ''}."


# How it was made.


def _made(findings: Sequence[SearchFinding], making: Making) -> Markup:
    known = [(name, str(value)) for name, value in making.versions.items() if value is not None]
    profiles = {f.flags.profile: f for f in findings}
    costs = {f.flags.cost: f for f in findings}
    return joined(
        element("h3", "Command"),
        element("pre", making.command),
        element("h3", "Files"),
        table(_profile_table(profiles)),
        table(_cost_table(costs)),
        *(paragraph(SOURCES[name], soft=True) for name in sorted(_sources(findings) & SOURCES.keys())),
        *map(table, _apart(costs)),
        element("h3", "Search"),
        facts(_limits(findings[0])),
        element("h3", "Terms"),
        facts(TERMS),
        element("h3", "Versions"),
        facts(known),
        folded("All facts of the files", *(_all_facts(f) for f in findings)),
    )


def _profile_table(profiles: Mapping[Any, SearchFinding]) -> DataTable:
    names = ("kind", "target", "drafter", "temperature", "mode", "rule")
    rows = []
    for path, f in profiles.items():
        profile = f.flags.inputs.profile
        reporting = len(f.search.reporting.sources)
        counts = len(profile.sources) - reporting, reporting, len(profile.prompt_T)
        rows.append([str(path), digest(path), *(profile.facts.get(name) for name in names), *counts])
    return DataTable(
        "Acceptance profiles", ["file", "SHA-256", *names, "prompts choosing", "reporting", "places"], rows
    )


def _cost_table(costs: Mapping[Any, SearchFinding]) -> DataTable:
    names = ("target", "drafter", "dtype", "device", "source")
    rows = []
    for path, f in costs.items():
        known = f.flags.inputs.costs.facts
        rows.append([str(path), digest(path), *(known.get(name) for name in names)])
    return DataTable("Costs of a round", ["file", "SHA-256", *names], rows)


def _sources(findings: Sequence[SearchFinding]) -> set[str]:
    return {str(f.flags.inputs.costs.facts.get("source")) for f in findings}


def _apart(costs: Mapping[Any, SearchFinding]) -> list[DataTable]:
    """Returns how far costs are from measured ones of the same device, part by part, where both are given."""
    columns = ["part", "sizes", "ratio, median", "error, median", "error, worst"]
    found = []
    for mine, other in itertools.permutations(costs.values(), 2):
        ours, theirs = mine.flags.inputs.costs, other.flags.inputs.costs
        alike = all(ours.facts.get(name) == theirs.facts.get(name) for name in ("device", "target"))
        if alike and theirs.facts.get("source") == "measured" != ours.facts.get("source"):
            rows = [
                [d.part, d.points, d.ratio, d.median_error, d.worst_error] for d in differences(ours.rows, theirs.rows)
            ]
            caption = f"Costs of {mine.flags.cost.name} against the measured ones of {other.flags.cost.name}"
            found.append(DataTable(caption, columns, rows))
    return found


def _limits(finding: SearchFinding) -> list[tuple[str, Content]]:
    made = finding.flags.made_from(finding.search)
    limits = [(name.replace("_", " "), str(value)) for name, value in made["limits"].items() if value is not None]
    return [*limits, ("seed of the halves", str(made["seed"]))]


def _all_facts(finding: SearchFinding) -> Markup:
    inputs = finding.flags.inputs
    told = {"profile": inputs.profile.facts, "costs": inputs.costs.facts}
    lines = [(f"{part}: {name}", _cut(value)) for part, known in told.items() for name, value in known.items()]
    return joined(element("h3", finding.names.whole), facts(lines))


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."
