"""Find the best draft tree for every batch and context, as a table that a server can load; or rate one tree there."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxspec import __version__
from jaxspec.console import cli, results, tables
from jaxspec.lab.flags import SearchFlags
from jaxspec.lab.grown import replayed_tree
from jaxspec.lab.search import Rated, left_out
from jaxspec.trees import StaticTree, chain

FORMAT = "jaxspec tree table 1"


@dataclass(frozen=True, kw_only=True)
class Args(SearchFlags):
    batches: str | None = None
    """Batches, such as 1,2,4,8; default: those of the costs."""
    contexts: str | None = None
    """Committed tokens of a row, such as 512,2048; default: those of the costs."""
    tree: str | None = None
    """Instead of the best tree of each cell: one tree, and what it makes of all of them: a static one or
    a chain, or best_first and dynamic for a one-pass drafter."""
    out: Path | None = None
    """File for the table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tree is not None:
            replayed_tree(self.tree)
        for name in ("batches", "contexts"):
            if (text := getattr(self, name)) is not None:
                sorted(cli.sizes(f"--{name}", text))


def main(argv: list[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec lab table", description=__doc__ or "")
    table = make_table(args)
    print_grid(table)
    if args.out is not None:
        results.write_json(args.out, table)
        sys.stdout.write(f"{args.out}: trees by batch and context\n")
    if args.json is not None:
        dtype = str(args.inputs.costs.facts.get("dtype") or "fp32")
        keys = {key: value for key, value in table.items() if key != "format"}
        results.write_json(
            args.json,
            results.result("lab table", dtype=dtype, seed=args.seed, started=started, table=args.out, **keys),
        )
    return 0


def make_table(args: Args) -> dict[str, Any]:
    """Returns the table: a row for each batch and context, and the drafts' lengths where all trees are chains."""
    known = args.cost_grid
    batches = list(known[0]) if args.batches is None else sorted(cli.sizes("--batches", args.batches))
    contexts = list(known[1]) if args.contexts is None else sorted(cli.sizes("--contexts", args.contexts))
    tree = None if args.tree is None else replayed_tree(args.tree)
    nodes = 1 if tree is None else tree.nodes
    why = {(batch, context): args.refusal(batch, context, nodes) for context in contexts for batch in batches}
    refused = {cell: reason for cell, reason in why.items() if reason is not None}
    cells = [cell for cell in why if cell not in refused]
    if not cells:
        raise ValueError(f"{args.cost}: {next(iter(refused.values()))}")
    search = args.search(cells)
    costs = [args.cost_at(*cell) for cell in cells]
    choices = [] if tree is not None else [search.choose(cost) for cost in costs]
    rated = [c.chosen for c in choices] if tree is None else [search.rate(tree, cost) for cost in costs]
    rows = [make_row(one, search.rate(chain(0), cost)) for one, cost in zip(rated, costs, strict=True)]
    chains = all(isinstance(one.tree, StaticTree) and one.tree.nodes == one.tree.depth + 1 for one in rated)
    return {
        "format": FORMAT,
        "batches": batches,
        "contexts": contexts,
        "rows": rows,
        "refused": [place(cell) | {"reason": reason} for cell, reason in refused.items()],
        "doubts": [place(at) | {"doubt": c.slower} for at, c in zip(cells, choices, strict=False) if c.slower],
        "draft_len_schedule": schedules(rows) if chains else None,
        "made_from": args.made_from(search) | {"tree": args.tree, "jaxspec": __version__},
    }


def place(cell: tuple[int, int]) -> dict[str, Any]:
    """Returns a batch and context as keys of a row."""
    return {"batch": cell[0], "context": cell[1]}


def make_row(tree: Rated, plain: Rated) -> dict[str, Any]:
    """Returns a row of the table."""
    speed = plain.tokens_per_second.value
    return {
        **tree.row(),
        "plain_tokens_per_second": speed,
        "speedup": tree.tokens_per_second.value / speed,
    }


def schedules(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Returns by context the draft's length for batches up to each key, longest batches of one length alone."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        mine = found.setdefault(str(row["context"]), {})
        if mine and list(mine.values())[-1] == row["depth"]:
            mine.popitem()
        mine[str(row["batch"])] = row["depth"]
    return found


def print_grid(table: dict[str, Any]) -> None:
    """Prints nodes and depth of each cell with its speed-up, contexts down and batches across, then the trees."""
    cells = {(row["batch"], row["context"]): row for row in table["rows"]}
    columns = ["context", *(f"batch {batch}" for batch in table["batches"])]
    grid = [[c, *(cell_text(cells.get((batch, c))) for batch in table["batches"])] for c in table["contexts"]]
    of = "the tree" if table["made_from"]["tree"] else "the best tree"
    tables.print_table(f"Nodes x depth of {of}, and tokens/s over plain decoding", columns, grid)
    specs = dict.fromkeys(row["spec"] for row in table["rows"])
    for spec in specs:
        row = next(row for row in table["rows"] if row["spec"] == spec)
        sys.stdout.write(f"{row['nodes']}x{row['depth']}: {spec}\n")
    if (told := left_out(table["made_from"]["shapes_unpriced"])) is not None:
        sys.stdout.write(f"{told}\n")
    for name, key in (("refused", "reason"), ("doubts", "doubt")):
        for told in table[name]:
            sys.stdout.write(f"batch {told['batch']}, context {told['context']}: {told[key]}\n")


def cell_text(row: dict[str, Any] | None) -> str:
    """Returns a cell of the grid; that of a refused batch and context is a dash."""
    if row is None:
        return "–"
    return "plain" if row["nodes"] == 1 else f"{row['nodes']}x{row['depth']}, {row['speedup']:.2f}x"


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
