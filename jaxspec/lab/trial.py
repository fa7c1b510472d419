"""Static trees tried: decoded on prompts in turns with plain decoding, for figures beside the predicted ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.base import TreePolicy
from jaxspec.data.prompts import Prompt, encode_prompt
from jaxspec.decoding.requests import Request, Settings, make_requests
from jaxspec.evaluation.acceptance import fingerprint
from jaxspec.evaluation.rows import PLAIN
from jaxspec.evaluation.timing import Load, Run, time_arms
from jaxspec.interchange import hf
from jaxspec.interchange.target_folders import target_folder
from jaxspec.parallel.agreement import say
from jaxspec.serving import loading
from jaxspec.serving.loading import Models


class TriedTree(NamedTuple):
    """A tree as it decoded."""

    tokens_per_second: float
    """Of all rows together, prefill left out as in predictions; median of the repeats."""
    tau: float
    round_seconds: float
    """Of a round in the mean, median of the repeats; a batch goes on until its last row ends."""


def load_profiled(facts: Mapping[str, Any], max_new_tokens: int) -> tuple[Models, Settings]:
    """Returns the target with the drafter that a profile is of, and the settings of its texts with another length.

    Raises ValueError where they are not what they were when it was made.
    """
    models = loading.load_models(
        facts["target"], drafter=facts["drafter"], dtype=loading.DTYPES[facts.get("dtype") or "fp32"]
    )
    now = {
        "target": hf.fingerprint(target_folder(facts["target"])),
        "drafter": fingerprint(models),
        **models.tokenizer.fingerprint,
    }
    made_with = facts.get("hashes", {})
    if other := [name for name, value in now.items() if made_with.get(name, value) != value]:
        raise ValueError(
            f"the profile was made with another {' and '.join(other)} than {facts['target']} and {facts['drafter']} "
            "have by themselves now: make it anew, without a --draft-vocab or --template of its own"
        )
    warps = {"top_k": facts.get("top_k") or 0, "top_p": facts.get("top_p") or 1.0}
    return models, Settings(max_new_tokens, float(facts.get("temperature") or 0.0), **warps)


def encode_requests(models: Models, prompts: Sequence[Prompt], settings: Settings) -> list[Request]:
    """Returns a request for each prompt, short ones first.

    Prompts that the target cannot read are named and left out.
    """
    requests = []
    for index, prompt in enumerate(prompts):
        try:
            requests.append(models.request(encode_prompt(prompt, models.tokenizer), settings.for_row(index), index))
        except ValueError as error:
            say(f"{prompt.name} {error}")
    return sorted(requests, key=lambda request: len(request.tokens))


def try_trees(
    models: Models, trees: Mapping[str, TreePolicy], requests: Sequence[Request], *, batch: int, repeats: int
) -> dict[str, TriedTree]:
    """Returns how plain decoding and each tree decode full batches of the requests, all in turns.

    Raises ValueError where the requests fill no batch.
    """
    count = len(requests) // batch
    if not count:
        raise ValueError(f"{len(requests)} prompts do not fill a batch of {batch}: give more, or a smaller batch")
    batches = [make_requests(requests[i * batch : (i + 1) * batch]) for i in range(count)]
    load = Load(batches, max(r.settings.max_new_tokens for r in requests), rounds_only=True)
    arms = {PLAIN: models.plain(), **{name: models.with_tree(tree) for name, tree in trees.items()}}
    runs, _ = time_arms(arms, load, repeats=repeats)
    return {name: _tried(mine) for name, mine in runs.items()}


def _tried(runs: Sequence[Run]) -> TriedTree:
    speed, seconds = zip(*((run.tokens_per_second, run.round_seconds / run.rounds) for run in runs), strict=True)
    return TriedTree(float(np.median(speed)), runs[0].tau, float(np.median(seconds)))
