"""Acceptance as servers report it: counters of their metrics page, and figures of single answers.

Names are those of vLLM (`vllm:spec_decode_*`, by Prometheus; `metrics.speculative_decoding` of an answer) and SGLang
(`spec_*` of an answer's `meta_info`), as of late 2026. Counters add up over all clients of a server, so a difference is
of one run only where nobody else asks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

DRAFTS, DRAFTED_TOKENS, ACCEPTED, BY_POSITION = (
    f"spec_decode_num_{name}_total" for name in ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")
)
"""Names of vLLM's counters behind their prefix."""
_LINE = re.compile(r"^(?:[a-z_]+:)?([a-zA-Z_]\w*)(?:\{(.*)\})?\s+([-+0-9.eEaNnIif]+)")
_POSITION = re.compile(r'position="(\d+)"')


class Counters(NamedTuple):
    """A server's counters of speculative decoding, since it was started or between two readings."""

    drafts: float
    """Rounds that scheduled a draft."""
    draft_tokens: float
    accepted_tokens: float
    """Drafted tokens that were accepted, those behind a stop id included (vLLM)."""
    by_position: tuple[float, ...]
    """Of each position of the draft, how often it was accepted."""

    def since(self, before: Counters) -> Counters:
        """Returns what was added since an earlier reading. Raises ValueError where the server was started again."""
        positions = max(len(self.by_position), len(before.by_position))
        now, then = (c.by_position + (0.0,) * (positions - len(c.by_position)) for c in (self, before))
        gained = Counters(
            self.drafts - before.drafts,
            self.draft_tokens - before.draft_tokens,
            self.accepted_tokens - before.accepted_tokens,
            tuple(a - b for a, b in zip(now, then, strict=True)),
        )
        if min(*gained[:3], *gained.by_position, 0.0) < 0:
            raise ValueError("the server's counters have fallen: it was started again, so the run must be repeated")
        return gained

    def figures(self) -> dict[str, Any]:
        """Returns `acceptance_length` (1 + accepted / drafts), `survival` by position, and `acceptance_rate`.

        None where nothing was drafted.
        """
        if not self.drafts:
            return {"drafts": 0, "acceptance_length": None, "survival": None, "acceptance_rate": None}
        return {
            "drafts": int(self.drafts),
            "acceptance_length": 1 + self.accepted_tokens / self.drafts,
            "survival": [kept / self.drafts for kept in self.by_position],
            "acceptance_rate": self.accepted_tokens / self.draft_tokens if self.draft_tokens else None,
        }


def parse_counters(text: str) -> Counters | None:
    """Returns the counters of a metrics page in Prometheus' text form, engines added up; None where it has none."""
    sums = {DRAFTS: 0.0, DRAFTED_TOKENS: 0.0, ACCEPTED: 0.0}
    positions: dict[int, float] = {}
    found = False
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        name, labels, value = match.groups()
        if name in sums:
            found = True
            sums[name] += float(value)
        elif name == BY_POSITION and (position := _POSITION.search(labels or "")):
            at = int(position.group(1))
            positions[at] = positions.get(at, 0.0) + float(value)
    if not found:
        return None
    by_position = tuple(positions.get(i, 0.0) for i in range(max(positions, default=-1) + 1))
    return Counters(sums[DRAFTS], sums[DRAFTED_TOKENS], sums[ACCEPTED], by_position)


class AnswerAcceptance(NamedTuple):
    """Rounds and accepted drafts of one answer."""

    rounds: int
    accepted: int
    drafted: int


def of_answer(response: Mapping[str, Any]) -> AnswerAcceptance | None:
    """Returns what a response, or its last chunk, says of its own rounds; None where it says nothing."""
    metrics = response.get("metrics")
    spec = metrics.get("speculative_decoding") if isinstance(metrics, Mapping) else None
    fields: Sequence[str] = ("num_spec_steps", "num_accepted_draft_tokens", "num_draft_tokens")
    if not isinstance(spec, Mapping):
        choices = response.get("choices") or [{}]
        places = (response.get("meta_info"), choices[0].get("meta_info") if isinstance(choices[0], Mapping) else None)
        spec = next((place for place in places if isinstance(place, Mapping)), None)
        fields = ("spec_verify_ct", "spec_num_correct_drafts", "spec_num_proposed_drafts")
    if not isinstance(spec, Mapping) or not all(isinstance(spec.get(name), int) for name in fields):
        return None
    return AnswerAcceptance(*(spec[name] for name in fields))
