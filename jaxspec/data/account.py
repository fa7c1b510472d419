"""The account of a reading: what was left out of some data, and what was not used, counted by kind."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping

from jaxspec.data.messages import BadRecord

SKIPPED, FIELD = "records left out: ", "records with the field "


class Account:
    """Counts, by the words that say it, of what became of records and turns; refuses bad records, or skips them."""

    def __init__(self, *, skip_bad: bool = False, flag: str = "--skip-bad") -> None:
        self.skip_bad = skip_bad
        self.flag = flag
        """How a user asks for bad records to be skipped; empty where nobody can."""
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}
        """The first record of each kind that was skipped, in a sentence."""

    def refuse(self, place: str, error: ValueError) -> None:
        """Counts a bad record. Raises ValueError naming its place, unless such records are skipped."""
        sentence = f"{place}: {error}" if place else str(error)
        if not self.skip_bad:
            raise ValueError(f"{sentence} ({self.flag} leaves such records out)" if self.flag else sentence) from error
        kind = SKIPPED + (error.kind if isinstance(error, BadRecord) else "malformed")
        self.counts[kind] += 1
        self.examples.setdefault(kind, sentence)

    def note_unread(self, fields: Iterable[str]) -> None:
        """Counts the fields of a record that are not read."""
        self.counts.update(f"{FIELD}{name}, which is not read" for name in set(fields))

    @property
    def skipped(self) -> int:
        """Number of records left out."""
        return sum(count for kind, count in self.counts.items() if kind.startswith(SKIPPED))

    def sentences(self) -> list[str]:
        """Returns a line for each kind, with an example of those that were skipped."""
        return [
            f"{line}; the first is {self.examples[kind]}" if kind in self.examples else line
            for kind, line in zip(self.counts, sentences(self.counts), strict=True)
        ]


def sentences(counts: Mapping[str, int]) -> list[str]:
    """Returns a line for each count."""
    return [f"{count:,} {kind}" for kind, count in counts.items()]
