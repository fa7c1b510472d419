"""What a drafter is worth on some prompts: each decoded once, noted on disk, and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxspec.console import progress
from jaxspec.data import jsonl
from jaxspec.decoding.generation import tau
from jaxspec.evaluation import comparison
from jaxspec.evaluation.comparison import Counts, Decoded
from jaxspec.parallel.agreement import say
from jaxspec.planning import work
from jaxspec.serving import queue
from jaxspec.serving.loading import Models
from jaxspec.serving.queue import Job, Settings
from jaxspec.trees import cut_tree, parse_tree

DECODING_SEED = 0
"""Of the draws at temperatures above 0: every drafter meets the same ones."""


class Notes:
    """What decoding each prompt took, in `decoded.jsonl` of the folder, beneath what the folder was begun with."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / "decoded.jsonl"
        self.known: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
        noted = ("of", "prompt", "tokens", "calls", "accepted")
        for record in jsonl.journal(self.path, settings, of=folder, fields=noted):
            self.known.setdefault(tuple(record["of"]), {})[record["prompt"]] = record

    def add(self, of: tuple[Any, ...], prompt: int, answer: queue.Answer) -> None:
        """Note one prompt's answer; on disk when this returns."""
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
        """All prompts of a finished decoding, in order."""
        records = [self.known[of][prompt] for prompt in sorted(self.known[of])]
        return Counts(*(np.array([r[name] for r in records]) for name in ("tokens", "calls", "accepted")))


class Setup(NamedTuple):
    """How all drafters are measured."""

    prompts: Sequence[np.ndarray]
    trees: Sequence[str]
    settings: Sequence[Settings]
    slots: int
    """Prompts decoded side by side."""
    notes: Notes


def measure(
    setup: Setup, recipe: str, seed: int, models: Models, train_tokens: int, stopped: Callable[[str], None]
) -> list[Decoded]:
    """The drafter of `models` with every tree at every temperature; what is noted is not decoded again.

    A tree that is deeper than it drafts is cut to its depth. `stopped` is told after every prompt where the work is,
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
            say(f"{name}, {spec}, {_named(settings)}: tau {comparison.tau_interval(run.counts)}")
            runs.append(run)
    return runs


def decode(
    models: Models, setup: Setup, settings: Settings, of: tuple[Any, ...], stopped: Callable[[str], None]
) -> None:
    """Answers the prompts that are not noted yet, and notes them."""
    left = [
        Job(i, tokens, queue.row_seed(DECODING_SEED, i))
        for i, tokens in enumerate(setup.prompts)
        if i not in setup.notes.known.get(of, {})
    ]
    if not left:
        return
    recipe, seed, _, tree, _ = of
    tokens = calls = 0
    with progress.progress(f"{recipe}, seed {seed}, {tree}, {_named(settings)}", len(left), "prompts") as bar:
        for served in queue.serve(models, left, settings, slots=setup.slots):
            setup.notes.add(of, served.job.key, served.answer)
            tokens, calls = tokens + len(served.answer.tokens) - 1, calls + served.answer.calls
            bar.advance(1, f"tau {tau(tokens, calls):.2f}")
            stopped(f"while {recipe}, seed {seed} was measured")


def _named(settings: Settings) -> str:
    """The temperature as a reader calls it."""
    return comparison.named_temperature(settings.temperature)


def fingerprint(models: Models) -> str:
    """Of the drafter's weights, so that what others drafted is not taken for theirs."""
    digest = hashlib.sha256()
    scored = None if models.weights.vocab is None else models.weights.vocab.token_U
    for path, leaf in jax.tree_util.tree_leaves_with_path((models.weights.drafter, scored)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()[:16]
