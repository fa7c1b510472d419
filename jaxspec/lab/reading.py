"""Tables and JSON of a profile, for readers: acceptance by depth and rank, tau of chains, calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxspec.console.results import jsonable
from jaxspec.evaluation.comparison import EVERY, groups
from jaxspec.evaluation.statistics import CONFIDENCE, Counts, Interval, tau_interval
from jaxspec.lab.calibration import calibrate, mean_error
from jaxspec.lab.profile import Profile
from jaxspec.lab.rates import Rates, measure_rates
from jaxspec.lab.replay import replay

CHAINS = (3, 5)
"""Depths of the chains whose tau is replayed."""
SHOWN_RANKS = 4
"""Ranks in the printed table."""
NOTES = f"""\
acceptance: of the places where a node of that depth stands on the text, the share whose next token is its child of that
rank, [{CONFIDENCE:.0%} interval over prompts]; a mean over places, which stand denser than rounds where text is easy;
at depth 1 above temperature 0 the mean of the target's own probability of that child
any: of all ranks together; tau: tokens a target call by replay of a chain, prefill and its token not counted
calibration: mean distance of draft probability and share of hits, over bins of equal size, and after isotonic
regression on the other half of the prompts
"""

Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]


def summarize(profile: Profile) -> Profile:
    """Returns the profile with what readers ask for among its facts: calibration, acceptance and tau, by source too."""
    facts = {"calibration": calibrate(profile), "by_source": dict(_by_source(profile))}
    return dataclasses.replace(profile, facts={**profile.facts, **jsonable(facts)})


def _by_source(profile: Profile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each source with its acceptance and tau, that of all first."""
    for source, chosen in groups(profile.sources).items():
        part = profile.of(np.flatnonzero(chosen))
        taus = {f"tau_chain_{depth}": tau_of(part, depth) for depth in CHAINS} if part.replayable else {}
        rates, taus = measure_rates(part), taus or {"tau_logged": logged_tau(part)}
        yield source, {"prompts": len(part.sources), "starts": len(part.prompt_T), **taus, **_lists(rates)}


def tau_of(profile: Profile, depth: int) -> Interval:
    """Returns tau of a chain, with its interval over prompts; of a chain as deep as the profile where that is less."""
    deepest = min(depth, profile.rank_TD.shape[1])
    return tau_interval(replay(profile, tuple((0,) * d for d in range(1, deepest + 1))))


def logged_tau(profile: Profile) -> Interval:
    """Returns tau of the tree that was decoded for a profile of rates alone."""
    assert profile.counts is not None
    tokens_P, calls_P = profile.counts[2:]
    return tau_interval(Counts(tokens_P, calls_P, calls_P[:, None]))


def _lists(rates: Rates) -> dict[str, Any]:
    """Returns rates in JSON's types."""
    names = {"rate_DK": "acceptance", "low_DK": "acceptance_low", "high_DK": "acceptance_high", "tries_DK": "tries"}
    return {name: np.round(getattr(rates, field), 6) for field, name in names.items()}


def _interval(given: Sequence[float | None]) -> Interval:
    """Returns an interval as facts hold it: null where no call was made."""
    return Interval(*(float("nan") if x is None else x for x in given))


def result_row(path: Path, profile: Profile) -> dict[str, Any]:
    """Returns the JSON of a profile, as `--json` has it."""
    facts = profile.facts
    every, calibration = facts["by_source"][EVERY], facts["calibration"]
    told = ("temperature", "mode", "rule", "target", "drafter", "kind", "one_pass", "depth", "ranks")
    return {
        "profile": path,
        "prompts": len(profile.sources),
        "starts": len(profile.prompt_T),
        **{name: facts.get(name) for name in told},
        **{name: every[name] for name in ("acceptance", "acceptance_low", "acceptance_high")},
        **{f"ece_{when}": mean_error(calibration, f"ece_{when}") for when in ("before", "after")},
        **{f"ece_first_{when}": mean_error(calibration, f"ece_first_{when}") for when in ("before", "after")},
        "entropy": [row["entropy"]["mean"] for row in calibration],
        "tau": _taus(profile),
        "sources": facts["by_source"],
    }


def _taus(profile: Profile) -> dict[str, Interval]:
    """Returns tau by the spec of a tree."""
    if not profile.replayable:
        return {profile.facts["logged_tree"]: logged_tau(profile)}
    every = profile.facts["by_source"][EVERY]
    return {f"chain:{depth}": _interval(every[f"tau_chain_{depth}"]) for depth in CHAINS}


def tables_of(profile: Profile, name: str) -> list[Table]:
    """Returns the tables that the verb prints of a profile."""
    facts, rates = profile.facts, measure_rates(profile)
    shown = min(SHOWN_RANKS, rates.rate_DK.shape[1])
    told = f"{facts.get('mode')}, {facts.get('rule')}, temperature {facts.get('temperature', 0):g}"
    calibration = {row["depth"]: row for row in facts["calibration"]}
    rows = []
    for d in range(len(rates.rate_DK)):
        cells = [str(Interval(*(float(x[d, r]) for x in rates[:3]))) for r in range(shown)]
        known = calibration.get(d + 1)
        errors = [known and known[name] for name in ("ece_first_before", "ece_first_after")]
        entropy = known and known["entropy"]["mean"]
        tries = int(rates.tries_DK[d].max(initial=0))
        rows.append([d + 1, *cells, float(np.nansum(rates.rate_DK[d])), tries, *errors, entropy])
    columns = ["depth", *(f"rank {r}" for r in range(shown)), "any", "places", "ece", "calibrated", "entropy"]
    taus = [[spec[:40], str(tau)] for spec, tau in _taus(profile).items()]
    trees = {f"tau_chain_{depth}": f"chain:{depth}" for depth in CHAINS}
    trees = trees if profile.replayable else {"tau_logged": "logged tree"}
    sources = [
        [source, row["prompts"], *(str(_interval(row[tau])) for tau in trees)]
        for source, row in facts["by_source"].items()
        if source != EVERY
    ]
    found: list[Table] = [(f"{name}: {told}", columns, rows), ("tokens a call", ["tree", "tau"], taus)]
    if sources:
        found.append(("by source", ["source", "prompts", *(f"tau {tree}" for tree in trees.values())], sources))
    return found
