"""Write one page about a search for draft trees: the best trees drawn, what they are predicted to do, and why.

Every acceptance profile is searched with every file of costs. The page is one HTML file that loads nothing.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tyro

from jaxspec.console import cli, marks, progress, results
from jaxspec.lab.findings import SearchFinding, find, machine_of, name_files
from jaxspec.lab.flags import LimitFlags, SearchFlags
from jaxspec.lab.predicted import Comparison, compare, read_bench
from jaxspec.lab.report import Making, make_page
from jaxspec.pages.pictures import check_page_flags, write_page


@dataclass(frozen=True, kw_only=True)
class Args(LimitFlags):
    out: marks.Positional[Path]
    """The page, a file that ends in .html."""
    profile: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Acceptance profile of jaxspec lab profile; repeat the flag for more."""
    cost: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Costs of jaxspec lab cost, of one machine and source; repeat the flag for more."""
    batch: int | None = None
    """Rows decoded together, for which the trees are drawn; default: the least batch of the costs."""
    context: int | None = None
    """Committed tokens of a row; default: the middle one of the costs."""
    batches: str | None = None
    """Batches of the map, such as 1,2,4,8; default: those of each file of costs."""
    contexts: str | None = None
    """Contexts of the map, such as 512,2048; default: those of each file of costs."""
    measured: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Result of jaxspec bench decode --json or lab check --json, to compare predictions with; repeat the flag for
    more."""
    png: Path | None = None
    """Folder for pictures of the page and of every figure; needs Chromium."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cli.refuse_below_one(self, "batch", "context")
        check_page_flags(self.out, self.png)
        for name in ("profile", "cost"):
            given = getattr(self, name)
            if not given:
                raise ValueError(f"a report needs a --{name}: make one with jaxspec lab {name}")
            twice = [path for path in given if given.count(path) > 1]
            if twice:
                raise ValueError(f"--{name} {twice[0]} is given twice; give every file once")
        _ = self.over

    @property
    def over(self) -> tuple[list[int] | None, list[int] | None]:
        """Batches and contexts of the map; None: those of the costs."""
        batches, contexts = (
            None if (text := getattr(self, name)) is None else sorted(cli.sizes(f"--{name}", text))
            for name in ("batches", "contexts")
        )
        return batches, contexts


def main(argv: list[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec lab report", description=__doc__ or "")
    measured = [arm for path in args.measured for arm in read_bench(Path(path))]
    findings = find_all(args)
    comparison = compare(measured, findings)
    page = make_page(findings, comparison, len(args.measured), Making(command_of(argv), results.versions()))
    pictures = write_page(args.out, page, args.png)
    if args.json is not None:
        results.write_json(args.json, make_result(args, findings, comparison, pictures, started))
    return 0


def find_all(args: Args) -> list[SearchFinding]:
    """Returns a search in every profile with every file of costs. Raises ValueError naming a file that is none."""
    shared = {field.name: getattr(args, field.name) for field in fields(LimitFlags)}
    pairs = [SearchFlags(**shared, profile=Path(p), cost=Path(c)) for p in args.profile for c in args.cost]
    # All files are read before the first search, which takes its time.
    names = name_files([Path(p) for p in args.profile], {flags.cost: machine_of(flags) for flags in pairs})
    found = []
    with progress.progress("searching", len(pairs), "searches") as bar:
        for flags in pairs:
            mine = names[flags.profile, flags.cost]
            found.append(find(flags, mine, (args.batch, args.context), args.over))
            bar.advance(1, mine.whole)
    return found


def command_of(argv: list[str]) -> str:
    """Returns the command line that makes the page again."""
    return shlex.join(["jaxspec", "lab", "report", *argv])


def make_result(
    args: Args, findings: list[SearchFinding], comparison: Comparison, pictures: list[Path], started: float
) -> dict[str, Any]:
    """Returns the verb's JSON."""
    return results.result(
        "lab report",
        dtype=str(findings[0].flags.inputs.costs.facts.get("dtype") or "fp32"),
        seed=args.seed,
        started=started,
        page=args.out,
        pictures=pictures,
        rows=[finding.row() for finding in findings],
        measured=[
            {
                **c.measured._asdict(),
                "search": c.finding.names.whole,
                "expected_tau": c.predicted.tau.value,
                "predicted_tokens_per_second": c.predicted.tokens_per_second.value,
                "error": c.error,
            }
            for c in comparison.compared
        ],
        left_out=[{**arm._asdict(), "reason": reason} for arm, reason in comparison.left_out],
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
