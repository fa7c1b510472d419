"""A served drafter held to its golden prompts: stages that stop at the first failure, and a likely cause."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxspec.evaluation.equivalence import TIES
from jaxspec.evaluation.golden import Golden, GoldenPrompt
from jaxspec.serving.endpoint import Client, context_fields
from jaxspec.serving.served_acceptance import Counters
from jaxspec.serving.streaming_client import StreamedAnswer, read_counters, stream

TOLERANCE = 0.03
"""Difference of acceptance at a position that is none."""
HIDDEN = "not visible through an endpoint"


class Stage(NamedTuple):
    """One stage; `passed` is None where the server does not show what it needs."""

    stage: str
    passed: bool | None
    figure: Any
    expected: Any
    note: str = ""


class CheckResult(NamedTuple):
    """All stages that were gone through, and the likely cause of the failure."""

    stages: list[Stage]
    likely_cause: str | None

    @property
    def passed(self) -> bool:
        """Returns whether no stage failed."""
        return all(stage.passed is not False for stage in self.stages)


def check_served(client: Client, golden: Golden, *, dtype: str) -> CheckResult:
    """Returns how a server does on golden prompts; `dtype` is the one that it computes in.

    Raises ServerRefused where it refuses every request, and ValueError where it was started again meanwhile.
    """
    stages: list[Stage] = []
    cause = None
    for stage, likely in _stages(client, golden, dtype):
        stages.append(stage)
        if stage.passed is False:
            cause = likely
            break
    return CheckResult(stages, cause)


def _stages(client: Client, golden: Golden, dtype: str) -> Iterator[tuple[Stage, str | None]]:
    yield check_prompts(client, golden.prompts)
    for name in ("auxiliary hidden states", "first draft", "unrolled drafts"):
        yield Stage(name, None, None, None, HIDDEN), None
    before = read_counters(client)
    answers = [_complete(client, prompt) for prompt in golden.prompts]
    after = read_counters(client)
    yield check_outputs(golden.prompts, answers, TIES[dtype])
    yield check_acceptance(golden.acceptance, None if before is None or after is None else after.since(before))
    seconds = sum(a.seconds for a in answers)
    yield Stage("speed", None, sum(a.count for a in answers) / seconds, None, "tokens/s of one request at a time"), None


def _complete(client: Client, prompt: GoldenPrompt) -> StreamedAnswer:
    """Returns the server's greedy answer to a prompt's ids, as long as the golden one."""
    body = {"prompt": prompt.prompt_ids, "max_tokens": len(prompt.output_ids), "temperature": 0.0}
    return stream(client, "/completions", body)


def check_prompts(client: Client, prompts: Sequence[GoldenPrompt]) -> tuple[Stage, str | None]:
    """Returns whether the server makes the same ids of the messages, or as many where it tells no more."""
    cause = "chat template, system prompt, thinking switch, or a second BOS"
    told = "ids"
    for number, prompt in enumerate(prompts):
        context = context_fields(prompt.messages, prompt.tools, prompt.variables)
        ids = client.tokenize(context)
        if ids is None:
            body = {**context, "max_tokens": 1, "temperature": 0.0}
            told, count = "number of ids alone", stream(client, "/chat/completions", body).prompt_tokens
            same = count == len(prompt.prompt_ids)
        else:
            count, same = len(ids), list(ids) == prompt.prompt_ids
        if not same:
            note = f"prompt {prompt.id!r}: {count} ids, and {len(prompt.prompt_ids)} are expected"
            return Stage("prompt ids", False, number, len(prompts), note), cause
    return Stage("prompt ids", True, len(prompts), len(prompts), told), None


def check_outputs(
    prompts: Sequence[GoldenPrompt], answers: Sequence[StreamedAnswer], tie: float
) -> tuple[Stage, str | None]:
    """Returns whether the answers are the golden ones, but for ties."""
    ties = 0
    for prompt, said in zip(prompts, answers, strict=True):
        place = parting(prompt, said)
        if place is None:
            continue
        margin = prompt.margins[min(place, len(prompt.margins) - 1)]
        if margin >= tie:
            note = f"prompt {prompt.id!r} parts at token {place}, where the target's margin is {margin:.3g}"
            cause = "mask, position or commit of the server, another target or dtype, or sampling settings of its own"
            return Stage("output ids", False, None, len(prompts), note), cause
        ties += 1
    return Stage("output ids", True, len(prompts) - ties, len(prompts), f"{ties} part at ties"), None


def parting(prompt: GoldenPrompt, said: StreamedAnswer) -> int | None:
    """Returns the token at which an answer leaves the golden one; None where it does not.

    By ids, or by the text where the server gives none: then about where the texts part.
    """
    if said.tokens:
        known = prompt.output_ids[: len(said.tokens)]
        # A stop id at the end is given by some servers and left out by others.
        different = [i for i, (a, b) in enumerate(zip(said.tokens, known, strict=False)) if a != b]
        if different:
            return different[0]
        return None if len(said.tokens) >= len(prompt.output_ids) - 1 else len(said.tokens)
    if said.text.strip() == prompt.output_text.strip():
        return None
    shared = next(
        (i for i, (a, b) in enumerate(zip(said.text, prompt.output_text, strict=False)) if a != b),
        min(len(said.text), len(prompt.output_text)),
    )
    return int(len(prompt.output_ids) * shared / max(1, len(prompt.output_text)))


def check_acceptance(expected: dict[str, Any], served: Counters | None) -> tuple[Stage, str | None]:
    """Returns whether the acceptance by position is the one that was predicted."""
    wanted = [round(s, 4) for s in expected["survival"]]
    if served is None or not served.drafts or not served.by_position:
        note = "the server shows no counters of speculative decoding by position"
        return Stage("acceptance by position", None, None, wanted, note), None
    found = [kept / served.drafts for kept in served.by_position]
    survival = [*found, *[0.0] * (len(wanted) - len(found))][: len(wanted)]
    passed = all(abs(a - b) <= TOLERANCE for a, b in zip(survival, wanted, strict=True))
    note = f"{int(served.drafts):,} rounds; {expected['rounds']:,} were predicted"
    stage = Stage("acceptance by position", passed, [round(s, 4) for s in survival], wanted, note)
    return stage, None if passed else likely_cause(np.asarray(survival), np.asarray(expected["survival"]))


def likely_cause(served_D: np.ndarray, expected_D: np.ndarray) -> str:
    """Returns the likely cause of a wrong acceptance by position `S_1 .. S_D`."""
    if served_D[0] < 0.02:
        return (
            "nothing is accepted: the fusion layer is skipped (an EAGLE-3 head run as EAGLE), d2t is read as absolute "
            "ids, features are shifted by one token, or a head is missing"
        )
    if np.all(served_D > expected_D + TOLERANCE) and served_D[-1] > 0.95:
        return "too good: the draft sees the answer, or the verification mask is wrong; compare ids with plain ones"
    first = served_D[0] / max(expected_D[0], 1e-6)
    c, e = _conditional(served_D), _conditional(expected_D)
    fallen = [i for i in range(1, len(c)) if c[i] < 0.6 * e[i]]
    if first < 0.8:
        return (
            "the first position is poor: auxiliary layers (entering or leaving), the final norm, the order of "
            "concatenation, or a quantized target"
        )
    if first > 0.95 and fallen and fallen[0] == 1:
        return (
            "the second position collapses: the feature is fed back around the wrong norm, positions or the cache "
            "index stand still, or siblings are visible"
        )
    if first > 0.95 and fallen:
        return (
            f"acceptance falls from position {fallen[0] + 1} on: trained with {fallen[0]} draft steps, which is then "
            "expected, or a window or mask is too short"
        )
    if np.all(served_D < expected_D):
        return (
            "everything is somewhat low: chat template, system prompt, thinking switch, BOS twice, another fine-tune "
            "of the target, or the draft's RoPE base"
        )
    return "no known pattern: compare first drafts and features with the golden file"


def _conditional(survival_D: np.ndarray) -> np.ndarray:
    before_D = np.concatenate([[1.0], survival_D[:-1]])
    return np.divide(survival_D, before_D, out=np.zeros_like(survival_D), where=before_D > 0)
