"""Tracking of runs: metrics in files and services that show them, and the record `run.json`."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib
import importlib.metadata
import json
import math
import platform
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import jax

from jaxspec import __version__
from jaxspec.checkpoints.event_file import EventFile, append_whole
from jaxspec.checkpoints.manifest import RUN
from jaxspec.console.results import git_sha, json_text, jsonable, machine_facts, write_json
from jaxspec.data.jsonl import drop_torn_line, read_lines

METRICS, TENSORBOARD, RECORD, LOCK = "metrics.jsonl", "tensorboard", RUN, ".lock"
VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Sink(Protocol):
    """A destination of metrics. When a run resumes from a step, its sinks drop the metrics of later steps."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds the metrics of a step: numbers, or mappings of numbers."""
        ...

    def close(self) -> None:
        """Ends the metrics."""
        ...


class JsonLines:
    """A file of one JSON object a line; `step` is one of its keys."""

    def __init__(self, path: Path, resumed_from: int = 0):
        self.path = path
        drop_torn_line(path)
        kept = [line for line in read_lines(path) if line["step"] <= resumed_from]
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text("".join(json_text(line) + "\n" for line in kept), encoding="utf-8")
        draft.replace(path)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends a line."""
        append_whole(self.path, (json_text({"step": step, **metrics}) + "\n").encode())

    def close(self) -> None:
        """Does nothing, since no file is open."""


class TensorBoard:
    """Scalars for `tensorboard --logdir`; nested names are joined by slashes."""

    def __init__(self, folder: Path, resumed_from: int = 0):
        self.file = EventFile(folder, resumed_from)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the finite numbers."""
        self.file.write(step, flat(metrics))

    def close(self) -> None:
        """Does nothing, since no file is open."""


class WeightsAndBiases:
    """A Weights & Biases run. It keeps the first metrics of a step, and a resumed run repeats the same ones."""

    def __init__(self, project: str, record: Mapping[str, Any], folder: Path):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise ValueError(
                f"tracking.wandb is {project!r}, but wandb is not installed: pip install wandb, or set it to none"
            ) from None
        about = {name: record[name] for name in ("name", "id", "config")}
        self.run = wandb.init(project=project, resume="allow", dir=str(folder), **about)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs the finite numbers."""
        self.run.log(flat(metrics), step=step)

    def close(self) -> None:
        """Waits for the upload."""
        self.run.finish()


class Tracker:
    """All sinks of a run as one. A full disk stops neither the run nor later metrics, and is reported once."""

    def __init__(self, sinks: Sequence[Sink] = (), tell: Callable[[str], None] = warnings.warn):
        self.sinks, self.tell = sinks, tell
        self.failing = False

    def write(self, step: int, **metrics: Any) -> None:
        """Adds the metrics of a step to every sink."""
        plain, failure = jsonable(metrics), None
        for sink in self.sinks:
            try:
                sink.write(step, plain)
            except OSError as error:
                failure = error
        if failure is not None and not self.failing:
            self.tell(f"metrics are not written from step {step:,} on ({failure.strerror or failure})")
        self.failing = failure is not None


@contextlib.contextmanager
def track(
    folder: Path,
    resumed_from: int = 0,
    *,
    wandb: str | None = None,
    record: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = warnings.warn,
) -> Iterator[Tracker]:
    """Yields a tracker: JSON lines and TensorBoard in the run's folder, and Weights & Biases in the project `wandb`.

    `record` is the one that `session` yields, for Weights & Biases. Only process 0 of a distributed run writes metrics.
    Raises ValueError if `wandb` is given but not installed.
    """
    if jax.process_index() != 0:
        yield Tracker()
        return
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        sinks: list[Sink] = [JsonLines(folder / METRICS, resumed_from), TensorBoard(folder / TENSORBOARD, resumed_from)]
        if wandb is not None:
            sinks.append(WeightsAndBiases(wandb, record or {}, folder))
        for sink in sinks:
            stack.callback(sink.close)
        yield Tracker(sinks, tell)


@contextlib.contextmanager
def sole(folder: Path) -> Iterator[None]:
    """Locks a run's folder, so that no other process trains there; raises ValueError if one does.

    The lock ends with the process. On a file system without locks nothing is locked.
    """
    if jax.process_index() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        if not _lock(file):
            raise ValueError(f"{folder}: another process trains there; wait for it, or change checkpoint.folder")
        yield


def is_held(folder: Path) -> bool:
    """Returns whether a process trains in a run's folder, as far as this machine can see."""
    path = folder / LOCK
    if not path.is_file():
        return False
    with path.open("a") as file:
        return not _lock(file)


def _lock(file: IO[str]) -> bool:
    """Locks an open file until it is closed; returns False if another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        pass
    return True


@contextlib.contextmanager
def session(folder: Path, facts: Mapping[str, Any], resumed_from: int = 0) -> Iterator[dict[str, Any]]:
    """Keeps `run.json` of a run's folder, and yields its contents: `facts`, and code, versions, machine and times.

    Each start or resumption is one of its `sessions`. Their `end` is "finished", "stopped" (by a failure or a notice),
    or missing while the session runs and after a kill.
    """
    if jax.process_index() != 0:
        yield {**facts, "sessions": [{"git_sha": git_sha()}]}
        return
    begun: dict[str, Any] = {"started": _now(), "resumed_from": resumed_from or None, **circumstances()}
    record = read_record(folder) or {"id": secrets.token_hex(4)}
    record |= {**facts, "sessions": [*record.get("sessions", []), begun]}
    write_json(folder / RECORD, record)
    try:
        yield record
    except BaseException:
        begun.update(ended=_now(), end="stopped")
        with contextlib.suppress(OSError):  # the exception that is being raised says more
            write_json(folder / RECORD, record)
        raise
    begun.update(ended=_now(), end="finished")
    write_json(folder / RECORD, record)


def circumstances() -> dict[str, Any]:
    """Returns the version of the code and of its dependencies, and the machine."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    return {
        "jaxspec": __version__,
        "git_sha": git_sha(),
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"host": platform.node(), "processes": jax.process_count(), **machine_facts()},
    }


def read_record(folder: Path) -> dict[str, Any] | None:
    """Returns the contents of a folder's `run.json`; None if there is none. Raises ValueError if it cannot be read."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: not the record of a run ({error}); move it away") from error


def provenance(record: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Returns the description of a run, and of one of its steps, for the manifest of a model."""
    return {
        "run": record["name"],
        "step": step,
        "of_steps": record["steps"],
        "git_sha": record["sessions"][-1]["git_sha"],
        "training": record["config"],
    }


def export_of(run: Path, record: Mapping[str, Any]) -> Path:
    """Returns the folder that a run exports into.

    The record has the names that the config gave, which may be relative to where the run was started: so the folder is
    looked for beside the run too. Raises ValueError where it is not there.
    """
    named, kept = Path(record["config"]["export_folder"]), Path(record["config"]["checkpoint"]["folder"])
    started = [parent for parent in run.absolute().parents if parent / kept == run.absolute()]
    for path in (named, *(parent / named for parent in started), run / named.name):
        if path.is_dir():
            return path
    raise ValueError(
        f"{run}: the folder that the run exports into, {named}, is not here, and it holds the tokenizer: give the "
        "command where the run was started, or export that folder"
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics, without a line that is being written."""
    path = folder / METRICS
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]
    except ValueError as error:
        raise ValueError(f"{path}: holds a line that is not JSON ({error}): take it out") from error


def flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns the finite numbers among nested metrics by path: `{"eval": {"loss": 1}}` gives `eval/loss`."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[f"{prefix}{name}"] = float(value)
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
