"""Acceptance of a drafter on some prompts: each decoded once, noted on disk, and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspec.console import progress
from jaxspec.data import jsonl
from jaxspec.decoding.answers import Answer, total_tau
from jaxspec.decoding.requests import Request, Settings
from jaxspec.evaluation.comparison import Decoded, named_temperature
from jaxspec.evaluation.statistics import Counts, tau_interval
from jaxspec.parallel.agreement import say
from jaxspec.planning import work
from jaxspec.serving import queue
from jaxspec.serving.loading import Models
from jaxspec.trees import cut_tree, parse_tree

DECODING_SEED = 0
"""Seed of the draws at temperatures above 0: every drafter meets the same ones."""


class Notes:
    """Counts of each decoded prompt, in `decoded.jsonl` of the folder, below the settings the folder was begun with."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / "decoded.jsonl"
        self.known: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
        noted = ("of", "prompt", "tokens", "calls", "accepted")
        for record in jsonl.journal(self.path, settings, of=folder, fields=noted):
            self.known.setdefault(tuple(record["of"]), {})[record["prompt"]] = record

    def add(self, of: tuple[Any, ...], prompt: int, answer: Answer) -> None:
        """Notes one prompt's answer; it is on disk when this returns."""
        record = {
            "of": list(of),
            "prompt": prompt,
            "tokens": len(answer.tokens) - 1,
            "calls": int(answer.calls),
            "accepted": answer.accepted.tolist(),
        }
        jsonl.append(self.path, [record])
        self.known.setdefault(of, {})[prompt] = record

    def counts(self, of: tuple[Any, ...]) -> Counts:
        """Returns the counts of all prompts of a finished decoding, in order."""
        records = [self.known[of][prompt] for prompt in sorted(self.known[of])]
        return Counts(*(np.array([r[name] for r in records]) for name in ("tokens", "calls", "accepted")))


class Setup(NamedTuple):
    """The prompts, trees and settings that all drafters are measured with."""

    prompts: Sequence[np.ndarray]
    trees: Sequence[str]
    settings: Sequence[Settings]
    """One for each temperature, of a run seeded with `DECODING_SEED`."""
    slots: int
    """Prompts decoded side by side."""
    notes: Notes


def measure(
    setup: Setup, recipe: str, seed: int, models: Models, train_tokens: int, stopped: Callable[[str], None]
) -> list[Decoded]:
    """Returns the drafter's counts with every tree at every temperature; noted prompts are not decoded again.

    A tree deeper than the drafter drafts is cut to its depth. `stopped` is told after every prompt where the work is,
    and may raise.
    """
    drafter, name, digest = models.engine.drafter, f"{recipe}, seed {seed}", fingerprint(models)
    assert drafter is not None
    runs = []
    for spec in setup.trees:
        asked = parse_tree(spec)
        tree = asked if drafter.deepest is None else cut_tree(asked, drafter.deepest)
        if tree != asked:
            say(f"{name}: drafts {drafter.deepest} deep at most, so {spec} becomes {tree.spec}")
        for settings in setup.settings:
            of = (recipe, seed, digest, tree.spec, settings.temperature)
            decode(models.with_tree(tree), setup, settings, of, stopped)
            run = Decoded(
                recipe,
                seed,
                spec,
                tree.spec,
                settings.temperature,
                setup.notes.counts(of),
                work.drafter_passes(drafter, tree.depth),
                sum(int(a.size) for a in jax.tree.leaves(models.weights.drafter)),
                train_tokens,
            )
            say(f"{name}, {spec}, {_named(settings)}: tau {tau_interval(run.counts)}")
            runs.append(run)
    return runs


def decode(
    models: Models, setup: Setup, settings: Settings, of: tuple[Any, ...], stopped: Callable[[str], None]
) -> None:
    """Answers the prompts that are not noted yet, and notes them."""
    known = setup.notes.known.get(of, {})
    left = [request_of(models, setup, settings, i) for i in range(len(setup.prompts)) if i not in known]
    if not left:
        return
    recipe, seed, _, tree, _ = of
    answers = []
    with progress.progress(f"{recipe}, seed {seed}, {tree}, {_named(settings)}", len(left), "prompts") as bar:
        for request, answer, _ in queue.serve(models, left, slots=setup.slots):
            setup.notes.add(of, request.key, answer)
            answers.append(answer)
            bar.advance(1, f"tau {total_tau(answers):.2f}")
            stopped(f"while {recipe}, seed {seed} was measured")


def request_of(models: Models, setup: Setup, settings: Settings, index: int) -> Request:
    """Returns prompt `index` as a request. Raises ValueError naming a prompt that the target cannot answer."""
    try:
        return models.request(setup.prompts[index], settings.for_row(index), index)
    except ValueError as error:
        raise ValueError(f"prompt {index + 1} {error}") from error


def _named(settings: Settings) -> str:
    """Returns the temperature as messages name it."""
    return named_temperature(settings.temperature)


def fingerprint(models: Models) -> str:
    """Returns a digest of the drafter's weights, which tells its notes from those of other weights."""
    digest = hashlib.sha256()
    scored = None if models.weights.vocab is None else models.weights.vocab.token_U
    for path, leaf in jax.tree_util.tree_leaves_with_path((models.weights.drafter, scored)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]
