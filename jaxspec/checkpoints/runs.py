"""Checkpoints of training runs, which resume exactly and on any mesh."""

import contextlib
import logging
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxspec.base import Params
from jaxspec.checkpoints.folders import (
    PATIENCE,
    format_mark,
    is_first,
    keep_log_record,
    load_arrays,
    reason_of,
    stored_shapes,
)
from jaxspec.checkpoints.manifest import (
    Manifest,
    amend_manifest,
    is_checkpoint,
    read_manifest,
    sync_folder,
    verify,
    write_manifest,
)

_TEMPORARY = re.compile(r"\d+\.tmp(\..*)?")
"""Names of steps that are being written or removed."""


class BestMetric(NamedTuple):
    """The figure of an evaluation that decides which step is best."""

    figure: str
    rising: bool
    """Whether a greater figure is better."""

    def of(self, metrics: Mapping[str, Any]) -> float | None:
        """Returns a number that is greater for a better step; None without an evaluation or a finite figure."""
        value = metrics.get(self.figure)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return value if self.rising else -value


class Restored(NamedTuple):
    """One step of a run, restored."""

    step: int
    state: Any
    data_state: dict[str, Any]  # the data iterator's `get_state()`
    config: dict[str, Any]
    metrics: dict[str, Any]  # of its evaluation; empty if there was none


class RunCheckpoints:
    """The checkpoints of one training run: `folder/<step>`, the last `keep` of them and the `keep_best` best.

    A step exists whole or not at all: it is written under another name, with the checksums of its files, and then
    renamed; older steps are removed after that. The remains of an interrupted save are removed when the run is opened
    again. Steps that are incomplete or damaged are reported and skipped, and the next save of that step replaces them.

    Saves run in the background. A failed save is reported with `tell`, and the run continues to its next save; the
    last complete step stays. `PATIENCE` failures in a row are raised, as is the failure of a save that is waited for.
    All processes of a distributed run call the same methods in the same order; process 0 decides which step is read.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        keep_best: int = 0,
        best_metric: BestMetric | None = None,
        tell: Callable[[str], None] = warnings.warn,
    ):
        self.folder = Path(folder).absolute()
        self._keep, self._keep_best, self._best_metric, self._tell = keep, keep_best, best_metric, tell
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failure: OSError | None = None
        self._failures = 0
        logging.getLogger("absl").addFilter(keep_log_record)
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.iterdir():
                if _TEMPORARY.fullmatch(leftover.name):
                    shutil.rmtree(leftover)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("open checkpoints")
        self._metrics = complete_steps(self.folder, tell=tell)

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: Any,
        data_state: dict[str, Any],
        config: dict[str, Any],
        *,
        metrics: dict[str, Any] | None = None,
        wait: bool = True,
    ) -> None:
        """Writes one step; a complete step of the same number stays as it is.

        `state` is any pytree of arrays, typed PRNG keys included; it may be donated as soon as this returns.
        `data_state`, `config` and `metrics` are JSON; the metrics are those of its evaluation, for `best_step`. Raises
        OSError, in one sentence, if the save fails and `wait` is set, or if `PATIENCE` saves before it have failed.
        """
        self._settle()
        if self._failure is not None and self._failures >= PATIENCE and not wait:
            raise self._failure
        if step in self._metrics:
            return
        manifest = {"kind": "run", "step": step, "data": data_state, "config": config, "metrics": metrics or {}}
        try:
            with self._explained(step):
                # Orbax's own sequence of steps would delete old steps before the checksums are written.
                path = str(self._temporary(step))
                response = ocp.save_checkpointables_async(path, {"state": state}, custom_metadata=format_mark("run"))
            self._pending = self._writer.submit(self._complete, step, response, manifest)
        except OSError as failure:
            self._failure, self._failures = failure, self._failures + 1
        if wait:
            self.wait()

    def add_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds the evaluation of a step that was saved before it was evaluated; does nothing if its save failed."""
        self._settle()
        if step in self._metrics:
            if is_first():
                amend_manifest(self.folder / str(step), {"metrics": metrics})
            self._metrics[step] = metrics
            self._prune()

    def wait(self) -> None:
        """Waits until the last save is on disk; raises OSError, in one sentence, if it failed."""
        self._settle()
        if self._failure is not None:
            raise self._failure

    def latest_step(self) -> int | None:
        """Returns the last complete step; None before the first."""
        self._settle()
        return max(self._metrics, default=None)

    def best_step(self) -> int | None:
        """Returns the complete step that is best by its evaluation; None if none was evaluated."""
        self._settle()
        ranked = self._ranked()
        return ranked[-1] if ranked else None

    def improves(self, metrics: Mapping[str, Any]) -> bool:
        """Returns whether a step with these metrics would be the best so far; False if best steps are not kept."""
        value = self._best_metric.of(metrics) if self._best_metric and self._keep_best else None
        if self._best_metric is None or value is None:
            return False
        best = self.best_step()
        before = None if best is None else self._best_metric.of(self._metrics[best])
        return before is None or value > before

    def settings(self, step: int) -> dict[str, Any]:
        """Returns the config that a step was saved with."""
        return read_manifest(self.folder / str(step))["config"]

    def restore(self, step: int | None, abstract_state: Any) -> Restored:
        """Returns the state of `step` (None: the last intact one), with the shardings of `abstract_state`.

        `abstract_state` is a tree of `ShapeDtypeStruct`s. Its mesh, device count and process count may differ from
        those that saved. Raises ValueError if the step is missing or damaged, if none is intact, or if a shape differs.
        """
        self._settle()
        step = self._last_intact() if step is None else self._intact(step)
        path = self.folder / str(step)
        try:
            state = ocp.load_checkpointables(str(path), {"state": abstract_state})["state"]
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise ValueError(f"{path}: does not fit this run, whose settings may have changed ({error})") from error
        manifest = read_manifest(path)
        return Restored(step, state, manifest["data"], manifest["config"], manifest["metrics"])

    def close(self) -> None:
        """Waits for the save in progress; a failure has been reported."""
        self._settle()
        self._writer.shutdown()
        logging.getLogger("absl").removeFilter(keep_log_record)

    def _settle(self) -> None:
        """Waits for the save in progress, and notes whether it failed."""
        if self._pending is None:
            return
        failure, self._pending = self._pending.exception(), None
        if failure is not None and not isinstance(failure, OSError):
            raise failure
        self._failure, self._failures = failure, 0 if failure is None else self._failures + 1

    def _complete(self, step: int, response: Any, manifest: Manifest) -> None:
        """Runs in the background: turns the folder that Orbax writes into a complete step."""
        with self._explained(step):
            response.result()
            if is_first():
                temporary, final = self._temporary(step), self.folder / str(step)
                write_manifest(temporary, manifest)
                if final.exists():  # incomplete or damaged, since a complete step is not saved again
                    shutil.rmtree(final)
                temporary.rename(final)
                sync_folder(self.folder)
        self._metrics[step] = manifest["metrics"]
        self._prune()

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turns the failure of a save into one sentence, reports it, and removes the draft."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            last = max(self._metrics, default=None)
            left = "no step is saved" if last is None else f"the last complete step is {last:,}"
            failure = OSError(f"{self.folder}: step {step:,} could not be saved ({reason_of(error)}); {left}")
            self._tell(str(failure))
            if is_first():
                for leftover in self.folder.glob(f"{step}.tmp*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            raise failure from error

    def _prune(self) -> None:
        """Removes all steps but those to keep; each is renamed first, so that it vanishes at once."""
        ranked = self._ranked()
        kept = {*sorted(self._metrics)[-self._keep :], *ranked[len(ranked) - min(self._keep_best, len(ranked)) :]}
        self._metrics = {step: metrics for step, metrics in self._metrics.items() if step in kept}
        for path in _numbered(self.folder) if is_first() else ():
            # Numbered folders of others, such as years of data, are left alone.
            if is_checkpoint(path) and int(path.name) not in kept:
                try:
                    shutil.rmtree(path.rename(self._temporary(int(path.name))))
                except OSError as error:
                    self._tell(f"{path}: could not be removed ({reason_of(error)})")

    def _ranked(self) -> list[int]:
        """Returns the steps that were evaluated, the best last."""
        metric = self._best_metric
        values = {step: metric.of(metrics) if metric else None for step, metrics in self._metrics.items()}
        return [step for _, step in sorted((value, step) for step, value in values.items() if value is not None)]

    def _last_intact(self) -> int:
        if not self._metrics:
            raise ValueError(f"{self.folder}: holds no complete checkpoint")
        found = None
        for step in sorted(self._metrics, reverse=True) if is_first() else ():
            try:
                self._check(step)
            except ValueError as damage:
                self._tell(f"{damage}; step {step:,} is skipped")
                continue
            found = step
            break
        found = _agree(found)
        if found is None:
            raise ValueError(f"{self.folder}: none of its checkpoints is intact; move the folder away to begin again")
        self._metrics = {step: metrics for step, metrics in self._metrics.items() if step <= found}
        return found

    def _intact(self, step: int) -> int:
        if step not in self._metrics:
            raise ValueError(f"{self.folder / str(step)}: no such checkpoint")
        self._check(step)
        return step

    def _check(self, step: int) -> None:
        path = self.folder / str(step)
        verify(path, read_manifest(path))

    def _temporary(self, step: int) -> Path:
        return self.folder / f"{step}.tmp"


def complete_steps(folder: Path, *, tell: Callable[[str], None] = warnings.warn) -> dict[int, dict[str, Any]]:
    """Returns the metrics of every complete step in a run's folder; incomplete ones are reported and left out.

    Files are not compared with their checksums here.
    """
    found = {}
    for path in _numbered(folder):
        try:
            manifest = read_manifest(path)
        except ValueError as damage:
            tell(f"{damage}; step {int(path.name):,} is skipped")
            continue
        if manifest["kind"] == "run":
            found[int(path.name)] = manifest["metrics"]
    return found


def choose_step(folder: Path, best_metric: BestMetric, step: str) -> int:
    """Returns the number of the step called "best" (the last one if none was evaluated), "last" or a number.

    Raises ValueError if it is not a complete step of the run in `folder`.
    """
    steps = complete_steps(folder.absolute())
    if not steps:
        raise ValueError(f"{folder}: holds no complete checkpoint")
    if step not in ("best", "last"):
        if not step.isdecimal() or int(step) not in steps:
            kept = ", ".join(map(str, sorted(steps)))
            raise ValueError(f"{folder}: has no step {step!r}; give best, last or one of {kept}")
        return int(step)
    ranked = sorted((value, at) for at, metrics in steps.items() if (value := best_metric.of(metrics)) is not None)
    return ranked[-1][1] if step == "best" and ranked else max(steps)


def load_run_params(
    folder: Path, step: int, *, sharding: jax.sharding.Sharding | None = None
) -> tuple[Params, Manifest]:
    """Returns `(params, manifest)` of one step of a run, arrays on `sharding`; the rest of its state is not read.

    Raises ValueError if the step is missing or damaged.
    """
    path = folder / str(step)
    manifest = read_manifest(path)
    verify(path, manifest)
    return load_arrays(path, "state", "params", sharding), manifest


def run_shapes(folder: Path, step: int) -> Params:
    """Returns shapes and dtypes of the `params` that `load_run_params` reads."""
    return stored_shapes(folder.absolute() / str(step), "state", "params")


def _numbered(folder: Path) -> list[Path]:
    return [path for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]


def _agree(step: int | None) -> int | None:
    """Returns the value of process 0."""
    if jax.process_count() > 1:
        told = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
        return None if told < 0 else told
    return step
