"""Peers asked prompt by prompt in turns: what they answer is kept as it comes, and a peer that fails is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from jaxspec.console import tables
from jaxspec.console.progress import progress
from jaxspec.data import jsonl
from jaxspec.decoding.requests import Request
from jaxspec.evaluation import peer_processes
from jaxspec.evaluation.machine import Drift, copy_bandwidth, drift_of
from jaxspec.evaluation.peer_workers import PeerPrompt, Reply
from jaxspec.parallel.agreement import say

PLAIN = "jaxspec plain"
"""Name of the peer that all others are held to."""
TURN, TRIED, FAILED, BANDWIDTH = "turn", "tried", "failed", "bandwidth"
"""Kinds of lines of a ledger."""
GRID = [{"tokens": k, "threshold": t, "schedule": "constant"} for k in (2, 3, 4, 5, 8) for t in (0.0, 0.4)]
"""Settings among which assisted generation is given its best."""


class Peer(Protocol):
    """Answers prompts, as `peer_processes.PeerProcess` does."""

    def ask(self, asked: PeerPrompt) -> Reply:
        """Returns an answer; raises ValueError with the reason that there is none."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


AnyPeer = TypeVar("AnyPeer", bound=Peer)


class PeerLedger:
    """All that a run has measured: in a file, from which the same command goes on, or in memory alone.

    Raises ValueError as `jsonl.journal` does, of the output `of`.
    """

    def __init__(self, path: Path | None = None, settings: Mapping[str, Any] | None = None, of: str = "") -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path is not None:
            self.lines = jsonl.journal(path, dict(settings or {}), of=Path(of), fields=("event",))

    def note(self, event: str, **fields: Any) -> None:
        """Adds a line; in a file it is on disk when this returns."""
        line = {"event": event, **fields}
        if self.path is not None:
            jsonl.append(self.path, [line])
        self.lines.append(line)

    def of(self, event: str) -> list[dict[str, Any]]:
        """Returns the lines of a kind, in order."""
        return [line for line in self.lines if line["event"] == event]

    @property
    def failed(self) -> dict[str, str]:
        """Peers that are left out, with the reasons."""
        return {line["peer"]: line["reason"] for line in self.of(FAILED)}

    @property
    def turns(self) -> dict[tuple[int, int], dict[str, Reply]]:
        """Answers of all peers by repeat and number of the prompt."""
        return {(line["repeat"], line["prompt"]): line["replies"] for line in self.of(TURN)}

    @property
    def drift(self) -> Drift:
        """Copy bandwidths before and after each session."""
        return drift_of([line["bytes_per_second"] for line in self.of(BANDWIDTH)])

    def passes(self, names: Sequence[str], prompts: int) -> dict[str, list[list[Reply]]]:
        """Returns the answers of these peers in every repeat that is whole."""
        turns = self.turns
        repeats = sorted({repeat for repeat, _ in turns})
        whole = [repeat for repeat in repeats if all((repeat, number) in turns for number in range(prompts))]
        return {name: [[turns[repeat, n][name] for n in range(prompts)] for repeat in whole] for name in names}

    def finish(self) -> None:
        """Removes the file, once the result is written: the next call measures anew."""
        if self.path is not None:
            self.path.unlink()


def leave_out(ledger: PeerLedger, name: str, reason: str) -> None:
    """Notes that a peer fails; the others go on."""
    ledger.note(FAILED, peer=name, reason=reason)
    say(f"{name} is left out: {reason}")


def choose(
    peers: dict[str, AnyPeer], name: str, asked: Sequence[Request], ledger: PeerLedger
) -> dict[str, dict[str, Any]]:
    """Returns the settings by name of the peer that has a choice, if it is here; one that fails leaves `peers`."""
    if name not in peers:
        return {}
    try:
        return {name: fastest(peers[name], asked, ledger)}
    except ValueError as failure:
        leave_out(ledger, name, str(failure))
        peers.pop(name).close()
        return {}


def fastest(peer: Peer, asked: Sequence[Request], ledger: PeerLedger) -> dict[str, Any]:
    """Returns the settings of `GRID` with which a peer is fastest on these prompts; those that were tried are known."""
    speeds = {json.dumps(line["settings"]): line["tokens_per_second"] for line in ledger.of(TRIED)}
    left = [settings for settings in GRID if json.dumps(settings) not in speeds]
    with progress("choosing assisted generation's settings", len(left), "settings") as bar:
        if left:
            ask_all(peer, asked[:1], left[0])  # not counted
        for settings in left:
            speed = peer_processes.rate(ask_all(peer, asked, settings))
            ledger.note(TRIED, settings=settings, tokens_per_second=speed)
            speeds[json.dumps(settings)] = speed
            bar.advance(1, f"{settings}: {tables.four_digits(speed)} tokens/s")
    return max(GRID, key=lambda settings: speeds[json.dumps(settings)])


def ask_all(peer: Peer, asked: Sequence[Request], settings: Mapping[str, Any]) -> list[Reply]:
    """Returns a peer's answers."""
    return [peer.ask(make_asked(request, settings)) for request in asked]


def make_asked(request: Request, settings: Mapping[str, Any]) -> PeerPrompt:
    """Returns a request as a worker takes it."""
    return PeerPrompt([int(t) for t in request.tokens], list(request.settings.stop_ids), settings)


def take_turns(
    peers: dict[str, AnyPeer],
    asked: Sequence[Request],
    settings: Mapping[str, Mapping[str, Any]],
    ledger: PeerLedger,
    *,
    repeats: int,
) -> None:
    """Asks all peers every prompt `repeats` times, and keeps each turn; those of an earlier session stand.

    Every other turn is in the reverse order. A first turn of each prompt, which compiles, is dropped. A peer that fails
    leaves `peers`. Raises ValueError where plain decoding of this library does.
    """
    taken = ledger.turns
    every = [(repeat, number) for repeat in range(repeats) for number in range(len(asked))]
    left = [turn for turn in every if turn not in taken]
    first = sorted({number for _, number in left})
    with progress("timing", len(first) + len(left), "turns") as bar:
        bar.tell("a first turn of each prompt, which compiles, is not counted")
        for number in first:
            _turn(peers, asked[number], settings, ledger, backwards=number % 2 == 1)
            bar.advance()
        ledger.note(BANDWIDTH, bytes_per_second=copy_bandwidth())
        for repeat, number in left:
            replies = _turn(peers, asked[number], settings, ledger, backwards=(repeat + number) % 2 == 0)
            ledger.note(TURN, repeat=repeat, prompt=number, replies=replies)
            bar.advance(1, f"repeat {repeat + 1} of {repeats}")
        ledger.note(BANDWIDTH, bytes_per_second=copy_bandwidth())


def _turn(
    peers: dict[str, AnyPeer],
    request: Request,
    settings: Mapping[str, Mapping[str, Any]],
    ledger: PeerLedger,
    *,
    backwards: bool,
) -> dict[str, Reply]:
    """Returns the answers to one prompt."""
    replies = {}
    for name in list(peers)[:: -1 if backwards else 1]:
        try:
            replies[name] = peers[name].ask(make_asked(request, settings.get(name, {})))
        except ValueError as failure:
            if name == PLAIN:
                raise ValueError(f"{name}, which all others are held to: {failure}") from failure
            leave_out(ledger, name, str(failure))
            peers.pop(name).close()
    return replies
