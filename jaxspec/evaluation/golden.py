"""Golden prompts: what an exported drafter must do where it is served, made by this library beside the export.

A file holds prompts as text and ids, the target's greedy answers, the drafts of the first rounds, and the acceptance by
position that a chain of the served length has along those answers. `served_check` holds a server to it.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.console.results import json_text
from jaxspec.data.prompts import Prompt, encode_prompt
from jaxspec.decoding.answers import Answer
from jaxspec.decoding.generation import generate, generate_plain, run_rounds, start
from jaxspec.decoding.requests import Request, Settings, make_requests
from jaxspec.evaluation.acceptance import fingerprint
from jaxspec.evaluation.equivalence import top_margins
from jaxspec.evaluation.statistics import quotient, resampled
from jaxspec.evaluation.timing import grow
from jaxspec.serving.loading import Models
from jaxspec.trees import parse_tree

FORMAT = "jaxspec-golden/1"
NAME = "golden.json"
NEW_TOKENS = 128
DRAFTED_ROUNDS = 4
"""Rounds of each answer whose drafts are kept."""
MOST = 16
"""Prompts that are taken."""


class GoldenPrompt(NamedTuple):
    """A prompt and what follows it."""

    id: str
    messages: list[dict[str, Any]]
    text: str
    """The rendered prompt."""
    prompt_ids: list[int]
    output_ids: list[int]
    """The target's greedy answer, a stop id included."""
    output_text: str
    margins: list[float]
    """At every token of the answer, the likeliest token's logit less the next one's: small ones are ties."""
    drafts: list[list[int]]
    """Tokens of the chain in the first rounds."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions that the prompt describes."""
    variables: Mapping[str, Any] = types.MappingProxyType({})
    """Of the chat template."""


class Golden(NamedTuple):
    """The contents of a file."""

    facts: dict[str, Any]
    """Hashes of target, drafter, tokenizer and template; dtype, `tree`, `new_tokens`, versions."""
    prompts: list[GoldenPrompt]
    acceptance: dict[str, Any]
    """`rounds`, `acceptance_length`, and `survival` by position with `low` and `high` over prompts."""

    def save(self, path: Path) -> None:
        """Writes the file."""
        found = {"format": FORMAT, **self.facts, "acceptance": self.acceptance}
        path.write_text(json_text(found | {"prompts": [p._asdict() for p in self.prompts]}, indent=1) + "\n")


def read_golden(path: str | Path) -> Golden:
    """Returns the file, or the one in a folder. Raises ValueError where there is none, or it is none."""
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; make it with jaxspec export ... --golden PROMPTS")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise KeyError("format")
        prompts = [GoldenPrompt(**p) for p in found.pop("prompts")]
        acceptance = {name: _numbers(value) for name, value in found.pop("acceptance").items()}
        return Golden(found, prompts, acceptance)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: is not a file of golden prompts ({error}); make it anew") from error


def _numbers(value: Any) -> Any:
    """Returns a list with NaN where JSON has null, and any other value as it is."""
    return [float("nan") if x is None else x for x in value] if isinstance(value, list) else value


def make_golden(models: Models, prompts: Sequence[Prompt], tree: str, facts: dict[str, Any]) -> Golden:
    """Returns golden prompts of a target with its drafter, which drafts a chain.

    Raises ValueError for a tree that is no chain, and naming a prompt that the target cannot read.
    """
    policy = parse_tree(tree)
    if not tree.startswith("chain:"):
        raise ValueError(f"--golden-tree is {tree!r}; servers verify chains: give chain:DEPTH")
    models = models.with_tree(policy)
    settings = Settings(NEW_TOKENS)
    made, accepted = [], []
    for prompt in prompts[:MOST]:
        try:
            request = models.request(encode_prompt(prompt, models.tokenizer), settings)
        except ValueError as error:
            raise ValueError(f"{prompt.name} {error}; mend it or take it out") from error
        requests = make_requests([request])
        (answer,) = generate_plain(models.engine, models.weights, requests)
        made.append(_golden(models, prompt, request, answer))
        # As servers count: with what a last round accepts behind the answer's end, which a replay leaves out.
        (drafted,) = generate(models.engine, models.weights, requests)
        accepted.append(drafted.accepted)
    known = {"tree": tree, "new_tokens": NEW_TOKENS, "drafter": fingerprint(models), **facts}
    return Golden(known, made, acceptance_of(np.asarray(accepted)))


def _golden(models: Models, prompt: Prompt, request: Request, answer: Answer) -> GoldenPrompt:
    tokens, output = [int(t) for t in request.tokens], [int(t) for t in answer.tokens]
    render = models.tokenizer.render
    rendered = render(prompt.messages, add_generation_prompt=True, tools=prompt.tools, variables=prompt.variables)
    margins = top_margins(models.engine.target, models.weights.target, tokens, output)
    drafts = first_drafts(models, request)
    shown = models.tokenizer.decode(output)
    messages, described = ([dict(one) for one in many] for many in (prompt.messages, prompt.tools))
    return GoldenPrompt(
        prompt.id, messages, rendered, tokens, output, shown, margins, drafts, described, dict(prompt.variables)
    )


def first_drafts(models: Models, request: Request) -> list[list[int]]:
    """Returns the drafted chains of the first rounds, fewer where the answer ends before."""
    state, found = start(models.engine, models.weights, make_requests([request])), []
    for _ in range(DRAFTED_ROUNDS):
        if int(jax.device_get(state.finish_B)[0]):
            break
        tree = grow(models.engine, models.weights, state)
        found.append([int(t) for t in jax.device_get(tree.token_BN)[0, 1:]])
        state = run_rounds(models.engine, models.weights, state, jnp.int32(1))
    return found


def acceptance_of(accepted_PA: np.ndarray) -> dict[str, Any]:
    """Returns acceptance by position of prompts' histograms `[P, T + 1]`, with intervals over prompts."""
    rounds_P = accepted_PA.sum(axis=1)
    reached_PA = np.cumsum(accepted_PA[:, ::-1], axis=1)[:, ::-1]
    kept = [resampled(quotient(reached_P, rounds_P), [0] * len(rounds_P)) for reached_P in reached_PA.T[1:]]
    return {
        "rounds": int(rounds_P.sum()),
        "acceptance_length": 1 + sum(s.value for s in kept),
        "survival": [s.value for s in kept],
        "low": [s.low for s in kept],
        "high": [s.high for s in kept],
    }
