"""Checkpoints of training runs, which resume exactly, on any mesh."""

import contextlib
import logging
import math
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
    _is_first,
    _load_arrays,
    _mark,
    _reason,
    _stored_shapes,
    _told_otherwise,
)
from jaxspec.checkpoints.manifest import (
    Manifest,
    amend_manifest,
    read_manifest,
    sync_folder,
    verify,
    write_manifest,
)

_TEMPORARY = "[0-9]*tmp*"


class BestMetric(NamedTuple):
    """The figure of an evaluation that says which step is best."""

    figure: str
    rising: bool
    """Whether more is better."""

    def of(self, metrics: Mapping[str, Any]) -> float | None:
        """Greater for a better step; None for one that was not evaluated, or whose figure is not finite."""
        value = metrics.get(self.figure)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return value if self.rising else -value


class Restored(NamedTuple):
    """One step of a run."""

    step: int
    state: Any
    data_state: dict[str, Any]  # the data iterator's `get_state()`
    config: dict[str, Any]
    metrics: dict[str, Any]  # of its evaluation; empty if there was none


class RunCheckpoints:
    """The checkpoints of one training run: `folder/<step>`, the last `keep` of them and the `keep_best` best.

    A step is there whole or not at all: it is written under another name, with the checksums of its files, and then
    renamed; only then are older ones removed. What an interrupted save left is removed when the run is opened again.
    Steps that are half-written or damaged are told of and passed over, and make way for the next save.

    Saves go on in the background. One that fails is told of with `tell`, and the run goes on to its next save; the
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
        logging.getLogger("absl").addFilter(_told_otherwise)
        if _is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(_TEMPORARY):
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
        """Write one step; a step that is there already stays as it is.

        `state` is any pytree of arrays, typed PRNG keys included; it may be donated as soon as this returns.
        `data_state`, `config` and `metrics` are JSON; the metrics are those of its evaluation, for `best_step`. Raises
        OSError, in one sentence, where the save is waited for and fails, or too many before it have failed.
        """
        self._settle()
        if self._failure is not None and self._failures >= PATIENCE and not wait:
            raise self._failure
        if step in self._metrics:
            return
        manifest = {"kind": "run", "step": step, "data": data_state, "config": config, "metrics": metrics or {}}
        try:
            with self._explained(step):
                path = str(self._temporary(step))
                response = ocp.save_checkpointables_async(path, {"state": state}, custom_metadata=_mark("run"))
            self._pending = self._writer.submit(self._complete, step, response, manifest)
        except OSError as failure:
            self._failure, self._failures = failure, self._failures + 1
        if wait:
            self.wait()

    def add_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Note the evaluation of a step that was saved before it was evaluated; nothing if its save failed."""
        self._settle()
        if step in self._metrics:
            if _is_first():
                amend_manifest(self.folder / str(step), {"metrics": metrics})
            self._metrics[step] = metrics
            self._prune()

    def wait(self) -> None:
        """Wait until the last save is on disk; OSError, in one sentence, if it failed."""
        self._settle()
        if self._failure is not None:
            raise self._failure

    def latest_step(self) -> int | None:
        """The last complete step; None before the first."""
        self._settle()
        return max(self._metrics, default=None)

    def best_step(self) -> int | None:
        """The complete step that is best by its evaluation; None where none was evaluated."""
        self._settle()
        ranked = self._ranked()
        return ranked[-1] if ranked else None

    def improves(self, metrics: Mapping[str, Any]) -> bool:
        """Whether a step with these metrics would be the best so far, and best ones are kept."""
        value = self._best_metric.of(metrics) if self._best_metric and self._keep_best else None
        if self._best_metric is None or value is None:
            return False
        best = self.best_step()
        before = None if best is None else self._best_metric.of(self._metrics[best])
        return before is None or value > before

    def settings(self, step: int) -> dict[str, Any]:
        """The config that a step was saved with."""
        return read_manifest(self.folder / str(step))["config"]

    def restore(self, step: int | None, abstract_state: Any) -> Restored:
        """The state of `step` (None: the last that is intact), laid out as `abstract_state`'s `ShapeDtypeStruct`s say.

        Their shardings may belong to another mesh, device count and process count than those that saved. Raises
        ValueError if the step is missing or damaged, if none is intact, or if a shape differs.
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
        """Wait for the save in progress; one that fails has been told of."""
        self._settle()
        self._writer.shutdown()
        logging.getLogger("absl").removeFilter(_told_otherwise)

    def _settle(self) -> None:
        """Wait for the save in progress, and note how it went."""
        if self._pending is None:
            return
        failure, self._pending = self._pending.exception(), None
        if failure is not None and not isinstance(failure, OSError):
            raise failure
        self._failure, self._failures = failure, 0 if failure is None else self._failures + 1

    def _complete(self, step: int, response: Any, manifest: Manifest) -> None:
        """In the background: turn what Orbax writes into a complete step."""
        with self._explained(step):
            response.result()
            if _is_first():
                temporary, final = self._temporary(step), self.folder / str(step)
                write_manifest(temporary, manifest)
                if final.exists():  # half-written or damaged, or it would not be saved again
                    shutil.rmtree(final)
                temporary.rename(final)
                sync_folder(self.folder)
        self._metrics[step] = manifest["metrics"]
        self._prune()

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turns whatever went wrong with a save into one sentence, told at once, and makes room."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            last = max(self._metrics, default=None)
            left = "no step is saved" if last is None else f"the last complete step is {last:,}"
            failure = OSError(f"{self.folder}: step {step:,} could not be saved ({_reason(error)}); {left}")
            self._tell(str(failure))
            if _is_first():
                for leftover in self.folder.glob(f"{step}.tmp*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            raise failure from error

    def _prune(self) -> None:
        """Remove all steps but those to keep; each vanishes at once."""
        ranked = self._ranked()
        kept = {*sorted(self._metrics)[-self._keep :], *ranked[len(ranked) - min(self._keep_best, len(ranked)) :]}
        self._metrics = {step: metrics for step, metrics in self._metrics.items() if step in kept}
        for path in _numbered(self.folder) if _is_first() else ():
            if int(path.name) not in kept:
                try:
                    shutil.rmtree(path.rename(self._temporary(int(path.name))))
                except OSError as error:
                    self._tell(f"{path}: could not be removed ({_reason(error)})")

    def _ranked(self) -> list[int]:
        """The steps that were evaluated, the best last."""
        metric = self._best_metric
        values = {step: metric.of(metrics) if metric else None for step, metrics in self._metrics.items()}
        return [step for _, step in sorted((value, step) for step, value in values.items() if value is not None)]

    def _last_intact(self) -> int:
        if not self._metrics:
            raise ValueError(f"{self.folder}: holds no complete checkpoint")
        found = None
        for step in sorted(self._metrics, reverse=True) if _is_first() else ():
            try:
                self._check(step)
            except ValueError as damage:
                self._tell(f"{damage}; step {step:,} is skipped")
                continue
            found = step
            break
        found = _agree(found)
        if found is None:
            raise ValueError(f"{self.folder}: none of its checkpoints is intact; to begin anew, move it away")
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
    """The metrics of every complete step in a run's folder; what is half-written is told of and left out.

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


def load_run_params(
    folder: Path, step: int, *, sharding: jax.sharding.Sharding | None = None
) -> tuple[Params, Manifest]:
    """`(params, manifest)` of one step of a run whose state has `params`, every array on `sharding`; no other is read.

    Raises ValueError if the step is missing or damaged.
    """
    path = folder / str(step)
    manifest = read_manifest(path)
    verify(path, manifest)
    return _load_arrays(path, "state", "params", sharding), manifest


def run_shapes(folder: Path, step: int) -> Params:
    """The same of what `load_run_params` would read."""
    return _stored_shapes(folder.absolute() / str(step), "state", "params")


def _numbered(folder: Path) -> list[Path]:
    return [path for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]


def _agree(step: int | None) -> int | None:
    """What process 0 says."""
    if jax.process_count() > 1:
        told = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
        return None if told < 0 else told
    return step
