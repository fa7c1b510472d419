"""Orbax checkpoints: training runs that resume exactly, and exported models that load without knowing their shapes."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from jaxspec.base import Params
from jaxspec.drafters import DRAFTERS
from jaxspec.layers import RopeScaling

FORMAT = "jaxspec/1"
CHECKSUMS = "jaxspec.sha256.json"
_TEMPORARY = "*.orbax-checkpoint-tmp*"


class Restored(NamedTuple):
    """One step of a run."""

    step: int
    state: Any
    data_state: dict[str, Any]  # the data iterator's `get_state()`
    config: dict[str, Any]


class RunCheckpoints:
    """The checkpoints of one training run: `folder/<step>`, the last `keep` of them.

    A save is complete or absent: one that was interrupted leaves the previous step as the latest, and what it left is
    removed when the run is opened again. Orbax loads damaged data without complaint, so every step carries the SHA-256
    of its files, checked on restore.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        self.folder = Path(folder).absolute()
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(_TEMPORARY):
                shutil.rmtree(leftover)
        policies: dict[str, Any] = {  # Any: Orbax's own policies do not match its annotations
            "save_decision_policy": ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            "preservation_policy": ocp.training.preservation_policies.LatestN(keep),
        }
        about: dict[str, Any] = {"format": FORMAT, "kind": "run"}
        self._checkpointer = ocp.training.Checkpointer(str(self.folder), custom_metadata=about, **policies)

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
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Write one step and wait until it is on disk; a step that is there already stays as it is.

        `state` is any pytree of arrays, typed PRNG keys included; `data_state` and `config` are JSON.
        """
        if self.latest_step() == step:
            return
        about = {"format": FORMAT, "kind": "run", "data": data_state, "config": config, "metrics": metrics or {}}
        self._checkpointer.save_checkpointables(step, {"state": state}, custom_metadata=about)
        if jax.process_index() == 0:
            _write_checksums(self.folder / str(step))

    def latest_step(self) -> int | None:
        """The last complete step; None before the first."""
        latest = self._checkpointer.latest
        return None if latest is None else int(latest.step)

    def restore(self, step: int | None, abstract_state: Any) -> Restored:
        """The state of `step` (None: the latest), laid out as the `ShapeDtypeStruct`s of `abstract_state` say.

        Their shardings may belong to another mesh than the one that saved. Raises ValueError if the step is missing or
        damaged, or if a shape differs.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise ValueError(f"{self.folder}: holds no complete checkpoint")
        path = self.folder / str(step)
        if not path.is_dir():
            raise ValueError(f"{path}: no such checkpoint")
        _verify_checksums(path)
        try:
            state = self._checkpointer.load_checkpointables(step, {"state": abstract_state})["state"]
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise ValueError(f"{path}: does not fit this run, whose settings may have changed ({error})") from error
        about = _read_about(path)
        return Restored(step, state, about["data"], about["config"])

    def close(self) -> None:
        """Release the folder."""
        self._checkpointer.close()


def save_model(path: str | Path, params: Params, config: dict[str, Any], *, kind: str) -> None:
    """Write `params` (a nested dict of arrays) and `config` (JSON) as one folder, replacing what is there.

    `kind` says what it is, such as "drafter"; `load_model` checks it.
    """
    path = Path(path).absolute()
    about = {"format": FORMAT, "kind": kind, "config": config}
    context = ocp.Context()
    # Else each process looks for itself whether there is something to replace, and they part where one looks too late.
    context.file.skip_sync_file_validations = True
    with context:
        ocp.save_checkpointables(str(path), {"params": params}, custom_metadata=about, overwrite=True)
    if jax.process_index() == 0:
        _write_checksums(path)


def load_model(
    path: str | Path, *, kind: str | None = None, sharding: jax.sharding.Sharding | None = None
) -> tuple[Params, dict[str, Any]]:
    """`(params, config)` of a folder that `save_model` wrote, every array on `sharding` (default: the first device).

    Raises ValueError if the folder is missing, incomplete, damaged, written by something else, or not of `kind`.
    """
    path = Path(path).absolute()
    found = model_kind(path)
    if kind is not None and found != kind:
        raise ValueError(f"{path}: holds a {found}, not a {kind}")
    _verify_checksums(path)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        metadata = ocp.checkpointables_metadata(str(path)).metadata["params"]
        abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), metadata)
        params = ocp.load_checkpointables(str(path), {"params": abstract})["params"]
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"{path}: the model is incomplete ({error})") from error
    return params, _read_about(path)["config"]


def model_kind(path: str | Path) -> str:
    """What `save_model` wrote at `path`; ValueError if it wrote nothing there."""
    return str(_read_about(Path(path).absolute())["kind"])


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
) -> None:
    """Write the weights of `module`, the drafter `name` of the `DRAFTERS` table, for `load_drafter`.

    `about` (JSON) travels with it; its `tree`, a tree spec, is what decoding uses unless told otherwise. So do the ids
    of the tokens it scores, if not all.
    """
    config = {"drafter": name, "shape": dataclasses.asdict(module.config), "about": about or {}}
    if draft_vocab is not None:
        config["draft_vocab"] = [int(i) for i in draft_vocab]
    save_model(path, params, config, kind="drafter")


def load_drafter(path: str | Path, *, dtype: Any = jax.numpy.float32) -> LoadedDrafter:
    """The drafter in a folder that `save_drafter` wrote, weights and activations in `dtype`.

    Raises ValueError as `load_model`, and where this version has no such drafter, or none of such a shape.
    """
    params, config = load_model(path, kind="drafter")
    name = config.get("drafter")
    if name not in DRAFTERS:
        raise ValueError(f"{path}: drafter {name!r} is not one of {', '.join(DRAFTERS)}")
    kind, shape = DRAFTERS[name]
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in config["shape"].items()}
    if values.get("rope_scaling"):
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    try:
        module = kind(shape(**values), dtype=dtype)
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


def _read_about(path: Path) -> dict[str, Any]:
    """What a checkpoint of this project says of itself; ValueError if there is none at `path`."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    metadata = path / "_CHECKPOINT_METADATA"
    try:
        custom = json.loads(metadata.read_text(encoding="utf-8")).get("custom_metadata") or {}
    except FileNotFoundError:
        raise ValueError(f"{path}: not a checkpoint of jaxspec, or half of one ({metadata.name} is missing)") from None
    except ValueError as error:
        raise ValueError(f"{metadata}: not valid JSON ({error})") from error
    if custom.get("format") != FORMAT:
        raise ValueError(f"{path}: an Orbax checkpoint of format {custom.get('format')!r}, not {FORMAT!r}")
    return custom


def _checksums(path: Path) -> dict[str, str]:
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.name != CHECKSUMS]
    return {str(f.relative_to(path)): _sha256(f) for f in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_checksums(path: Path) -> None:
    draft = path / f"{CHECKSUMS}.draft"
    draft.write_text(json.dumps(_checksums(path), indent=1), encoding="utf-8")
    draft.replace(path / CHECKSUMS)


def _verify_checksums(path: Path) -> None:
    """ValueError if a file changed or vanished since it was written. A save killed before its checksums has none."""
    listed = path / CHECKSUMS
    if not listed.is_file():
        return
    for name, expected in json.loads(listed.read_text(encoding="utf-8")).items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file}: missing; the checkpoint is incomplete")
        if _sha256(file) != expected:
            raise ValueError(f"{file}: its contents changed since it was saved; the checkpoint is damaged")
