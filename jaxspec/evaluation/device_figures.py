"""Figures of a device that follow from measured ones: shares of its peak, efficiency, what lies outside forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxspec.planning.chips import GPUS
from jaxspec.planning.work import frontier_widths
from jaxspec.trees import parse_tree

Row = dict[str, Any]
AIMS = {
    "plain decoding, share of the bandwidth": 0.90,
    "verification of the tree over one token": 1.15,
    "outside the forwards, share of a round": 0.03,
    "efficiency": 0.90,
    "MFU of hass, over the measured matmul rate": 0.50,
    "MFU of fspad, over the measured matmul rate": 0.50,
}
"""Goals, decoding's at the smallest batch and prefix: verification and the rest of a round at most, others at least.

Each recipe has a goal of its own: the fastest of them says nothing of the others.
"""
MFU = "MFU of {recipe}, over the measured matmul rate"


class Peaks(NamedTuple):
    """Measured rates a second; None where they have not been measured."""

    bytes: float | None
    flops: float | None


def peaks(rows: Sequence[Row]) -> Peaks:
    """Returns the greatest bandwidth of the copy and of the sum, and the rate of the large matmul."""
    moved = [row["bytes_per_second"] for row in rows if what(row) in ("copy", "read") and row["bytes_per_second"]]
    rates = [row["flops_per_second"] for row in rows if what(row) == "matmul" and row["flops_per_second"]]
    return Peaks(max(moved, default=None), max(rates, default=None))


def what(row: Row) -> str:
    """Returns the kind of a row's measurement."""
    return row["settings"]["what"]


def share(row: Row, peak: Peaks) -> float | None:
    """Returns the seconds that bandwidth and matmuls allow, by those it took; None without both rates or the work."""
    if peak.bytes is None or peak.flops is None or not row.get("seconds") or not (row.get("bytes") or row.get("flops")):
        return None
    return max((row.get("bytes") or 0) / peak.bytes, (row.get("flops") or 0) / peak.flops) / row["seconds"]


def complete(rows: Sequence[Row], device: str) -> list[Row]:
    """Returns the rows with their shares of the measured peak, and of the data sheet's where the device is known."""
    peak, sheet = peaks(rows), GPUS.get(device)
    vendor = Peaks(sheet.hbm_bandwidth, sheet.flops) if sheet else Peaks(None, None)
    one = {_place(row): row["seconds"] for row in rows if what(row) == "verify" and row["settings"]["nodes"] == 1}
    return [
        {
            **row,
            "share_of_peak": share(row, peak),
            "share_of_data_sheet": share(row, vendor),
            **({"over_one_token": _over(row["seconds"], one.get(_place(row)))} if what(row) == "verify" else {}),
        }
        for row in rows
    ]


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _place(row: Row) -> tuple[int, int]:
    return row["settings"]["batch"], row["settings"]["prefix"]


def rounds(rows: Sequence[Row]) -> list[Row]:
    """Returns a row a batch and prefix whose whole round was measured, with what follows from its parts."""
    by_kind = {
        (what(row), _place(row), row["settings"].get("nodes")): row
        for row in rows
        if "prefix" in row["settings"] and "xla" not in row["settings"] and row.get("seconds")
    }
    found = []
    for (kind, place, _), row in by_kind.items():
        if kind == "round":
            tree = parse_tree(row["settings"]["tree"])
            level, extend = by_kind.get(("draft_level", place, None)), by_kind.get(("draft_extend", place, None))
            target, plain = by_kind.get(("verify", place, tree.nodes)), by_kind.get(("plain", place, None))
            found.append(_round(row, target, plain, _drafting(tree, level, extend)))
    return found


def _drafting(tree: Any, level: Row | None, extend: Row | None) -> float | None:
    """Returns the seconds of the drafter's forward passes in a round: `extend`, then one a further level."""
    levels = len(frontier_widths(tree, max(64, tree.nodes)))
    if extend is None or (levels and level is None):
        return None
    return extend["seconds"] + (levels * level["seconds"] if level else 0.0)


def _round(row: Row, target: Row | None, plain: Row | None, drafting: float | None) -> Row:
    seconds = row["seconds"]
    outside = None if target is None or drafting is None else seconds - target["seconds"] - drafting
    speedup = None if plain is None else row["tau"] * plain["seconds"] / seconds
    return {
        "batch": row["settings"]["batch"],
        "prefix": row["settings"]["prefix"],
        "tau": row["tau"],
        "round_seconds": seconds,
        "plain_seconds": plain and plain["seconds"],
        "target_seconds": target and target["seconds"],
        "draft_seconds": drafting,
        "outside_seconds": outside,
        "outside_share": None if outside is None else outside / seconds,
        "speedup": speedup,
        "efficiency": None if speedup is None else speedup / row["tau"],
    }


def goals(rows: Sequence[Row], found: Sequence[Row]) -> list[Row]:
    """Returns each goal with its aim and what was measured, None where that is missing."""
    peak, done = peaks(rows), [row for row in rows if row.get("seconds")]
    plain = next((row for row in done if what(row) == "plain" and row["part"] == 1), None)
    first = min(found, key=lambda row: (row["batch"], row["prefix"]), default=None)
    steps = {MFU.format(recipe=r["settings"]["recipe"]): r for r in done if what(r) == "train_step"}
    measured = {
        "plain decoding, share of the bandwidth": plain and peak.bytes and plain["bytes_per_second"] / peak.bytes,
        "verification of the tree over one token": first and _widest(done, first),
        "outside the forwards, share of a round": first and first["outside_share"],
        "efficiency": first and first["efficiency"],
        **{goal: peak.flops and row["flops_per_second"] / peak.flops for goal, row in steps.items()},
    }
    # Of training, what the usual MFU is over stands beside it, where the device is known.
    sheet = {goal: row.get("share_of_data_sheet") for goal, row in steps.items()}
    return [
        {"goal": goal, "aim": aim, "measured": measured.get(goal), "over_data_sheet": sheet.get(goal)}
        for goal, aim in AIMS.items()
    ]


def _widest(rows: Sequence[Row], first: Row) -> float | None:
    """Returns the target's time on the tree over that on one token, where the round `first` was measured."""
    place = (first["batch"], first["prefix"])
    one = [r["seconds"] for r in rows if what(r) == "verify" and _place(r) == place and r["settings"]["nodes"] == 1]
    return _over(first["target_seconds"], one[0]) if one else None


def alternatives(rows: Sequence[Row]) -> list[Row]:
    """Returns every setting of part 3 beside what it replaces: seconds, and how much faster it is than the default."""
    timed = [row for row in rows if row.get("seconds")]
    found = []
    for row in timed:
        settings = row["settings"]
        if row["part"] != 3:
            continue
        usual = next((r for r in timed if _is_default(r, settings)), None)
        name = settings.get("xla") or settings.get("implementation") or what(row)
        found.append(
            {
                "what": what(row),
                "alternative": name,
                "settings": settings,
                "seconds": row["seconds"],
                "default_seconds": usual and usual["seconds"],
                "speedup": usual and usual["seconds"] / row["seconds"],
            }
        )
    return found


def _is_default(row: Row, settings: Row) -> bool:
    """Returns whether a row was measured at `settings` but with the default of what they change."""
    if "xla" in row["settings"]:
        return False
    others = {k: v for k, v in settings.items() if k not in ("xla", "implementation")}
    if settings["what"] == "scanned_layers":
        others["what"] = "verify"
    default = {"attention": "jaxspec", "training_attention": "xla"}.get(settings["what"])
    return row["settings"] == (others | ({"implementation": default} if default else {}))
