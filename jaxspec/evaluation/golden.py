"""Golden prompts: what an exported drafter must do where it is served, made by this library beside the export.

A file holds prompts as text and ids, and a run in fp32 and one in the dtype that is served: the target's greedy
answers, the first drafts, the ranks of the answers' tokens among the drafter's likeliest, and the acceptance by
position that a chain of the served length has along those answers. `served_check` holds a server to it.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.data.prompts import Prompt, encode_prompt, read_prompts
from jaxspec.decoding.generation import generate
from jaxspec.decoding.requests import Request, Settings, make_requests
from jaxspec.evaluation.acceptance import fingerprint
from jaxspec.evaluation.arms import served_tree, tree_name
from jaxspec.evaluation.equivalence import top_margins
from jaxspec.evaluation.led_drafts import LedDraft, led_drafts
from jaxspec.evaluation.statistics import quotient, resampled
from jaxspec.serving.loading import Models
from jaxspec.trees import chain, parse_tree

FORMAT = "jaxspec-golden/2"
NAME = "golden.json"
NEW_TOKENS = 128
DRAFTED_ROUNDS = 4
"""Rounds of each answer whose drafts are kept."""
FEWEST, MOST = 8, 16
"""Prompts that are needed, and that are taken."""
RANKS = 10
"""Likeliest tokens of a draft that are told apart."""
REFERENCE = "float32"
"""Dtype of the run that every file has."""


class GoldenPrompt(NamedTuple):
    """A prompt as a client sends it, and as the target reads it."""

    id: str
    messages: list[dict[str, Any]]
    text: str
    """The rendered prompt."""
    prompt_ids: list[int]
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions that the prompt describes."""
    variables: Mapping[str, Any] = types.MappingProxyType({})
    """Of the chat template."""


class GoldenDraft(NamedTuple):
    """The chain that is drafted at one place of an answer."""

    at: int
    """Tokens of the answer before it."""
    top: list[list[int]]
    """By depth the `RANKS` likeliest tokens, best first; the first of them is drafted."""
    margins: list[list[float | None]]
    """By depth the log-probability of each of these less that of the next one: the first is the top-2 margin."""


class GoldenAnswer(NamedTuple):
    """The answer to a prompt, and the drafts along it."""

    output_ids: list[int]
    """The target's greedy answer, a stop id included."""
    output_text: str
    margins: list[float]
    """At every token of the answer, the likeliest token's logit less the next one's: small ones are ties."""
    drafts: list[GoldenDraft]
    """At every place up to that of the last of the first `DRAFTED_ROUNDS` rounds."""
    ranks: list[list[int]]
    """Behind each token by depth: the rank from 0 of the answer's token in the draft, when the drafter is led along the
    answer and reads features of its own; -1 beyond `RANKS`."""


class GoldenRun(NamedTuple):
    """Answers and drafts in one dtype."""

    answers: list[GoldenAnswer]
    rank_hits: list[dict[str, Any]]
    """By depth: `starts`, and `hits`, how many of them had the answer's token at rank 0, 1 .. of the draft."""
    acceptance: dict[str, Any]
    """`rounds`, `acceptance_length`, and `survival` by position with `low` and `high` over prompts; None: not known."""


class Golden(NamedTuple):
    """The contents of a file."""

    facts: dict[str, Any]
    """Hashes of target, drafter, tokenizer and template; `tree`, `new_tokens`, versions."""
    prompts: list[GoldenPrompt]
    runs: dict[str, GoldenRun]
    """By the name of their dtype."""

    def run(self, dtype: str) -> GoldenRun:
        """Returns the run of a dtype. Raises ValueError where the file has none."""
        if dtype not in self.runs:
            made = " and ".join(self.runs)
            raise ValueError(f"the golden prompts are of {made}, not {dtype}: export with its --golden-dtype")
        return self.runs[dtype]

    def save(self, path: Path) -> None:
        """Writes the file."""
        runs = {dtype: _fields(run) for dtype, run in self.runs.items()}
        found = {"format": FORMAT, **self.facts, "prompts": [_fields(p) for p in self.prompts], "runs": runs}
        path.write_text(json.dumps(found, allow_nan=False) + "\n")


def _fields(value: Any) -> Any:
    """Returns a tuple with names as an object of JSON, and those within it too."""
    if hasattr(value, "_asdict"):
        return {name: _fields(field) for name, field in value._asdict().items()}
    return [_fields(one) for one in value] if isinstance(value, list) else value


def read_golden(path: str | Path) -> Golden:
    """Returns the file, or the one in a folder. Raises ValueError where there is none, or it is none."""
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; make it with jaxspec export ... --golden PROMPTS")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (made := found.pop("format")) != FORMAT:
            raise ValueError(f"its format is {made!r}, not {FORMAT!r}")
        prompts = [GoldenPrompt(**p) for p in found.pop("prompts")]
        runs = {dtype: _read_run(run) for dtype, run in found.pop("runs").items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: is not a file of golden prompts ({error}); make it anew") from error
    return Golden(found, prompts, runs)


def _read_run(fields: Mapping[str, Any]) -> GoldenRun:
    answers = [GoldenAnswer(**a)._replace(drafts=[GoldenDraft(**d) for d in a["drafts"]]) for a in fields["answers"]]
    return GoldenRun(**{**fields, "answers": answers})


def read_asked(path: Path, tree: str | None) -> list[Prompt]:
    """Returns the prompts of a file that golden prompts are made of.

    Raises ValueError where they are too few, naming one that cannot be used, and for a tree that is no chain.
    """
    if tree is not None and (not tree.startswith("chain:") or not parse_tree(tree).depth):
        raise ValueError(f"--golden-tree is {tree!r}; servers verify chains: give chain:DEPTH")
    prompts = read_prompts(path, limit=MOST)
    if len(prompts) < FEWEST:
        raise ValueError(f"{path}: golden prompts are {FEWEST} to {MOST}, and these are {len(prompts)}: add some")
    for prompt in prompts:
        if prompt.problem:
            raise ValueError(f"{prompt.name} {prompt.problem}; mend it or take it out")
    return prompts


def make_golden(
    load: Callable[[str], Models], prompts: Sequence[Prompt], tree: str | None, facts: Mapping[str, Any], *, dtype: str
) -> Golden:
    """Returns golden prompts of a target with its drafter, which drafts a chain: in fp32, and in the dtype served.

    `load` returns the models in the dtype of a name; `tree` is the chain (None: what servers verify of the drafter).
    Raises ValueError naming a prompt that the target cannot read.
    """
    known: dict[str, Any] = {"new_tokens": NEW_TOKENS}
    rendered, runs = [], {}
    for name in dict.fromkeys((REFERENCE, dtype)):
        models = load(name)
        tree = tree or tree_name(served_tree(models))
        if not runs:
            known |= {"tree": tree, "drafter": fingerprint(models), **models.tokenizer.fingerprint, **facts}
            rendered = [_rendered(models, prompt) for prompt in prompts]
        runs[name] = make_run(models, rendered, tree)
    return Golden(known, rendered, runs)


def _rendered(models: Models, prompt: Prompt) -> GoldenPrompt:
    try:
        tokens = encode_prompt(prompt, models.tokenizer)
        models.request(tokens, Settings(NEW_TOKENS))
    except ValueError as error:
        raise ValueError(f"{prompt.name} {error}; mend it or take it out") from error
    render = models.tokenizer.render
    text = render(prompt.messages, add_generation_prompt=True, tools=prompt.tools, variables=prompt.variables)
    messages, described = ([dict(one) for one in many] for many in (prompt.messages, prompt.tools))
    return GoldenPrompt(prompt.id, messages, text, [int(t) for t in tokens], described, dict(prompt.variables))


def make_run(models: Models, prompts: Sequence[GoldenPrompt], tree: str) -> GoldenRun:
    """Returns the answers and drafts of models in their dtype."""
    # A drafter beside a chain without nodes decodes plainly, a token a round, and reads along.
    reading, drafting = models.with_tree(chain(0)), models.with_tree(parse_tree(tree))
    answers, accepted = [], []
    for prompt in prompts:
        request = models.request(np.asarray(prompt.prompt_ids, np.int32), Settings(NEW_TOKENS))
        answers.append(_answer(reading, prompt, request, parse_tree(tree).depth))
        # As servers count: with what a last round accepts behind the answer's end, which a replay leaves out.
        (drafted,) = generate(drafting.engine, drafting.weights, make_requests([request]))
        accepted.append(drafted.accepted)
    return GoldenRun(answers, rank_hits([answer.ranks for answer in answers]), acceptance_of(np.asarray(accepted)))


def _answer(reading: Models, prompt: GoldenPrompt, request: Request, depth: int) -> GoldenAnswer:
    (answer,) = generate(reading.engine, reading.weights, make_requests([request]))
    output = [int(t) for t in answer.tokens]
    led = list(led_drafts(reading, request, output, depth=depth, ranks=RANKS))
    ranks = [one.ranks for one in led]
    places = round_places(ranks, DRAFTED_ROUNDS)
    free = led_drafts(reading, request, output[: places[-1] + 1] if places else [], depth=depth, ranks=RANKS, led=False)
    drafts = [_draft(at, one) for at, one in enumerate(free, 1)]
    margins = top_margins(reading.engine.target, reading.weights.target, prompt.prompt_ids, output)
    return GoldenAnswer(output, reading.tokenizer.decode(output), margins, drafts, ranks)


def _draft(at: int, found: LedDraft) -> GoldenDraft:
    margins_TK = found.logp_TK[:, :-1] - found.logp_TK[:, 1:]
    return GoldenDraft(at, found.top_TK.tolist(), [[_known(m) for m in row] for row in margins_TK.tolist()])


def round_places(ranks: Sequence[Sequence[int]], most: int) -> list[int]:
    """Returns how many tokens of an answer stand before each of the first rounds of a chain along it."""
    at, found = 1, []
    while len(found) < most and at <= len(ranks):
        found.append(at)
        of = ranks[at - 1]
        at += 1 + next((depth for depth, rank in enumerate(of) if rank), len(of))
    return found


def rank_hits(ranks: Sequence[Sequence[Sequence[int]]]) -> list[dict[str, Any]]:
    """Returns `GoldenRun.rank_hits` of the ranks of several answers."""
    places = [of for answer in ranks for of in answer]
    found = []
    for depth in range(max(map(len, places), default=0)):
        here = [of[depth] for of in places if len(of) > depth]
        found.append({"starts": len(here), "hits": [here.count(rank) for rank in range(RANKS)]})
    return found


def acceptance_of(accepted_PA: np.ndarray) -> dict[str, Any]:
    """Returns acceptance by position of prompts' histograms `[P, T + 1]`, with intervals over prompts."""
    rounds_P = accepted_PA.sum(axis=1)
    reached_PA = np.cumsum(accepted_PA[:, ::-1], axis=1)[:, ::-1]
    kept = [resampled(quotient(reached_P, rounds_P), [0] * len(rounds_P)) for reached_P in reached_PA.T[1:]]
    return {
        "rounds": int(rounds_P.sum()),
        "acceptance_length": _known(1 + sum(s.value for s in kept)),
        "survival": [_known(s.value) for s in kept],
        "low": [_known(s.low) for s in kept],
        "high": [_known(s.high) for s in kept],
    }


def _known(value: float) -> float | None:
    """Returns a number that JSON can hold; None for one that is not known."""
    return float(value) if math.isfinite(value) else None
