"""Orbax export of a run's, a drafter's or a target's folder, and export in the formats that other programs read."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import __version__
from jaxspec.base import Params, SharedTables
from jaxspec.checkpoints.folders import whole_folder
from jaxspec.checkpoints.manifest import MANIFEST, read_manifest, whereabouts, write_manifest
from jaxspec.checkpoints.models import (
    drafter_config,
    drafter_shape,
    load_model,
    model_manifest,
    model_shapes,
    save_model,
)
from jaxspec.checkpoints.piecewise import Pieces, chunk_of, describe, pieces_of, written
from jaxspec.checkpoints.runs import BestMetric, choose_step, load_run_params, run_shapes
from jaxspec.checkpoints.tracking import RECORD, export_of, provenance, read_record
from jaxspec.console.progress import progress
from jaxspec.console.results import git_sha
from jaxspec.data.tokenizer_training import TOKENIZER_FILES
from jaxspec.drafters import DRAFTERS
from jaxspec.interchange.eagle3 import LayerIds
from jaxspec.interchange.exported import target_config
from jaxspec.interchange.forms import Draft
from jaxspec.interchange.hf import (
    fingerprint,
    held_weights,
    load_tables,
    read_weights,
    stored_dtype,
    stored_weights,
    table_fingerprint,
    tree_of,
    write_weights,
)
from jaxspec.interchange.hf_config import config_fields, read_config, read_table_config, target_classes
from jaxspec.interchange.published import published_family, read_drafter
from jaxspec.interchange.servers import LM_SERVERS, SERVERS, render, unserved, write_rendered
from jaxspec.interchange.target_folders import target_folder, tokenizer_manifest
from jaxspec.interchange.tensors import StoredWeight
from jaxspec.targets.decoder import LlamaConfig

FORMATS = ("orbax", "hf", *SERVERS)
"""Names that `jaxspec export --to` takes."""
GENERATION = "generation_config.json"
MARKS = ("fingerprint", "table_fingerprint")
"""Fields of a target's manifest that name its weights as `hf.fingerprint` and `hf.table_fingerprint` do."""
NAMED_TARGET = ("speculators",)
"""Formats whose `config.json` names the target, which the server then loads."""


class Exportable(NamedTuple):
    """A model that was found in a folder."""

    kind: Literal["target", "drafter"]
    params: Params
    """Its weights, or their shapes and dtypes if `load` reads them."""
    config: Mapping[str, Any]
    """Its shape, as in its manifest."""
    manifest: Mapping[str, Any]
    """More fields of its manifest: `tokenizer`, `metrics`, `provenance`."""
    files: Sequence[Path] = ()
    """Files of a target's tokenizer and generation settings."""
    layout: str = "orbax"
    """Layout of its folder: `orbax`, `hf`, or `published` for another project's drafter."""
    load: Callable[[], Params] | None = None
    """Reads the weights; raises ValueError or OSError, in one sentence, if they are damaged."""
    stored: Callable[[], Sequence[StoredWeight]] | None = None
    """Returns the weights of a target in a folder, which can be read in part; raises as `load`."""
    notes: tuple[str, ...] = ()
    """Sentences about tensors of a published drafter that were left out, or might be taken for another's."""

    @property
    def family(self) -> str:
        """A drafter's name in the `DRAFTERS` table; a target's `model_type`."""
        return self.config["drafter"] if self.kind == "drafter" else self.config.get("family", "llama")

    def weights(self) -> Params:
        """Returns the weights, and reads them if needed; raises as `load`."""
        return self.params if self.load is None else self.load()


def find_model(name: str, *, step: str = "best", dtype: Any = None, target: str | None = None) -> Exportable:
    """Returns the model that `name` stands for, weights in `dtype` (None: as they are stored); they are not read yet.

    `name` is the folder of a run, of which `step` is exported ("best", "last" or a number), a folder that `save_model`
    wrote, a HuggingFace folder of a target, the folder of a published drafter (made for `target`), or the name of a
    bundled model. Raises ValueError if it is none of these.
    """
    folder = target_folder(name)
    if not folder.is_dir():
        raise ValueError(f"{name}: there is no such folder; give that of a run, a drafter or a target, or tiny")
    if (folder / RECORD).is_file():
        found = _of_run(folder, step)
    elif (folder / "config.json").is_file():
        if published_family(folder) == "lm":
            found = _of_target(folder, name)
        else:
            found = published_drafter(folder, name, target=target)
    elif (folder / MANIFEST).is_file() or (folder / "_CHECKPOINT_METADATA").is_file():
        found = _of_model(folder)
    else:
        raise ValueError(
            f"{name}: neither a run ({RECORD}), nor a drafter of jaxspec ({MANIFEST}), nor a target in HuggingFace "
            f"layout or a published drafter (config.json){whereabouts(folder)}"
        )
    if dtype is None:
        return found
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), found.params)
    about = {name: value for name, value in found.manifest.items() if name not in MARKS}  # of other bits
    return found._replace(
        params=params, manifest=about, load=lambda: jax.tree.map(lambda a: a.astype(dtype), found.weights())
    )


def refusal(model: Exportable, to: str) -> str | None:
    """Returns why a model cannot be written in one of `FORMATS`; None if it can, for a target that it fits."""
    if to == "orbax":
        return None
    if to == "hf" and (model.kind == "target" or model.family == "draft_lm"):
        try:
            config_fields(_lm_config(model))
        except ValueError as error:
            return str(error)
        return None
    if to == "hf":
        return "hf is a whole LM's layout, and this is a head below its target's: choose a server"
    if model.kind == "target":
        return "it is a target, which servers read in HuggingFace layout: choose hf"
    if model.family == "draft_lm" and to in LM_SERVERS:
        return None
    return unserved(to, model.family, _shape(model), _scored(model))


def formats_for(model: Exportable) -> list[str]:
    """Returns the names of the formats that a model can be written in."""
    return [name for name in FORMATS if refusal(model, name) is None]


def facts(model: Exportable) -> dict[str, Any]:
    """Returns the facts of a model that `jaxspec inspect`, `import` and `export` all report."""
    leaves = jax.tree.leaves(model.params)
    return {
        "kind": model.kind,
        "family": model.family,
        "format": model.layout,
        "parameters": sum(leaf.size for leaf in leaves),
        "dtype": "/".join(sorted({str(leaf.dtype) for leaf in leaves})),
        "exportable_to": formats_for(model),
    }


def shapes(model: Exportable) -> dict[str, list[int]]:
    """Returns the shape of every weight by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
    }


def conventions(model: Exportable) -> dict[str, Any]:
    """Returns a model's conventions: rotary base, and of a head the auxiliary hidden states and the vocabulary."""
    shape = model.config if model.kind == "target" else model.config["shape"]
    told = {name: shape[name] for name in ("rope_theta", "rope_scaling", "bias", "head_dim") if name in shape}
    told |= {name: shape[name] for name in ("target_width", "mask_token") if shape.get(name) is not None}
    if shape.get("taps"):
        told["taps"] = f"inputs of layers {', '.join(map(str, shape['taps']))} of the target"
    if model.kind == "drafter":
        scored = model.config.get("draft_vocab")
        told["scores"] = "all tokens" if scored is None else f"{len(scored):,} tokens"
    return told


def write(to: str, out: Path, model: Exportable, target: str | None = None, *, target_name: str | None = None) -> None:
    """Writes a model in a format; `target` names the folder of the target that a drafter was made for.

    `target_name` is the name by which a server loads that target, where the format says it. Folders for servers get a
    manifest too. The folder appears whole or not at all, and nothing is written if the model does not fit the format.
    Raises ValueError or OSError, in one sentence.
    """
    if reason := refusal(model, to):
        raise ValueError(f"it cannot be written to {to}: {reason}")
    if to == "orbax":
        about = {"family": model.family, **model.manifest}
        if model.stored is not None:
            weights = _cast(model.stored(), model.params)
            check_room(out, weights)
            save_target(out, weights, model.config, about=about, files=model.files, label=f"export to {out}")
            return
        save_model(out, model.weights(), dict(model.config), kind=model.kind, about=about, files=model.files)
        return
    manifest = {"kind": "export", "family": model.family, "written_for": to, "provenance": {"jaxspec": __version__}}
    if model.kind == "target" or model.family == "draft_lm":
        _write_lm(out, model, target, manifest)
        return
    _check_name(to, target, target_name)
    tensors, fields = render(to, _draft(model, to, target, target_name))
    with whole_folder(out) as folder:
        write_rendered(folder, tensors, fields)
        write_manifest(folder, {**manifest, "assumes": SERVERS[to].version})


def _check_name(to: str, target: str | None, name: str | None) -> None:
    """Raises ValueError where a format says its target by a name that no server can load."""
    if to not in NAMED_TARGET:
        if name is not None:
            raise ValueError(
                f"--target-name is for {', '.join(NAMED_TARGET)}, whose folders name the target: leave it out"
            )
        return
    loadable = target != "tiny" and (target is None or (Path(target) / "config.json").is_file())
    if name is None and not loadable:
        raise ValueError(
            f"{to} names the target for the server, and {target} is no HuggingFace folder or repository that it could "
            "load: say its name with --target-name, such as OWNER/NAME on the hub"
        )


def left_out(model: Exportable, to: str) -> list[str]:
    """Returns a sentence for each thing that a drafter was saved with and that a format does not hold."""
    if to == "orbax" or model.kind == "target":
        return []
    found, scored, tree = [], _scored(model), model.config.get("about", {}).get("tree")
    if scored is not None and model.family not in ("eagle3", "peagle"):
        found.append(
            f"{to} holds no vocabulary of such a head: its draft vocabulary of {len(scored):,} tokens is left out, and "
            "it will score all tokens"
        )
    if tree is not None:
        spec = tree if isinstance(tree, str) else tree["spec"]
        found.append(f"{to} holds no tree: its tree {spec} is left out, and the server's own flags say how it drafts")
    return found


def _write_lm(out: Path, model: Exportable, target: str | None, manifest: Mapping[str, Any]) -> None:
    """Writes a whole LM in HuggingFace layout with its tokenizer's files; those of a draft LM are its target's."""
    if model.kind == "drafter" and target is None:
        raise ValueError("a draft LM's folder needs its tokenizer, which is the target's: name it with --target")
    target = target if model.kind == "drafter" else None  # a target has its own
    config = _lm_config(model)
    if target is not None:
        of = read_config(target_folder(target))
        special = {"bos_id": of.bos_id, "eos_ids": of.eos_ids, "pad_id": of.pad_id, "max_positions": of.max_positions}
        config = dataclasses.replace(config, **special)
    files = model.files if target is None else files_of(target_folder(target))
    weights = held_weights(model.weights(), config) if model.stored is None else _cast(model.stored(), model.params)
    with whole_folder(out) as folder, progress(f"export to {out}", sum(w.nbytes for w in weights), "bytes") as bar:
        write_weights(folder, weights, config, bar.advance)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        write_manifest(folder, manifest)


def save_target(
    out: Path,
    weights: Sequence[StoredWeight],
    config: Mapping[str, Any],
    *,
    about: Mapping[str, Any],
    files: Sequence[Path],
    label: str,
    source: str | None = None,
) -> int:
    """Writes a target as `save_model` would, a piece of a weight at a time; returns the bytes kept of an earlier call.

    `source` identifies the files that the weights are read from. With it a call that is interrupted leaves its pieces,
    and the next call with the same `source` keeps them. Raises ValueError or OSError as `whole_folder` and as reading.
    """
    arrays = [_pieces(weight) for weight in weights]
    checksums, kept = {}, 0
    total = sum(piece.nbytes for piece in pieces_of(arrays))
    with whole_folder(out, resumable=source is not None) as draft:
        with progress(label, total, "bytes") as bar, written(draft, arrays, source or label) as pieces:
            for done in pieces:
                checksums[done.piece.file] = done.sha256
                kept += done.piece.nbytes if done.kept else 0
                bar.advance(done.piece.nbytes, f"{kept:,} bytes kept of an earlier call" if kept else None)
        describe(draft, arrays, {"kind": "target"})
        for file in files:
            shutil.copyfile(file, draft / file.name)
        manifest = model_manifest(tree_of(weights), dict(config), kind="target", about=about)
        write_manifest(draft, manifest, known=checksums)
    return kept


def check_room(out: Path, weights: Sequence[StoredWeight]) -> None:
    """Raises ValueError if the disk has no room for the weights, less the pieces that an interrupted call left."""
    needed = sum(piece.nbytes for piece in pieces_of([_pieces(weight) for weight in weights]))
    parent = next(path for path in out.absolute().parents if path.is_dir())
    left = out.absolute().with_name(f".{out.name}.partial") / "params"
    there = sum(path.stat().st_size for path in left.rglob("*") if path.is_file())
    free = shutil.disk_usage(parent).free
    if needed - there > free:
        raise ValueError(
            f"{out}: needs {needed - there:,} bytes more, and {free:,} are free on its disk: make room, or name another"
        )


def _pieces(weight: StoredWeight) -> Pieces:
    chunk = chunk_of(weight.shape, weight.dtype.itemsize, weight.rows, stacked=weight.inner)
    return Pieces(weight.path, weight.shape, weight.dtype, chunk, weight.read)


def _cast(weights: Sequence[StoredWeight], params: Params) -> list[StoredWeight]:
    """Returns the weights in the dtypes of `params`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    dtype_of = {tuple(getattr(key, "key", None) for key in path): leaf.dtype for path, leaf in leaves}
    return [_cast_weight(weight, np.dtype(dtype_of[weight.path])) for weight in weights]


def _cast_weight(weight: StoredWeight, dtype: np.dtype) -> StoredWeight:
    if dtype == weight.dtype:
        return weight
    return weight._replace(dtype=dtype, read=lambda block: weight.read(block).astype(dtype))


def _lm_config(model: Exportable) -> LlamaConfig:
    try:
        return target_config(model.config if model.kind == "target" else model.config["shape"])
    except TypeError as error:
        raise ValueError(f"its shape is not this version's ({error})") from error


def _shape(model: Exportable) -> Any:
    return drafter_shape(model.config["drafter"], model.config["shape"])


def _draft(model: Exportable, to: str, target: str | None, target_name: str | None) -> Draft:
    if target is None:
        raise ValueError(f"{to} needs the target's vocabulary and depth: name its folder with --target")
    folder, shape = target_folder(target), _shape(model)
    config, read = read_table_config(folder), DRAFTERS[model.family].module(shape).feature_width
    if config.width != read:
        raise ValueError(
            f"the drafter reads features {read} wide, and {target} is {config.width} wide: it is for another target"
        )
    embed_VD, head_VD = map(np.asarray, target_tables(target))
    name = target if target_name is None else target_name
    named = (name, target_classes(folder))
    return Draft(model.family, shape, model.weights(), _scored(model), config, *named, embed_VD, head_VD)


def target_tables(target: str) -> SharedTables:
    """Returns the embedding and the LM head of a target's folder, in the dtype they are stored in."""
    folder = target_folder(target)
    tables, params = load_tables(folder, dtype=jnp.dtype(stored_dtype(folder)))
    return tables.shared_tables(params)


def _scored(model: Exportable) -> tuple[int, ...] | None:
    """Returns the ids of the tokens that a drafter scores; None for all."""
    scored = model.config.get("draft_vocab")
    return None if scored is None else tuple(scored)


def _of_run(folder: Path, step: str) -> Exportable:
    record = read_record(folder) or {}
    model, chosen = record["model"], choose_step(folder, BestMetric(**record["best_metric"]), step)
    manifest = read_manifest(folder / str(chosen))
    exported = export_of(folder, record) if model["kind"] == "target" else None
    about = {
        "tokenizer": model["tokenizer"],
        "metrics": manifest["metrics"],
        "provenance": provenance(record, chosen),
    }
    files = [] if exported is None else files_of(exported)
    params = run_shapes(folder, chosen)
    return Exportable(
        model["kind"], params, model["config"], about, files,
        load=lambda: load_run_params(folder.absolute(), chosen)[0],
    )  # fmt: skip


def published_drafter(
    folder: Path,
    name: str,
    *,
    target: str | None = None,
    layer_ids: LayerIds | None = None,
    tokens: int | None = None,
) -> Exportable:
    """Returns the head in a published folder, called `name`; see `interchange.published.read_drafter`.

    With the folder of its target, the width of its features is compared with the target's. Raises ValueError or OSError
    as that function, and if the head was made for another target.
    """
    of = None if target is None else read_config(target_folder(target))
    layers = None if of is None else of.layers
    tables = None if target is None else functools.cache(functools.partial(target_tables, target))
    found = read_drafter(folder, target_layers=layers, layer_ids=layer_ids, tokens=tokens, tables=tables)
    module = DRAFTERS[found.name].module(found.config)
    read = module.feature_width
    if of is not None and read != of.width:
        raise ValueError(
            f"{name}: reads features {read} wide, and {target} is {of.width} wide: it is for another target"
        )
    config = drafter_config(found.name, module, draft_vocab=found.draft_vocab)
    return Exportable(
        "drafter", found.params, config, {"provenance": {"from": name, "git_sha": git_sha()}}, (), "published",
        notes=found.notes,
    )  # fmt: skip


def _of_target(folder: Path, name: str) -> Exportable:
    config, weights = stored_weights(folder)
    about = {"tokenizer": tokenizer_manifest(folder), "provenance": {"from": name, "git_sha": git_sha()}}
    about |= {"fingerprint": fingerprint(folder), "table_fingerprint": table_fingerprint(folder)}
    return Exportable(
        "target", tree_of(weights), dataclasses.asdict(config), about, files_of(folder), "hf",
        lambda: read_weights(weights), lambda: weights,
    )  # fmt: skip


def _of_model(folder: Path) -> Exportable:
    manifest = read_manifest(folder)
    if manifest["kind"] not in ("target", "drafter"):
        raise ValueError(f"{folder}: holds a {manifest['kind']}; name the folder of the run that it belongs to")
    about = {key: manifest[key] for key in ("tokenizer", "metrics", "provenance", *MARKS) if key in manifest}
    stored = (lambda: stored_weights(folder)[1]) if manifest["kind"] == "target" else None
    return Exportable(
        manifest["kind"], model_shapes(folder), manifest["config"], about, files_of(folder),
        load=lambda: load_model(folder)[0],
        stored=stored,
    )  # fmt: skip


def files_of(folder: Path) -> list[Path]:
    """Returns the files that are copied with a target: its tokenizer's and its generation settings."""
    return [folder / name for name in (*TOKENIZER_FILES, GENERATION) if (folder / name).is_file()]
