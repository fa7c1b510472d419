"""Searched trees tried: decoded on prompts in turns with plain decoding, for a figure beside the predicted one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.base import TreePolicy
from jaxspec.data.prompts import Prompt, encode_prompt
from jaxspec.decoding.requests import Settings, make_requests
from jaxspec.evaluation.rows import PLAIN
from jaxspec.evaluation.timing import Load, time_arms
from jaxspec.parallel.agreement import say
from jaxspec.serving.loading import Models


class TriedTree(NamedTuple):
    """A tree as it decoded."""

    tokens_per_second: float
    """Of all rows together, prefill left out as in predictions; median of the repeats."""
    tau: float


def try_trees(
    models: Models,
    trees: Mapping[str, TreePolicy],
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    batch: int,
    repeats: int,
) -> dict[str, TriedTree]:
    """Returns how plain decoding and each tree decode full batches of the prompts, all in turns.

    Prompts that the target cannot read are named and left out. Raises ValueError where the rest fill no batch.
    """
    requests = []
    for index, prompt in enumerate(prompts):
        try:
            requests.append(models.request(encode_prompt(prompt, models.tokenizer), settings.for_row(index), index))
        except ValueError as error:
            say(f"{prompt.name} {error}")
    requests.sort(key=lambda request: len(request.tokens))
    count = len(requests) // batch
    if not count:
        raise ValueError(f"{len(requests)} prompts do not fill a batch of {batch}: give more, or a smaller --batch")
    batches = [make_requests(requests[i * batch : (i + 1) * batch]) for i in range(count)]
    load = Load(batches, settings.max_new_tokens, rounds_only=True)
    arms = {PLAIN: models.plain(), **{name: models.with_tree(tree) for name, tree in trees.items()}}
    runs, _ = time_arms(arms, load, repeats=repeats)
    return {name: _tried(mine) for name, mine in runs.items()}


def _tried(runs: Sequence[Any]) -> TriedTree:
    return TriedTree(float(np.median([run.tokens_per_second for run in runs])), runs[0].tau)
