"""Recipes trained on equal terms: the same conversations and tokens, and nothing that is finished twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxspec.config import DataConfig, DistillConfig, PretrainConfig, completed, to_dict
from jaxspec.console import results
from jaxspec.console.results import differences
from jaxspec.data.account import Account
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.conversations import read_conversations
from jaxspec.data.corpus import Documents, tokenize_conversations
from jaxspec.data.feature_store import open_features
from jaxspec.data.turns import TurnEncoder
from jaxspec.interchange.hf_config import read_config
from jaxspec.interchange.target_folders import target_folder
from jaxspec.parallel.agreement import say
from jaxspec.training.batches import SKIP_FLAG, Data, pack_data, read_corpus
from jaxspec.training.distill import RESUMABLE, run_distillation
from jaxspec.training.resolve import initial_drafter

EVALUATIONS = 10
"""Points of a learning curve's held-out part."""
LOSSES = 50
"""Points that a learning curve's loss has at least, if there are so many steps."""


class Arm(NamedTuple):
    """One recipe with one seed."""

    recipe: str
    seed: int
    config: DistillConfig | PretrainConfig
    """With the comparison's files and folders; a distillation's steps are still to be found."""
    folder: Path

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"{self.recipe}, seed {self.seed}"

    @property
    def drafter(self) -> Path:
        """Folder of the finished drafter."""
        return Path(self.config.export_folder)

    @property
    def metrics(self) -> Path:
        """The metric log of its training."""
        return Path(self.config.checkpoint.folder) / "metrics.jsonl"

    @property
    def trained(self) -> Path:
        """File that marks its training as finished."""
        return self.folder / "trained.json"


def first_of_each(sources: Sequence[str], items: Sequence[Any], limit: int) -> list[Any]:
    """Returns the first `limit` items of every source, in their order."""
    seen: dict[str, int] = {}
    chosen = []
    for source, item in zip(sources, items, strict=True):
        seen[source] = seen.get(source, 0) + 1
        if seen[source] <= limit:
            chosen.append(item)
    return chosen


def steps_for(token_counts: Iterable[int], tokens: int) -> tuple[int, int]:
    """Returns the fewest batches that hold `tokens` tokens, and the tokens they hold; ValueError if all do not."""
    steps = seen = 0
    for count in token_counts:
        if seen >= tokens:
            break
        steps, seen = steps + 1, seen + count
    if seen < tokens:
        raise ValueError(f"the training data ends after {seen:,} tokens, before the {tokens:,} that are wanted")
    return steps, seen


class Corpora:
    """The conversations, tokenized when a recipe is to be trained on them; recipes of one row length share them.

    `train` and `held_out` are files; of the second the first `limit` conversations of every source are taken.
    """

    def __init__(self, train: str, held_out: str, limit: int, tokenizer: ChatTokenizer) -> None:
        self.train, self.held_out, self.limit, self.tokenizer = train, held_out, limit, tokenizer
        self.read: dict[tuple[Any, ...], tuple[Documents, Documents]] = {}
        self.mixed: dict[tuple[Any, ...], Documents] = {}

    def of(self, data: DataConfig) -> tuple[Documents, Documents]:
        """Returns the training and the held-out corpus, in rows as `data` makes them."""
        key = (data.length, data.turns, data.skip_bad)
        if key not in self.read:
            account = Account(skip_bad=data.skip_bad, flag=SKIP_FLAG)
            held_out = read_conversations(self.held_out, account=account)
            held_out = first_of_each([c.source for c in held_out], held_out, self.limit)
            turns = TurnEncoder(self.tokenizer, data.turns)
            self.read[key] = (
                read_corpus("train", self.train, tokenizer=self.tokenizer, data=data),
                tokenize_conversations(held_out, turns, length=data.length, account=account),
            )
        return self.read[key]

    def pack(self, config: DistillConfig) -> Data:
        """Returns the training rows of a recipe, with its own mix if it has one, and the held-out rows."""
        data, mix = config.data, config.data.mix
        key = (mix, data.length, data.turns, data.skip_bad)
        if mix is not None and key not in self.mixed:
            self.mixed[key] = read_corpus("mix", mix, tokenizer=self.tokenizer, data=data)
        return pack_data(config, *self.of(data), None if mix is None else self.mixed[key])


def train_arm(arm: Arm, corpora: Corpora, *, tokens: int) -> int:
    """Trains the arm on at least `tokens` tokens unless it has been trained; returns how many it was trained on.

    That is 0 for a PretrainConfig. Raises ValueError if it was begun with other settings.
    """
    config = arm.config
    if isinstance(config, PretrainConfig):
        if not arm.drafter.is_dir():
            raise ValueError(
                f"{arm.drafter}: no such folder; run jaxspec pretrain {arm.recipe} first, or name another (--draft-lm)"
            )
        return 0
    keep_settings(arm)
    if arm.trained.is_file():
        return int(json.loads(arm.trained.read_text(encoding="utf-8"))["train_tokens"])
    steps, tokens = steps_for(corpora.pack(config).train.token_counts(), tokens)
    config = dataclasses.replace(
        config,
        name=arm.name,
        optimizer=dataclasses.replace(config.optimizer, steps=steps),
        eval_every=max(1, steps // EVALUATIONS),
        log_every=min(config.log_every, max(1, steps // LOSSES)),
    )
    epochs = tokens / corpora.of(config.data)[0].summary.tokens
    say(f"{steps:,} steps of {tokens / steps:,.0f} tokens, {epochs:.2f} epochs")
    done = run_distillation(config, corpora.pack(config))
    results.write_json(arm.trained, {**done, "train_tokens": tokens})
    return tokens


def usable_features(config: DistillConfig, target: str, folder: str | None) -> str | None:
    """Returns the folder of stored features if it holds every document and layer that a recipe reads, else None."""
    if folder is None or config.data.mix is not None:
        return None
    scored = None if config.draft_vocab is None else 1
    taps = initial_drafter(config, read_config(target_folder(target)), scored).module.taps
    return folder if taps in ((), open_features(folder).taps) else None


def compared(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a config's `to_dict` that an arm may not change.

    Files and steps are left out: they belong to the whole comparison, which keeps its own. So is what alters only the
    speed: stored features and the processes that prepare batches.
    """
    apart = {"data": ("train", "eval", "features", "workers"), "optimizer": ("steps",)}
    kept = {name: value for name, value in settings.items() if name in RESUMABLE}
    return kept | {part: {k: v for k, v in kept[part].items() if k not in names} for part, names in apart.items()}


def keep_settings(arm: Arm) -> None:
    """Notes what the arm is trained with; ValueError if it was begun with something else."""
    settings = compared(results.jsonable(to_dict(arm.config)))
    path, steps = arm.folder / "settings.json", Path(arm.config.checkpoint.folder).glob("[0-9]*")
    if not (path.is_file() and (arm.trained.is_file() or any(steps))):  # nothing to lose yet
        results.write_json(path, settings)
    before = compared(completed(json.loads(path.read_text(encoding="utf-8")), arm.config))
    changed = differences(before, settings)
    if changed:
        raise ValueError(
            f"was trained with other settings ({'; '.join(changed)}): give another --out, or move {arm.folder} away "
            "to train it anew"
        )
