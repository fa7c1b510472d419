"""Acceptance as servers report it: their metrics page, and figures of single answers.

| server | metrics page | answers |
|---|---|---|
| vLLM | counters `vllm:spec_decode_*` | `metrics.speculative_decoding` |
| SGLang | gauges `sglang:spec_accept_*` of the last interval | `sglext.spec_tokens_details`, or `meta_info` |
| llama.cpp | | `timings` |

Names are those of late 2026. Counters add up over all clients of a server, so a difference is of one run only where
nobody else asks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

DRAFTS, DRAFTED_TOKENS, ACCEPTED, BY_POSITION = (
    f"spec_decode_num_{name}_total" for name in ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")
)
"""Names of vLLM's counters behind their prefix."""
GAUGES = ("spec_accept_length", "spec_accept_rate")
"""Names of SGLang's gauges behind their prefix."""
_VLLM = ("num_spec_steps", "num_accepted_draft_tokens", "num_draft_tokens", "acceptance_histogram")
_SGLANG = (
    "spec_verify_ct",
    "spec_num_correct_drafts",
    "spec_num_proposed_drafts",
    "spec_correct_drafts_histogram",
)
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
    """Of each position of the draft, how often it was accepted; empty where it is not known."""

    def since(self, before: Counters) -> Counters:
        """Returns what was added since an earlier reading. Raises ValueError where the server was started again."""
        gained = self._joined(before, -1)
        if min(*gained[:3], *gained.by_position, 0.0) < 0:
            raise ValueError("the server's counters have fallen: it was started again, so the run must be repeated")
        return gained

    def plus(self, other: Counters) -> Counters:
        """Returns the counters of both."""
        return self._joined(other, 1)

    def _joined(self, other: Counters, sign: int) -> Counters:
        positions = max(len(self.by_position), len(other.by_position))
        mine, theirs = (c.by_position + (0.0,) * (positions - len(c.by_position)) for c in (self, other))
        return Counters(
            self.drafts + sign * other.drafts,
            self.draft_tokens + sign * other.draft_tokens,
            self.accepted_tokens + sign * other.accepted_tokens,
            tuple(a + sign * b for a, b in zip(mine, theirs, strict=True)),
        )

    def figures(self) -> dict[str, Any]:
        """Returns `acceptance_length` (1 + accepted / drafts), `survival` by position, and `acceptance_rate`.

        None where nothing was drafted, or where it is not known.
        """
        if not self.drafts:
            return {"drafts": 0, "acceptance_length": None, "survival": None, "acceptance_rate": None}
        return {
            "drafts": int(self.drafts),
            "acceptance_length": 1 + self.accepted_tokens / self.drafts,
            "survival": [kept / self.drafts for kept in self.by_position] or None,
            "acceptance_rate": self.accepted_tokens / self.draft_tokens if self.draft_tokens else None,
        }


class Gauges(NamedTuple):
    """A server's own figures at one moment, of its last interval; None where it shows none."""

    acceptance_length: float | None
    """New tokens a round (SGLang: the prefill token in)."""
    acceptance_rate: float | None


class MetricsPage(NamedTuple):
    """The parts of a metrics page about speculative decoding; None where it has none."""

    counters: Counters | None
    gauges: Gauges | None


def parse_page(text: str) -> MetricsPage:
    """Returns what a page in Prometheus' text form says: counters of engines added up, gauges as their mean."""
    sums = {DRAFTS: 0.0, DRAFTED_TOKENS: 0.0, ACCEPTED: 0.0}
    positions: dict[int, float] = {}
    shown: dict[str, list[float]] = {name: [] for name in GAUGES}
    found = False
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        name, labels, value = match.groups()
        if name in sums:
            found = True
            sums[name] += float(value)
        elif name in shown and math.isfinite(float(value)):
            shown[name].append(float(value))
        elif name == BY_POSITION and (position := _POSITION.search(labels or "")):
            at = int(position.group(1))
            positions[at] = positions.get(at, 0.0) + float(value)
    by_position = tuple(positions.get(i, 0.0) for i in range(max(positions, default=-1) + 1))
    counters = Counters(sums[DRAFTS], sums[DRAFTED_TOKENS], sums[ACCEPTED], by_position) if found else None
    means = [sum(values) / len(values) if values else None for values in shown.values()]
    return MetricsPage(counters, Gauges(*means) if any(shown.values()) else None)


class AnswerAcceptance(NamedTuple):
    """Rounds and accepted drafts of one answer."""

    rounds: int
    accepted: int
    drafted: int
    histogram: tuple[int, ...] = ()
    """Rounds that accepted 0, 1, 2 .. drafted tokens; empty where it is not told."""


def of_answer(response: Mapping[str, Any]) -> AnswerAcceptance | None:
    """Returns what a response, or its last chunk, says of its own rounds; None where it says nothing."""
    choice = next(iter(response.get("choices") or ()), None)
    metrics, extension = response.get("metrics"), response.get("sglext")
    for place, names in (
        (_part(metrics, "speculative_decoding"), _VLLM),
        (_part(extension, "spec_tokens_details"), _SGLANG),
        (_part(response, "meta_info"), _SGLANG),
        (_part(choice, "meta_info"), _SGLANG),
    ):
        if (told := _integers(place, names[:3])) is not None:
            histogram = place.get(names[3])
            counts = histogram if isinstance(histogram, list) and all(_whole(h) for h in histogram) else []
            return AnswerAcceptance(told[0], told[1], told[2], tuple(counts))
    # llama.cpp tells no rounds. Each gives a token more than it accepts, and prefill gives the first.
    told = _integers(_part(response, "timings"), ("predicted_n", "draft_n_accepted", "draft_n"))
    return None if told is None else AnswerAcceptance(max(0, told[0] - 1 - told[1]), told[1], told[2])


def _part(place: object, name: str) -> Mapping[str, Any]:
    """Returns the object of this name; an empty one where there is none."""
    part = place.get(name) if isinstance(place, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _integers(place: Mapping[str, Any], names: Sequence[str]) -> list[int] | None:
    """Returns the fields of these names; None where one is missing or no integer."""
    return [place[name] for name in names] if all(_whole(place.get(name)) for name in names) else None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
