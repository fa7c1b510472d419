"""A tiny random target and drafter ready to be served, jobs for them, and their answers without a server."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from random_models import write_drafter, write_target

from jaxspec.decoding.generation import generate
from jaxspec.decoding.requests import Settings, make_requests
from jaxspec.decoding.slots import Slots
from jaxspec.serving.answer_text import AnswerText
from jaxspec.serving.loading import Models, load_models
from jaxspec.serving.outbox import Delta, Outbox
from jaxspec.serving.scheduler import AnswerJob, Scheduler

LONGEST, MOST_NEW = 96, 96


class Asking(NamedTuple):
    """A prompt and how it is to be answered."""

    prompt: str
    settings: Settings = Settings(max_new_tokens=48)
    stops: tuple[str, ...] = ()


def toy_models(folder: Path, tree: str = "dynamic:8x3x3") -> Models:
    """Models with a template that shows a user's turn as it stands."""
    if not folder.joinpath("target").exists():
        write_target(folder / "target")
        write_drafter(folder / "drafter")
    return load_models(str(folder / "target"), drafter=folder / "drafter", tree=tree, template="none")


def toy_scheduler(models: Models, *, batch: int = 3, most_waiting: int = 64) -> Scheduler:
    """A scheduler with drafting and plain slots, not started."""

    def slots(one: Models, count: int) -> Slots:
        sizes = {"longest": LONGEST, "max_new_tokens": MOST_NEW, "stops": max(1, len(models.stop_ids))}
        return Slots(one.engine, one.weights, count, **sizes, widths=(32,))

    lanes = {
        "speculative": functools.partial(slots, models, batch),
        "plain": functools.partial(slots, models.plain(), 2),
    }
    return Scheduler(lanes, most_waiting=most_waiting)


class Caller:
    """A client of a scheduler without a socket: its job, and the deltas that it has taken."""

    def __init__(self, models: Models, asked: Asking, *, watched: bool = False, room: int = 64) -> None:
        self.told = threading.Event()
        request = models.request(models.tokenizer.encode_raw(asked.prompt), asked.settings)
        self.outbox = Outbox(self.told.set, room)
        self.job = AnswerJob(request, AnswerText(models.tokenizer, asked.stops), self.outbox, watched=watched)
        self.deltas: list[Delta] = []
        self.failure: str | None = None

    def wait(self, seconds: float = 60.0) -> Caller:
        """Takes deltas until the answer has ended."""
        while not (self.failure or (self.deltas and self.deltas[-1].finish)):
            assert self.told.wait(seconds), "no answer came"
            self.told.clear()
            taken, self.failure = self.outbox.take()
            self.deltas += taken
        return self

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.ids]


def alone(models: Models, asked: Asking) -> tuple[str, list[int], str]:
    """Text, tokens and finish of an answer that is decoded by itself, without stop strings."""
    request = models.request(models.tokenizer.encode_raw(asked.prompt), asked.settings)
    (answer,) = generate(models.engine, models.weights, make_requests([request], width=32))
    return models.tokenizer.decode(answer.tokens), answer.tokens.tolist(), answer.finish


def askings(count: int, **changes: Any) -> Sequence[Asking]:
    """As many different askings, greedy ones among them."""
    heats = (0.0, 0.7, 1.0)
    return [
        Asking(
            f"{i} and {i % 7} make {i + i % 7}",
            dataclasses.replace(Settings(48 - i % 5, heats[i % 3], seed=i), **changes),
        )
        for i in range(count)
    ]
