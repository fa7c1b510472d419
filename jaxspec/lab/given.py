"""Acceptance that is given instead of measured: rates on a command line, or a published profile in a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.lab.profile import Profile
from jaxspec.lab.simulate import simulate

FIELDS = {
    "name": str,
    "source": str,
    "rates": list,
    "temperature": (int, float),
    "mode": str,
    "rule": str,
    "one_pass": bool,
    "target": str,
    "drafter": str,
    "note": str,
}
"""Fields of a published profile -> the types of their values."""
NEEDED = ("name", "source", "rates")


class GivenRates(NamedTuple):
    """Rates by depth and rank, and where they are from."""

    name: str
    rates_DK: np.ndarray
    """Probability that the child of each rank is accepted below an accepted node."""
    facts: dict[str, Any]


def read_rates(text: str) -> GivenRates:
    """Returns the rates that `--simulate` names: those of a `.json` file, or `0.7,0.1;0.6` itself.

    Depths are divided by semicolons, ranks by commas; a depth with fewer ranks has rate 0 at the others. Raises
    ValueError naming file and field where they are no rates.
    """
    if text.endswith(".json"):
        return _read_file(Path(text))
    try:
        rows = [[float(word) for word in row.split(",")] for row in text.split(";")]
    except ValueError:
        raise ValueError(
            f"--simulate is {text!r}; give rates such as 0.7,0.1;0.6,0.1 (ranks by commas, depths by semicolons), or a "
            "file that ends in .json"
        ) from None
    return GivenRates("simulated", _table("--simulate", rows), {})


def _read_file(path: Path) -> GivenRates:
    """Returns a published profile, see docs/formats.md."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; docs/formats.md says what a published profile holds") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object; docs/formats.md says what a published profile holds")
    for name in NEEDED:
        if not value.get(name):
            raise ValueError(f"{path}: has no field {name!r}; a published profile has {', '.join(NEEDED)}")
    for name, given in value.items():
        if name not in FIELDS:
            raise ValueError(f"{path}: field {name!r} is not known; the fields are {', '.join(FIELDS)}")
        if not isinstance(given, FIELDS[name]) or (isinstance(given, bool) and FIELDS[name] is not bool):
            raise ValueError(f"{path}: field {name!r} is {given!r}, which is of another type than it has")
    rates = value.pop("rates")
    if not all(isinstance(row, list) and all(isinstance(x, int | float) for x in row) for row in rates):
        raise ValueError(f"{path}: field 'rates' must be a list, by depth, of lists of numbers, by rank")
    name = value.pop("name")
    return GivenRates(name, _table(f"{path}: rates", rates), {"published": value.pop("source"), **value})


def _table(place: str, rows: list[list[float]]) -> np.ndarray:
    """Returns the rates `[D, K]`. Raises ValueError where a row is empty or no part of a distribution."""
    rates_DK = np.zeros((len(rows), max(map(len, rows))))
    for depth, row in enumerate(rows):
        if not row or not all(0 <= rate <= 1 for rate in row) or sum(row) > 1 + 1e-9:
            raise ValueError(
                f"{place} of depth {depth + 1} are {row}; they must lie between 0 and 1 and sum to 1 at most, for one "
                "child at most is accepted"
            )
        rates_DK[depth, : len(row)] = row
    return rates_DK


def given_profile(given: GivenRates, *, prompts: int, tokens: int, seed: int) -> Profile:
    """Returns the profile of texts whose ranks are drawn from given rates."""
    facts = {"kind": "simulated", "name": given.name, "depth": len(given.rates_DK), "seed": seed, **given.facts}
    return simulate(given.rates_DK, prompts=prompts, tokens=tokens, seed=seed, source=given.name, facts=facts)
