"""Orbax checkpoints: training runs that resume exactly, and exported models that load without knowing their shapes."""

import contextlib
import dataclasses
import glob
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxspec import __version__
from jaxspec.base import Params
from jaxspec.card import CONVENTIONS, FORMAT, Card, amend_card, describe, read_card, sync_folder, verify, write_card
from jaxspec.drafters import DRAFTERS
from jaxspec.nn.rope import RopeScaling

PATIENCE = 3
"""Saves in a row that may fail in the background before the run is stopped."""
_TEMPORARY = "[0-9]*tmp*"


class Merit(NamedTuple):
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
        merit: Merit | None = None,
        tell: Callable[[str], None] = warnings.warn,
    ):
        self.folder = Path(folder).absolute()
        self._keep, self._keep_best, self._merit, self._tell = keep, keep_best, merit, tell
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
        card = {"kind": "run", "step": step, "data": data_state, "config": config, "metrics": metrics or {}}
        try:
            with self._explained(step):
                path = str(self._temporary(step))
                response = ocp.save_checkpointables_async(path, {"state": state}, custom_metadata=_mark("run"))
            self._pending = self._writer.submit(self._complete, step, response, card)
        except OSError as failure:
            self._failure, self._failures = failure, self._failures + 1
        if wait:
            self.wait()

    def add_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Note the evaluation of a step that was saved before it was evaluated; nothing if its save failed."""
        self._settle()
        if step in self._metrics:
            if _is_first():
                amend_card(self.folder / str(step), {"metrics": metrics})
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
        value = self._merit.of(metrics) if self._merit and self._keep_best else None
        if self._merit is None or value is None:
            return False
        best = self.best_step()
        before = None if best is None else self._merit.of(self._metrics[best])
        return before is None or value > before

    def settings(self, step: int) -> dict[str, Any]:
        """The config that a step was saved with."""
        return read_card(self.folder / str(step))["config"]

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
        card = read_card(path)
        return Restored(step, state, card["data"], card["config"], card["metrics"])

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

    def _complete(self, step: int, response: Any, card: Card) -> None:
        """In the background: turn what Orbax writes into a complete step."""
        with self._explained(step):
            response.result()
            if _is_first():
                temporary, final = self._temporary(step), self.folder / str(step)
                write_card(temporary, card)
                if final.exists():  # half-written or damaged, or it would not be saved again
                    shutil.rmtree(final)
                temporary.rename(final)
                sync_folder(self.folder)
        self._metrics[step] = card["metrics"]
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
        merits = {step: self._merit.of(metrics) if self._merit else None for step, metrics in self._metrics.items()}
        return [step for _, step in sorted((merit, step) for step, merit in merits.items() if merit is not None)]

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
        verify(path, read_card(path))

    def _temporary(self, step: int) -> Path:
        return self.folder / f"{step}.tmp"


def complete_steps(folder: Path, *, tell: Callable[[str], None] = warnings.warn) -> dict[int, dict[str, Any]]:
    """The metrics of every complete step in a run's folder; what is half-written is told of and left out.

    Files are not compared with their checksums here.
    """
    found = {}
    for path in _numbered(folder):
        try:
            card = read_card(path)
        except ValueError as damage:
            tell(f"{damage}; step {int(path.name):,} is skipped")
            continue
        if card["kind"] == "run":
            found[int(path.name)] = card["metrics"]
    return found


def load_run_params(folder: Path, step: int, *, sharding: jax.sharding.Sharding | None = None) -> tuple[Params, Card]:
    """`(params, card)` of one step of a run whose state has `params`, every array on `sharding`; no other is read.

    Raises ValueError if the step is missing or damaged.
    """
    path = folder / str(step)
    card = read_card(path)
    verify(path, card)
    return _load_arrays(path, "state", "params", sharding), card


def refuse_to_replace(path: str | Path) -> None:
    """ValueError if `path` holds anything but a model that `save_model` wrote."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        known = read_card(path)["kind"] != "run"
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"{path}: holds something that jaxspec did not export, so it is left alone; name another folder"
        )


def save_model(
    path: str | Path,
    params: Params,
    config: dict[str, Any],
    *,
    kind: str,
    about: Mapping[str, Any] | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Write `params` (a nested dict of arrays) and `config` (JSON) as one folder, replacing a model that is there.

    `kind` says what it is, such as "drafter"; `load_model` checks it. `about` (JSON) joins its card, `files` are copied
    beside it. The folder appears whole or not at all. Raises ValueError if `path` holds something else, and OSError, in
    one sentence, where it cannot be written.
    """
    path = Path(path).absolute()
    draft = path.with_name(f".{path.name}.tmp")
    card = model_card(params, config, kind=kind, about=about)
    if _is_first():
        refuse_to_replace(path)
        _remove(draft)
    context = ocp.Context()
    # Else each process looks for itself whether something is there already, and they part where one looks too late.
    context.file.skip_sync_file_validations = True
    context.array.saving.scoped_storage_options_creator = lambda key, value: _stored_by_layer(key)
    try:
        with context:
            ocp.save_checkpointables(str(draft), {"params": params}, custom_metadata=_mark(kind))
        if _is_first():
            for file in files:
                shutil.copyfile(file, draft / file.name)
            write_card(draft, card)
            _replace(draft, path)
    except (OSError, ValueError, RuntimeError) as error:
        raise OSError(f"{path}: could not be written ({_reason(error)})") from error
    finally:
        if _is_first():
            _remove(draft)


def _stored_by_layer(path: Any) -> Any:
    """How an array is stored: stacked layers one by one, so that a reader of one needs no other."""
    names = [getattr(key, "key", None) for key in path]
    stacked = len(names) > 1 and names[0] == "layers" and isinstance(names[1], str)
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,)) if stacked else None


def model_card(
    params: Params, config: Mapping[str, Any], *, kind: str, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The card of a model whose `params` are arrays or their shapes; see `save_model`."""
    card = {"kind": kind, "config": config, "metrics": {}, "provenance": {}, **(about or {})}
    card["provenance"] = {"jaxspec": __version__, **card["provenance"]}
    return card | {"conventions": CONVENTIONS, "arrays": describe(params)}


@contextlib.contextmanager
def whole_folder(path: str | Path, *, resumable: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the place of `path` when the block ends, and vanishes if it fails.

    A `resumable` one stays, under its other name, and is there again the next time. What is in `path` must be something
    that jaxspec exported; its card is to be written last. Raises ValueError where it is not, and OSError, in one
    sentence, where it cannot be written.
    """
    path = Path(path).absolute()
    refuse_to_replace(path)
    draft = path.with_name(f".{path.name}.{'partial' if resumable else 'tmp'}")
    try:
        if not resumable:
            _remove(draft)
        draft.mkdir(parents=True, exist_ok=resumable)
        yield draft
        _replace(draft, path)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({_reason(error)})") from error
    finally:
        if not resumable:
            _remove(draft)


def load_model(
    path: str | Path, *, kind: str | None = None, sharding: jax.sharding.Sharding | None = None
) -> tuple[Params, dict[str, Any]]:
    """`(params, config)` of a folder that `save_model` wrote, every array on `sharding` (default: the first device).

    Raises ValueError if the folder is missing, incomplete, damaged, written by something else, or not of `kind`.
    """
    path = Path(path).absolute()
    card = read_card(path)
    if kind is not None and card["kind"] != kind:
        raise ValueError(f"{path}: holds a {card['kind']}, not a {kind}")
    verify(path, card)
    return _load_arrays(path, "params", None, sharding), card["config"]


def model_shapes(path: str | Path) -> Params:
    """Shapes and dtypes of the weights that `load_model` would read; ValueError if the folder is not complete."""
    return _stored_shapes(Path(path).absolute(), "params")


def run_shapes(folder: Path, step: int) -> Params:
    """The same of what `load_run_params` would read."""
    return _stored_shapes(folder.absolute() / str(step), "state", "params")


def model_kind(path: str | Path) -> str:
    """What `save_model` wrote at `path`; ValueError if it wrote nothing there."""
    return str(read_card(Path(path).absolute())["kind"])


class LoadedDrafter(NamedTuple):
    """A drafter read from a folder."""

    name: str
    """In the `DRAFTERS` table."""
    module: Any
    params: Params
    about: dict[str, Any]
    """What was noted when it was saved, such as the `tree` it is fastest with."""
    draft_vocab: tuple[int, ...] | None
    """Ids of the tokens it scores, ascending; None for all."""


def save_drafter(
    path: str | Path,
    name: str,
    module: Any,
    params: Params,
    about: dict[str, Any] | None = None,
    *,
    draft_vocab: Sequence[int] | None = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write the weights of `module`, the drafter `name` of the `DRAFTERS` table, for `load_drafter`.

    `about` (JSON) travels with it; its `tree`, a tree spec, is what decoding uses unless told otherwise. So do the ids
    of the tokens it scores, if not all. `card` is `save_model`'s `about`.
    """
    card = {"family": name, **(card or {})}
    save_model(path, params, drafter_config(name, module, about, draft_vocab), kind="drafter", about=card)


def drafter_config(
    name: str, module: Any, about: dict[str, Any] | None = None, draft_vocab: Sequence[int] | None = None
) -> dict[str, Any]:
    """What `load_drafter` needs to know of a drafter besides its weights: the config in its folder's card."""
    config = {"drafter": name, "shape": dataclasses.asdict(module.config), "about": about or {}}
    if draft_vocab is not None:
        config["draft_vocab"] = [int(i) for i in draft_vocab]
    return config


def drafter_shape(name: str, values: Mapping[str, Any]) -> Any:
    """The configuration of drafter `name` from the JSON that a card holds; TypeError where it has other fields."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if fields.get("rope_scaling"):
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return DRAFTERS[name][1](**fields)


def load_drafter(path: str | Path, *, dtype: Any = jax.numpy.float32) -> LoadedDrafter:
    """The drafter in a folder that `save_drafter` wrote, weights and activations in `dtype`.

    Raises ValueError as `load_model`, and where this version has no such drafter, or none of such a shape.
    """
    params, config = load_model(path, kind="drafter")
    name = config.get("drafter")
    if name not in DRAFTERS:
        raise ValueError(f"{path}: drafter {name!r} is not one of {', '.join(DRAFTERS)}")
    try:
        module = DRAFTERS[name][0](drafter_shape(name, config["shape"]), dtype=dtype)
    except TypeError as error:
        raise ValueError(f"{path}: the shape of drafter {name!r} is not this version's ({error})") from error
    expected = jax.eval_shape(module.init_params, jax.random.key(0))
    if jax.tree.map(jax.numpy.shape, params) != jax.tree.map(lambda a: a.shape, expected):
        raise ValueError(f"{path}: the weights do not have the shapes that the drafter's config says")
    scored = config.get("draft_vocab")
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    return LoadedDrafter(name, module, params, config["about"], None if scored is None else tuple(scored))


def abstract_like(tree: Any, shardings: Any) -> Any:
    """`ShapeDtypeStruct`s of `tree` (arrays or structs) with the tree `shardings`: what `restore` takes."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def _load_arrays(path: Path, name: str, part: str | None, sharding: jax.sharding.Sharding | None) -> Any:
    """What Orbax stored as `name`, or a part of it alone; ValueError where something is missing."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    context = ocp.Context()
    context.pytree.loading.partial_load = part is not None
    shapes = _stored_shapes(path, name, part)
    abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), shapes)
    abstract = abstract if part is None else {part: abstract}
    try:
        with context:
            found: Any = ocp.load(str(path), abstract, checkpointable_name=name)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"{path}: the checkpoint is incomplete ({error})") from error
    return found if part is None else found[part]


def _stored_shapes(path: Path, name: str, part: str | None = None) -> Any:
    """Shapes and dtypes of what Orbax stored as `name`, or of a part of it; ValueError where something is missing."""
    try:
        stored: Any = ocp.metadata(str(path), checkpointable_name=name).metadata
        wanted = stored if part is None else stored[part]
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"{path}: the checkpoint is incomplete ({error})") from error
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), wanted)


def _replace(draft: Path, path: Path) -> None:
    """Put `draft` in the place of `path`, which vanishes only when the other is whole."""
    before = path.with_name(f".{path.name}.old")
    shutil.rmtree(before, ignore_errors=True)
    if path.exists():
        path.rename(before)
    draft.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(before, ignore_errors=True)


def _remove(draft: Path) -> None:
    """Remove a draft, and what Orbax had not finished of it."""
    for path in draft.parent.glob(f"{glob.escape(draft.name)}*"):
        shutil.rmtree(path)


def _numbered(folder: Path) -> list[Path]:
    return [path for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]


def _mark(kind: str) -> Any:
    return {"format": FORMAT, "kind": kind}


def _is_first() -> bool:
    return jax.process_index() == 0


def _agree(step: int | None) -> int | None:
    """What process 0 says."""
    if jax.process_count() > 1:
        told = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
        return None if told < 0 else told
    return step


def _reason(error: Exception) -> str:
    """What the system says is wrong, else what the exception says."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _told_otherwise(record: logging.LogRecord) -> bool:
    """Leaves out the tracebacks that Orbax logs from its threads: their errors are raised where the save is awaited."""
    return "_SignalingThread.run() raised" not in record.getMessage()
