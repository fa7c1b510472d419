"""Peers as processes that are asked in turns, and what their answers say beside plain decoding's."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxspec.decoding.answers import Answer
from jaxspec.decoding.requests import Request, make_requests
from jaxspec.evaluation.equivalence import NEAR_TIE, divergences
from jaxspec.evaluation.machine import spread
from jaxspec.evaluation.peer_workers import PeerPrompt, PeerSpec, Reply
from jaxspec.serving.loading import Models

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Variables by which libraries take their number of threads."""


class PeerProcess:
    """A worker's process. `about` is what it says of itself. Raises ValueError, with its reason, where it cannot."""

    def __init__(self, spec: PeerSpec, command: Callable[[str], list[str]]) -> None:
        self.spec = spec
        environment = {**os.environ, **dict.fromkeys(THREADS, str(spec.threads)), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command(json.dumps(spec._asdict())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            # An interrupt is the parent's, which ends it.
            start_new_session=True,
        )
        try:
            self.about = self._hear()
        except ValueError:
            self.close()
            raise

    def ask(self, asked: PeerPrompt) -> Reply:
        """Returns the worker's answer to a prompt. Raises ValueError with the reason that there is none."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what follows says how its process ended
            self._process.stdin.write(json.dumps({**asked._asdict(), "settings": dict(asked.settings)}) + "\n")
            self._process.stdin.flush()
        return self._hear()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # of a prompt that it did not take
                pipe.close()

    def _hear(self) -> Reply:
        assert self._process.stdout is not None
        # Libraries print to stdout too; a worker's lines are the ones that hold an object.
        for line in self._process.stdout:
            if line.startswith("{"):
                reply = json.loads(line)
                if "failed" in reply:
                    raise ValueError(reply["failed"])
                return reply
        raise ValueError(f"its process ended with code {self._process.wait()}")


def rate(replies: Sequence[Reply]) -> float:
    """Returns new tokens a second, prefill included."""
    return sum(len(r["tokens"]) for r in replies) / sum(r["seconds"] for r in replies)


def decode_rate(replies: Sequence[Reply]) -> float | None:
    """Returns new tokens a second behind the first target call; None where there are none.

    A first call that checks drafts with the prompt gives several tokens, and none of them is counted.
    """
    seconds = sum(r["seconds"] - r["prefill_seconds"] for r in replies)
    tokens = sum(len(r["tokens"]) - r["first"] for r in replies)
    return tokens / seconds if tokens > 0 and seconds > 0 else None


COMPARED = ("identical_fraction", "near_ties", "differing")


def compare_tokens(
    models: Models, asked: Sequence[Request], ours: Sequence[Reply], theirs: Sequence[Reply], *, tie: float = NEAR_TIE
) -> Reply:
    """Returns how the tokens of a peer differ from plain decoding's, under the names of `COMPARED`.

    An answer that is cut where the other one goes on differs. A margin below `tie` is one.
    """
    ties = differing = same = 0
    for request, one, other in zip(asked, ours, theirs, strict=True):
        a, b = (np.asarray(r["tokens"], np.int32) for r in (one, other))
        if np.array_equal(a, b):
            same += 1
            continue
        shared = min(len(a), len(b))
        if np.array_equal(a[:shared], b[:shared]):
            differing += 1
            continue
        answers = [Answer(x, "stop", 0, np.zeros(1, np.int32)) for x in (a, b)]
        requests = make_requests([request])
        (parted,) = divergences(models.engine, models.weights, requests, answers[:1], answers[1:])
        ties, differing = ties + (parted.margin < tie), differing + (parted.margin >= tie)
    return dict(zip(COMPARED, (same / len(asked), ties, differing), strict=True))


def row_of(name: str, spec: PeerSpec, about: Mapping[str, Any], runs: Sequence[Sequence[Reply]]) -> dict[str, Any]:
    """Returns a peer's row: of its speed the median, least and greatest of the repeats; tau is of the first repeat."""
    first, calls = runs[0], sum(r["calls"] for r in runs[0])
    decoding = [speed for speed in map(decode_rate, runs) if speed is not None]
    return {
        "peer": name,
        "version": about["version"],
        "settings": {**spec.settings, **{k: v for k, v in about.items() if k != "version"}},
        **spread("tokens_per_second", [rate(run) for run in runs]),
        **spread("decode_tokens_per_second", decoding),
        **spread("ttft_ms", [1e3 * float(np.median([r["prefill_seconds"] for r in run])) for run in runs]),
        "tokens": sum(len(r["tokens"]) for r in first),
        "target_calls": calls,
        "tau": sum(r["counted"] for r in first) / calls if calls else None,
    }
