"""A served drafter held to its golden prompts: stages that stop at the first failure, and a likely cause."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxspec.evaluation import draft_stages
from jaxspec.evaluation.acceptance_stage import ACCEPTANCE, check_acceptance
from jaxspec.evaluation.check_stages import Found, Stage, not_given
from jaxspec.evaluation.equivalence import TIES
from jaxspec.evaluation.golden import Golden, GoldenAnswer, GoldenPrompt, GoldenRun
from jaxspec.evaluation.served_rounds import ToldAnswer, ask_rounds
from jaxspec.serving.endpoint import UNFIT, Client, RequestFailed, ServerRefused, context_fields
from jaxspec.serving.served_acceptance import Counters
from jaxspec.serving.streaming_client import StreamedAnswer, read_counters, stream

PROMPTS, HIDDEN, PLAIN, OUTPUTS, SPEED = "prompt ids", "auxiliary hidden states", "plain answers", "output ids", "speed"
GONE = ("connection", "timeout")
"""Kinds of failed requests behind which nothing more is asked."""
CHANGED = "quantized, or computed in another dtype; or sampling settings of the server's own"
CAUSES = {
    PROMPTS: "chat template, system prompt, thinking switch, or a second BOS",
    PLAIN: f"the target, which decodes without drafts here: another one or another fine-tune, {CHANGED}",
    OUTPUTS: f"mask, position or commit of the server's verification; another target, {CHANGED}",
}


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

    A request that fails, fails its stage with its sentence; the stages behind it go on, unless the server is gone.
    Raises ValueError where the golden prompts are not of that dtype.
    """
    check = _Check(client, golden.prompts, golden.run(dtype), dtype)
    stages: list[Stage] = []
    cause = None
    for name, step in check.steps().items():
        try:
            stage, likely = step()
            stops = stage.passed is False
        except (RequestFailed, ValueError) as error:
            stage, likely = Stage(name, False, None, None, str(error)), failure_cause(error)
            stops = isinstance(error, ServerRefused) or (isinstance(error, RequestFailed) and error.kind in GONE)
        stages.append(stage)
        cause = cause or likely
        if stops:
            break
    return CheckResult(stages, cause)


def failure_cause(error: Exception) -> str:
    """Returns the likely cause of a stage whose requests failed."""
    kind = error.kind if isinstance(error, RequestFailed) else ""
    if isinstance(error, ServerRefused):
        return "the server refuses every request of this kind: see the note"
    if kind == "connection":
        return "the server has ended or was started again: see its log"
    if kind == "timeout":
        return "the server is stuck, or too slow for the patience of the check: see its log"
    if kind == UNFIT or kind.startswith("status 4"):
        return "a limit of the server on prompts or answers, or a field that it does not know: see the note"
    return "the server fails at the request or was started again meanwhile: see the note and its log"


@dataclasses.dataclass
class _Check:
    """The stages of one check, and what the server has said so far."""

    client: Client
    prompts: Sequence[GoldenPrompt]
    run: GoldenRun
    dtype: str
    told: list[ToldAnswer] | None = None
    why: str = ""
    """Why no rounds are told."""
    answers: list[StreamedAnswer] | None = None
    gained: Counters | None = None

    def steps(self) -> dict[str, Callable[[], Found]]:
        """Returns the stages in their order.

        The target comes before the drafter, whose drafts follow the target's features.
        """
        return {
            PROMPTS: lambda: check_prompts(self.client, self.prompts),
            HIDDEN: lambda: not_given(HIDDEN, "no API tells hidden states; plain answers and drafts follow from them"),
            PLAIN: self.plain_answers,
            draft_stages.FIRST: self.first_draft,
            draft_stages.UNROLLED: self.unrolled_drafts,
            draft_stages.HITS: self.rank_hits,
            OUTPUTS: self.output_ids,
            ACCEPTANCE: self.acceptance,
            SPEED: self.speed,
        }

    def asked(self) -> Iterator[tuple[GoldenAnswer, dict[str, Any], str]]:
        """Yields each golden answer with the request for it, and the prompt's name."""
        for prompt, answer in zip(self.prompts, self.run.answers, strict=True):
            body = {"prompt": prompt.prompt_ids, "max_tokens": len(answer.output_ids), "temperature": 0.0}
            yield answer, body, f"prompt {prompt.id!r}"

    def plain_answers(self) -> Found:
        """Returns whether the target alone answers as it must; of servers that always draft, its first tokens."""
        said: list[tuple[Sequence[int], str]] = []
        by_rounds, short = True, []
        for answer, body, name in self.asked():
            with _named(name):
                plain = ask_rounds(self.client, body, plain=True) if by_rounds else None
                by_rounds = plain is not None
                if plain is not None:
                    said.append((plain.tokens, ""))
                    continue
                # Reading the prompt gives the first token, before anything is drafted.
                first = stream(self.client, "/completions", body | {"max_tokens": 1})
                said.append((first.tokens, first.text))
                short.append(_first_of(answer, first))
        if not short:
            return check_outputs(PLAIN, self.prompts, self.run.answers, said, TIES[self.dtype])
        stage, cause = check_outputs(PLAIN, self.prompts, short, said, TIES[self.dtype])
        return stage._replace(note=f"first tokens alone, for this server always drafts; {stage.note}"), cause

    def first_draft(self) -> Found:
        """Returns the stage of the first draft step, for which the server's rounds are asked."""
        self.why = "its rounds were not told, see above"
        told: list[ToldAnswer] = []
        for _, body, name in self.asked():
            with _named(name):
                one = ask_rounds(self.client, body)
            if one is None:
                self.why = "it tells no drafted tokens; jaxspec serve does"
                break
            told.append(one)
        else:
            self.told = told
        if self.told is None:
            return not_given(draft_stages.FIRST, self.why)
        return draft_stages.first_draft(self.tallies(), self.told, self.dtype)

    def tallies(self) -> list[draft_stages.DraftTally]:
        """Returns by depth how the drafts compare."""
        return draft_stages.tally_drafts(self.run.answers, self.told or (), TIES[self.dtype])

    def unrolled_drafts(self) -> Found:
        """Returns the stage of the draft steps behind the first."""
        if self.told is None:
            return not_given(draft_stages.UNROLLED, self.why)
        return draft_stages.unrolled_drafts(self.tallies(), self.dtype)

    def rank_hits(self) -> Found:
        """Returns the stage of the ranks along whole answers."""
        if self.told is None:
            return not_given(draft_stages.HITS, self.why)
        return draft_stages.check_hits(self.run.answers, self.told)

    def output_ids(self) -> Found:
        """Returns the stage of the answers, and counts meanwhile what is accepted."""
        answers = []
        before = read_counters(self.client)
        for _, body, name in self.asked():
            with _named(name):
                answers.append(stream(self.client, "/completions", body))
        after = read_counters(self.client)
        self.answers = answers
        self.gained = None if before is None or after is None else after.since(before)
        said = [(answer.tokens, answer.text) for answer in answers]
        return check_outputs(OUTPUTS, self.prompts, self.run.answers, said, TIES[self.dtype])

    def acceptance(self) -> Found:
        """Returns the stage of the acceptance by position, of a server that drafts chains."""
        if self.answers is None:
            return Stage(ACCEPTANCE, None, None, None, "not checked: answers failed"), None
        if any(len(one.children(node)) > 1 for a in self.told or () for one in a.rounds for node in one.path):
            return not_given(ACCEPTANCE, "it drafts trees, and the acceptance of a chain is predicted")
        return check_acceptance(self.run.acceptance, self.gained)

    def speed(self) -> Found:
        """Returns the tokens per second, which nothing is expected of."""
        if not self.answers:
            return Stage(SPEED, None, None, None, "not measured: answers failed"), None
        figure = sum(a.count for a in self.answers) / sum(a.seconds for a in self.answers)
        return Stage(SPEED, None, figure, None, "tokens/s of one request at a time"), None


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Runs a block whose failed requests are told with their subject."""
    try:
        yield
    except RequestFailed as error:
        raise RequestFailed(error.kind, f"{name}: {error}") from error


def check_prompts(client: Client, prompts: Sequence[GoldenPrompt]) -> Found:
    """Returns whether the server makes the same ids of the messages, or as many where it tells no more."""
    told = "ids"
    for number, prompt in enumerate(prompts):
        context = context_fields(prompt.messages, prompt.tools, prompt.variables)
        ids = client.tokenize(context)
        if ids is None:
            body = {**context, "max_tokens": 1, "temperature": 0.0}
            with _named(f"prompt {prompt.id!r}"):
                told, count = "number of ids alone", stream(client, "/chat/completions", body).prompt_tokens
            same = count == len(prompt.prompt_ids)
        else:
            count, same = len(ids), list(ids) == prompt.prompt_ids
        if not same:
            note = f"prompt {prompt.id!r}: {count} ids, and {len(prompt.prompt_ids)} are expected"
            return Stage(PROMPTS, False, number, len(prompts), note), CAUSES[PROMPTS]
    return Stage(PROMPTS, True, len(prompts), len(prompts), told), None


def check_outputs(
    name: str,
    prompts: Sequence[GoldenPrompt],
    answers: Sequence[GoldenAnswer],
    said: Sequence[tuple[Sequence[int], str]],
    tie: float,
) -> Found:
    """Returns whether what was said, ids or else text, are the golden answers, but for ties."""
    ties = 0
    for prompt, answer, (tokens, text) in zip(prompts, answers, said, strict=True):
        place = parting(answer, tokens, text)
        if place is None:
            continue
        margin = answer.margins[min(place, len(answer.margins) - 1)]
        if margin >= tie:
            note = f"prompt {prompt.id!r} parts at token {place}, where the target's margin is {margin:.3g}"
            return Stage(name, False, None, len(prompts), note), CAUSES[name]
        ties += 1
    return Stage(name, True, len(prompts) - ties, len(prompts), f"{ties} part at ties"), None


def _first_of(answer: GoldenAnswer, said: StreamedAnswer) -> GoldenAnswer:
    """Returns the golden answer cut to its first token; of a server without ids its text as far as one was given."""
    text = answer.output_text
    if not said.tokens and text.strip().startswith(said.text.strip()):
        text = said.text
    return answer._replace(output_ids=answer.output_ids[:1], output_text=text, margins=answer.margins[:1])


def parting(answer: GoldenAnswer, tokens: Sequence[int], text: str) -> int | None:
    """Returns the token at which an answer leaves the golden one; None where it does not.

    By ids, or by the text where the server gives none: then about where the texts part.
    """
    if tokens:
        known = answer.output_ids[: len(tokens)]
        # A stop id at the end is given by some servers and left out by others.
        different = [i for i, (a, b) in enumerate(zip(tokens, known, strict=False)) if a != b]
        if different:
            return different[0]
        return None if len(tokens) >= len(answer.output_ids) - 1 else len(tokens)
    if text.strip() == answer.output_text.strip():
        return None
    shared = next(
        (i for i, (a, b) in enumerate(zip(text, answer.output_text, strict=False)) if a != b),
        min(len(text), len(answer.output_text)),
    )
    return int(len(answer.output_ids) * shared / max(1, len(answer.output_text)))
