"""Acceptance of drafters on some prompts: the target answers each once, and every drafter replays its answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec.console import progress
from jaxspec.data import jsonl
from jaxspec.decoding.answers import total_tau
from jaxspec.decoding.requests import Request, Settings
from jaxspec.evaluation.comparison import Decoded, named_temperature
from jaxspec.evaluation.replay import Recording, record, replay
from jaxspec.evaluation.statistics import Counts, tau_interval
from jaxspec.parallel.agreement import say
from jaxspec.planning import work
from jaxspec.serving import queue
from jaxspec.serving.loading import Models
from jaxspec.trees import cut_tree, parse_tree

DECODING_SEED = 0
"""Seed of the draws at temperatures above 0: every drafter meets the same ones."""


Of = tuple[Any, ...]
"""The work that a line of a `Notebook` belongs to."""


class Notebook:
    """A record for each prompt of several rounds of work, in a file below the settings it was begun with."""

    def __init__(self, path: Path, settings: dict[str, Any], *fields: str) -> None:
        self.path = path
        self.known: dict[Of, dict[int, dict[str, Any]]] = {}
        for note in jsonl.journal(path, settings, of=path.parent, fields=("of", "prompt", *fields)):
            self.known.setdefault(tuple(note["of"]), {})[note["prompt"]] = note

    def add(self, of: Of, prompt: int, **fields: Any) -> None:
        """Notes one prompt; it is on disk when this returns."""
        note = {"of": list(of), "prompt": prompt, **fields}
        jsonl.append(self.path, [note])
        self.known.setdefault(of, {})[prompt] = note

    def missing(self, of: Of, prompts: int) -> list[int]:
        """Returns which of so many prompts are not noted yet."""
        return [i for i in range(prompts) if i not in self.known.get(of, {})]

    def all(self, of: Of, field: str) -> list[Any]:
        """Returns one field of every prompt, in order."""
        return [self.known[of][prompt][field] for prompt in sorted(self.known[of])]


class Setup:
    """The prompts, trees and settings that all drafters are measured with, and what is known of them in a folder."""

    def __init__(
        self,
        folder: Path,
        begun_with: dict[str, Any],
        prompts: Sequence[np.ndarray],
        trees: Sequence[str],
        settings: Sequence[Settings],
        slots: int,
    ) -> None:
        self.prompts, self.trees, self.settings, self.slots = prompts, trees, settings, slots
        self.texts = Notebook(folder / "texts.jsonl", begun_with, "answer")
        self.counts = Notebook(folder / "decoded.jsonl", begun_with, "tokens", "calls", "accepted")
        self._recordings: dict[float, list[Recording]] = {}
        self._taps: tuple[int, ...] | None = None
        """Layers of the target whose inputs the recordings hold, as in `Drafter.taps`."""

    def recordings(self, models: Models, settings: Settings, stopped: Callable[[str], None]) -> list[Recording]:
        """Returns the target's own answers with what the drafter of `models` reads of them."""
        drafter = models.engine.drafter
        assert drafter is not None
        answers = self._answers(models, settings, stopped)
        # They are large, so only those that this drafter and its like read are kept.
        if drafter.taps != self._taps:
            self._recordings, self._taps = {}, drafter.taps
        if settings.temperature not in self._recordings:
            read = []
            with progress.progress(f"hidden states, {_named(settings)}", len(answers), "prompts") as bar:
                for i, answer in enumerate(answers):
                    read.append(record(models, self.prompts[i], np.asarray(answer, np.int32), settings.for_row(i)))
                    bar.advance(1)
                    stopped("while the target read its own texts")
            self._recordings[settings.temperature] = read
        return self._recordings[settings.temperature]

    def _answers(self, models: Models, settings: Settings, stopped: Callable[[str], None]) -> list[list[int]]:
        """Returns the target's answers by plain decoding; noted ones are not decoded again."""
        return answer_prompts(models, self.prompts, self.texts, settings, self.slots, stopped)


def answer_prompts(
    models: Models,
    prompts: Sequence[np.ndarray],
    texts: Notebook,
    settings: Settings,
    slots: int,
    stopped: Callable[[str], None],
) -> list[list[int]]:
    """Returns the target's answers by plain decoding at one temperature; those in the notebook are not decoded again.

    `stopped` is told after every prompt where the work is, and may raise. Raises ValueError naming a prompt that the
    target cannot answer.
    """
    of = (settings.temperature,)
    left = [request_of(models, prompts, settings, i) for i in texts.missing(of, len(prompts))]
    if left:
        with progress.progress(f"the target's own texts, {_named(settings)}", len(left), "prompts") as bar:
            for request, answer, *_ in queue.serve(models.plain(), left, slots=slots):
                texts.add(of, request.key, answer=answer.tokens.tolist())
                bar.advance(1)
                stopped("while the target answered the prompts")
    return texts.all(of, "answer")


def measure(
    setup: Setup, recipe: str, seed: int, models: Models, train_tokens: int, stopped: Callable[[str], None]
) -> list[Decoded]:
    """Returns the drafter's counts with every tree at every temperature; noted prompts are not replayed again.

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
            _replay_left(models.with_tree(tree), setup, settings, of, stopped)
            run = Decoded(
                recipe,
                seed,
                spec,
                tree.spec,
                settings.temperature,
                Counts(*(np.array(setup.counts.all(of, name)) for name in ("tokens", "calls", "accepted"))),
                work.drafter_passes(drafter, tree.depth),
                sum(int(a.size) for a in jax.tree.leaves(models.weights.drafter)),
                train_tokens,
            )
            say(f"{name}, {spec}, {_named(settings)}: tau {tau_interval(run.counts)}")
            runs.append(run)
    return runs


def _replay_left(models: Models, setup: Setup, settings: Settings, of: Of, stopped: Callable[[str], None]) -> None:
    """Replays the target's answers to the prompts that are not noted yet, and notes them."""
    left = setup.counts.missing(of, len(setup.prompts))
    if not left:
        return
    recordings = setup.recordings(models, settings, stopped)
    recipe, seed, _, tree, _ = of
    answers = []
    with progress.progress(f"{recipe}, seed {seed}, {tree}, {_named(settings)}", len(left), "prompts") as bar:
        for at, answer in replay(models, [recordings[i] for i in left], batch=min(setup.slots, len(left))):
            counted = {"tokens": len(answer.tokens) - 1, "calls": answer.calls, "accepted": answer.accepted.tolist()}
            setup.counts.add(of, left[at], **counted)
            answers.append(answer)
            bar.advance(1, f"tau {total_tau(answers):.2f}")
            stopped(f"while {recipe}, seed {seed} was measured")


def request_of(models: Models, prompts: Sequence[np.ndarray], settings: Settings, index: int) -> Request:
    """Returns prompt `index` as a request. Raises ValueError naming a prompt that the target cannot answer."""
    try:
        return models.request(prompts[index], settings.for_row(index), index)
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
