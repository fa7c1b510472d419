"""A table of measures, made from results of `jaxspec quickstart`: the texts, tau, speed, and what was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxspec.evaluation.equivalence import NEAR_TIE
from jaxspec.report.wording import device, figure_names, identical, known, per_second

OPTIONS = ("figures",)
Found = Mapping[str, Any]
FIGURES: dict[str, tuple[str, Callable[[Found], str]]] = {
    "held_out": ("held-out questions", lambda f: f"{f['held_out_prompts']:,}"),
    "identical": ("texts identical to plain decoding", lambda f: _identical(f)),
    "tree": ("tree", lambda f: f"`{f['tree']}`"),
    "tau": ("tau, greedy", lambda f: f"{f['tau']:.2f}"),
    "tau_sampled": ("tau, temperature 1", lambda f: f"{f['tau_sampled']:.2f}"),
    "rounds": (
        "rounds that accepted 0, 1, ... drafted tokens",
        lambda f: ", ".join(f"{rounds:,}" for rounds in f["accept_histogram"]),
    ),
    "plain": ("tokens/s, plain", lambda f: per_second(f["tokens_per_second_plain"])),
    "speculative": ("tokens/s, speculative", lambda f: per_second(f["tokens_per_second_speculative"])),
    "speedup": ("speed-up", lambda f: f"{f['speedup']:.2f}"),
    "candidates": (
        "tokens/s of the candidates on other questions",
        lambda f: "; ".join(f"`{tree}` {per_second(speed)}" for tree, speed in f["tree_tokens_per_second"].items()),
    ),
    "top1_agreement": ("held-out text: top-1 agreement", lambda f: _held_out(f, "top1_agreement", 3)),
    "expected_acceptance": ("held-out text: expected acceptance", lambda f: _held_out(f, "expected_acceptance", 3)),
    "simulated_tau": ("held-out text: simulated tau of a chain", lambda f: _held_out(f, "simulated_tau", 2)),
    "simulated_tau_greedy": (
        "held-out text: simulated tau of a chain, greedy",
        lambda f: _held_out(f, "simulated_tau_greedy", 2),
    ),
    "conversations": ("conversations", lambda f: f"{f['conversations']:,}"),
    "train_tokens": ("trained tokens", lambda f: f"{f['train_tokens']:,}"),
    "draft_vocab": ("draft vocabulary", lambda f: f"{f['draft_vocab']:,}"),
    "training": ("training, s", lambda f: f"{f['train_seconds']:,.0f}"),
    "wall": ("last call, s", lambda f: f"{f['wall_seconds']:,.0f}"),
}
"""Figure in the option `figures` -> its line, and its text."""


def by_measure(options: Mapping[str, str], results: Sequence[Found]) -> tuple[list[str], list[list[str]], str]:
    """Returns the columns, a line for each measure, and what the numbers depend on.

    Several results are columns, named by their folders. Raises ValueError naming a figure that there is not, or a
    folder that two results have.
    """
    chosen = [FIGURES[name] for name in figure_names(options, FIGURES, ",".join(FIGURES))]
    folders = [Path(found["drafter_checkpoint"]).parent.name for found in results]
    if twice := next((name for name in folders if folders.count(name) > 1), None):
        raise ValueError(f"two of the results are of a folder {twice!r}: give one")
    columns = ["value"] if len(results) == 1 else [f"`{name}`" for name in folders]
    lines = [[title, *(told(found) for found in results)] for title, told in chosen]
    dtypes, devices = (dict.fromkeys(texts) for texts in zip(*map(_where, results), strict=True))
    about = f"{' and '.join(dtypes)}, answers one at a time, prefill in their times, {' and '.join(devices)}:"
    return ["measure", *columns], lines, about


def _where(found: Found) -> tuple[str, str]:
    return found["dtype"], device(found["machine"])


def _identical(found: Found) -> str:
    # A result keeps all places where texts part under `near_ties`.
    ties = sum(parted["margin"] < NEAR_TIE for parted in found["near_ties"])
    return identical({**found, "near_ties": ties, "differing": len(found["near_ties"]) - ties})


def _held_out(found: Found, name: str, digits: int) -> str:
    """Returns a figure of the head on held-out text; a dash where it is not known."""
    value = found["eval"][name]
    return f"{value:.{digits}f}" if known(value) else "-"
