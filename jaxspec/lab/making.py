"""Profiles of drafters over texts, made a batch at a time: what is finished is kept in a folder and not made again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.base import Array
from jaxspec.console import progress
from jaxspec.console.disk import writing
from jaxspec.decoding.requests import Settings
from jaxspec.evaluation.acceptance import Notebook, request_of
from jaxspec.lab.profile import Profile, RoundCounts
from jaxspec.lab.ranks import Draws, Ranks, Text, batches, rank_texts, ranked_profile, read_target
from jaxspec.lab.rates import rates_of
from jaxspec.lab.round_log import generous_tree, log_rounds
from jaxspec.lab.texts import Sourced, digest_of
from jaxspec.parallel.agreement import say
from jaxspec.serving.loading import Models

COUNTED = ("hits", "turns", "tokens", "calls")
"""Fields of a note of a decoded prompt, in the order of `RoundCounts`."""
Stopped = Callable[[str], None]
"""Is told after every batch where the work is, and may raise."""


class ProfiledDrafter(NamedTuple):
    """A drafter to profile."""

    name: str
    """As the command line gives it."""
    models: Models
    depth: int
    """Depths of its profile, cut to what it drafts."""
    digest: str
    """Of its weights."""


class LogSizes(NamedTuple):
    """Sizes of a decoding that is logged."""

    ranks: int
    slots: int
    """Prompts decoded side by side."""


def rank_arms(
    arms: Sequence[ProfiledDrafter],
    texts: Sequence[Text],
    settings: Settings,
    ranks: int,
    folder: Path,
    stopped: Stopped,
) -> list[Ranks]:
    """Returns each drafter's ranks over all texts, which were written by `settings`, in the order of the texts.

    The target reads a batch once for all drafters that read the same of it. Batches lie in `folder` as they are done.
    """
    groups = batches(texts)
    found: list[dict[int, Ranks]] = [{} for _ in arms]
    taps = list(dict.fromkeys(_taps(arm) for arm in arms))
    with progress.progress("ranks of the texts", len(groups) * len(arms), "batches") as bar:
        for group in groups:
            some, draws = [texts[i] for i in group], None
            for read_by in taps:
                read: Array | None = None
                for at, arm in enumerate(arms):
                    if _taps(arm) != read_by:
                        continue
                    path = _part_path(folder, arm, ranks, some, settings)
                    part = _read_part(path, len(some))
                    if part is None:
                        read = read_target(arm.models, some) if read is None else read
                        if settings.temperature > 0 and draws is None:
                            draws = Draws(read_target(arm.models.plain(), some) if read_by else read, settings)
                        part = rank_texts(arm.models, some, read, depth=arm.depth, ranks=ranks, draws=draws)
                        _write_part(path, part)
                    found[at] |= dict(zip(group, part, strict=True))
                    bar.advance(1, arm.name)
            stopped("while drafters read the texts")
    return [joined(by_text, len(texts)) for by_text in found]


def _taps(arm: ProfiledDrafter) -> tuple[int, ...]:
    drafter = arm.models.engine.drafter
    assert drafter is not None
    return drafter.taps


def joined(by_text: dict[int, Ranks], texts: int) -> Ranks:
    """Returns the ranks of `texts` texts, by their numbers, one after another."""
    return Ranks(*(np.concatenate(x) for x in zip(*(by_text[i] for i in range(texts)), strict=True)))


def _part_path(folder: Path, arm: ProfiledDrafter, ranks: int, texts: Sequence[Text], settings: Settings) -> Path:
    """Returns the file of a batch, which is named by all that it depends on."""
    drawn = f"t{settings.temperature:g}-{settings.top_k}-{settings.top_p:g}" if settings.temperature else "greedy"
    return folder / "ranks" / f"{arm.digest}-{arm.depth}x{ranks}-{drawn}-{digest_of(texts)}.npz"


def _write_part(path: Path, part: Sequence[Ranks]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    arrays = {f"{name}_{i}": x for i, ranks in enumerate(part) for name, x in ranks._asdict().items()}
    with writing(path), draft.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(draft, path)


def _read_part(path: Path, texts: int) -> list[Ranks] | None:
    """Returns the texts of a batch that has been made; None where it has not, or the file is damaged, which is said."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return [Ranks(*(found[f"{name}_{i}"] for name in Ranks._fields)) for i in range(texts)]
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with it, it is made anew
        say(f"{path}: cannot be read ({error}), and is made anew")
        return None


def rank_profile(arm: ProfiledDrafter, texts: Sourced, found: Ranks, ranks: int, facts: dict[str, Any]) -> Profile:
    """Returns the profile of a drafter's ranks."""
    return ranked_profile(
        texts.texts, found, texts.sources, {**facts, "kind": "ranks", "ranks": ranks, "depth": arm.depth}
    )


def log_arm(
    arm: ProfiledDrafter,
    prompts: Sequence[np.ndarray],
    settings: Settings,
    sizes: LogSizes,
    folder: Path,
    begun_with: dict[str, Any],
    stopped: Stopped,
) -> tuple[RoundCounts, str]:
    """Decodes the prompts with a generous tree and the rule of the drafter's models, and counts what is kept.

    Returns the counts, and the tree's spec. Prompts that are noted in `folder` are not decoded again.
    """
    rule = arm.models.engine.rule
    tree = generous_tree(arm.depth, 1 if rule.chains_only else sizes.ranks)
    models = arm.models.with_tree(tree)
    notes = Notebook(folder / "logged.jsonl", begun_with, *COUNTED)
    drawn_at = (settings.temperature, settings.draft_temperature)
    of = (arm.digest, models.engine.mode, rule.name, *drawn_at, tree.spec)
    missing = notes.missing(of, len(prompts))
    left = [request_of(models, prompts, settings, i) for i in missing]
    with progress.progress(f"rounds of {arm.name}, {rule.name}", len(left), "prompts") as bar:
        batch = min(sizes.slots, max(1, len(left)))
        for one in log_rounds(models, left, batch=batch, longest=settings.max_new_tokens):
            counted = {"hits": one.hits_DK.tolist(), "turns": one.turns_DK.tolist()}
            notes.add(of, one.key, **counted, tokens=one.tokens, calls=one.calls)
            bar.advance(1)
            stopped("while rounds were logged")
    return RoundCounts(*(np.array(notes.all(of, name), np.int64) for name in COUNTED)), tree.spec


def rate_profile(arm: ProfiledDrafter, sources: Sequence[str], counts: RoundCounts, facts: dict[str, Any]) -> Profile:
    """Returns a profile of rates alone: its texts are empty, and `replayable` is false."""
    depth, ranks = counts.hits_PDK.shape[1:]
    rates = rates_of(counts.hits_PDK, counts.turns_PDK, in_turn=True)
    named = {f"{name.removesuffix('_DK')}s_DK": getattr(rates, name) for name in ("rate_DK", "low_DK", "high_DK")}
    table = {n: [[None if np.isnan(x) else float(x) for x in row] for row in rows] for n, rows in named.items()}
    about = {**facts, "kind": "rates", "ranks": ranks, "depth": arm.depth, **table, "tries_DK": rates.tries_DK.tolist()}
    nothing = np.zeros((0, depth))
    return Profile(
        np.zeros(0, np.int32),
        nothing.astype(np.int16),
        nothing.astype(np.float32),
        np.zeros((0, depth, ranks), np.float16),
        nothing.astype(np.float16),
        tuple(sources),
        about,
        counts,
    )


def forget(folder: Path) -> None:
    """Removes the batches of finished profiles; texts and logs stay, for a deeper profile or another drafter."""
    shutil.rmtree(folder / "ranks", ignore_errors=True)
