"""The work of importing hidden states that other projects dumped: settings, files, layers and fields of the store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxspec.data import shards
from jaxspec.data.feature_store import feature_fields
from jaxspec.data.shards import Field
from jaxspec.data.target_outputs import Kind
from jaxspec.drafters.eagle3 import default_taps
from jaxspec.interchange.dump_checks import TargetTables, load_target_tables
from jaxspec.interchange.dumps import KINDS, BadDocument, Dump, DumpReader, find_dump, measure, names_of, unknown
from jaxspec.interchange.target_folders import target_folder
from jaxspec.targets.decoder import LlamaConfig

PLAN = "files.json"
"""File of the names and sizes of a dump's files when its import began."""


@dataclasses.dataclass(frozen=True)
class ImportSettings:
    """Settings that decide the contents of the files."""

    target: str
    """Name of the target that made the states."""
    template: str | None = None
    conversations: Path | None = None
    """Folder of speculators' set of tokens and loss masks, where it is not beside the files."""
    layers: tuple[int, ...] | None = None
    """The layers that a token's states enter, the number of layers for the last state; None: the source's default."""
    store: Kind = "bf16"
    length: int = 2048
    """Tokens that a document is cut to."""
    limit: int | None = None
    """Documents taken; None for all."""
    held_out: int = 64
    """Documents held out for evaluation, a tenth of all at most."""
    shard_gb: float = 1.0
    """A file ends with the document of the dump that fills it, in GB."""
    agreement: float | None = None
    """Least share of places where the LM head's greedy token is the text's; None: `dump_checks.LEAST`."""
    recompute: bool | None = None
    """Whether the target is run over a document to compare; None: where it can be and is small."""
    skip_bad: bool = False
    """Leave out documents that cannot be used, instead of stopping at the first."""


class DumpImport(NamedTuple):
    """A dump, its target and what is to be made of it."""

    out: Path
    dump: Dump
    settings: ImportSettings
    folder: Path
    """The target's."""
    tables: TargetTables
    layers: tuple[int, ...]
    """See `ImportSettings.layers`."""
    files: tuple[Path, ...]
    """Files of the dump in the plan."""
    later: int
    """Files that came to the dump after its import began, which are left out."""
    shards: tuple[tuple[int, int], ...]
    """Files of the dump in each shard, as (first, last + 1)."""
    fields: tuple[Field, ...]

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose inputs are stored beside the features, ascending."""
        return tuple(sorted(self.layers[:-1]))

    @property
    def reader(self) -> DumpReader:
        """Returns a reader of the dump."""
        return DumpReader(self.dump, width=self.tables.config.width, vocab=self.tables.config.vocab)


def open_work(source: Path, out: Path, settings: ImportSettings) -> DumpImport:
    """Returns the work of importing the dump in a folder; nothing is written.

    Raises ValueError, in one sentence, where the folder holds no dump, one that no drafter can be trained from, or
    states that are not the target's.
    """
    dump = find_dump(source, settings.conversations)
    if dump is None:
        raise ValueError(unknown(source))
    if (refusal := KINDS[dump.kind].refusal) is not None:
        raise ValueError(f"{source}: holds {KINDS[dump.kind].title}: {refusal}")
    folder = target_folder(settings.target)
    tables = load_target_tables(folder)
    planned, later = _planned(out, dump, settings.limit)
    layers = choose_layers(dump, planned, tables.config, settings.layers)
    _check_layers(source, dump, layers, tables.config)
    fields = feature_fields(tables.config.width, tables.config.vocab, settings.store, taps=len(layers) - 1)
    return DumpImport(out, dump, settings, folder, tables, layers, planned, later, _divide(planned, settings), fields)


def _planned(out: Path, dump: Dump, limit: int | None) -> tuple[tuple[Path, ...], int]:
    """Returns the files of a dump that are imported: those of the plan in `out`, if its import began before."""
    path = out / PLAN
    plan = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    # Nothing may be finished of another dump or part of one: then this takes its place.
    same = plan is not None and (plan["folder"], plan.get("limit")) == (str(dump.folder), limit)
    if plan is None or not (same or shards.anything_finished(out)):
        return dump.files[:limit], 0
    begun = [name for name, _ in plan["files"]]
    there = dict(zip(names_of(dump, dump.files), dump.files, strict=True))
    if missing := next((name for name in begun if name not in there), None):
        raise ValueError(
            f"{dump.folder}: {missing} was there when its import into {out} began, and is missing or in use now; put "
            "it back, or give another OUT"
        )
    found = tuple(there[name] for name in begun)
    return found, len(dump.files[:limit]) - len(found) if limit is None else 0


def choose_layers(
    dump: Dump, files: Sequence[Path], target: LlamaConfig, given: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Returns the layers that a dump's states enter, the last state's last; raises ValueError where nothing tells."""
    failure: BadDocument | None = None
    for path in files:
        try:
            count = measure(dump, path, target.width).states
            break
        except BadDocument as error:
            failure = failure or error
    else:
        raise ValueError(f"{dump.folder}: none of its {len(files):,} files can be used; the first: {failure}")
    if given is not None and KINDS[dump.kind].last is not None and target.layers not in given:
        given = (*given, target.layers)
    if given is None:
        if count == 1:
            return (target.layers,)
        try:
            given = (*default_taps(target.layers), target.layers)
        except ValueError:
            given = ()
    if len(given) != count:
        raise ValueError(
            f"{dump.folder}: holds {count} states of a token, and {len(given)} layers are "
            f"{'given' if given else 'known'} ({', '.join(map(str, given))}): name the layers that they enter with "
            f"--layers, in the dump's order, {target.layers} for the last state"
        )
    return given


def _check_layers(source: Path, dump: Dump, layers: tuple[int, ...], target: LlamaConfig) -> None:
    """Raises ValueError where the layers are not those of a target of this depth, or the last state is not the last."""
    depth = target.layers
    if len(set(layers)) < len(layers) or not all(0 <= layer <= depth for layer in layers):
        raise ValueError(f"{source}: layers {layers} must be different numbers from 0 to {depth}, the target's depth")
    if depth not in layers:
        raise ValueError(
            f"{source}: its states enter layers {', '.join(map(str, layers))}, and the last one, behind layer {depth}, "
            f"is not among them: without it nothing tells the target's next token; dump the id {depth} too"
        )
    if layers[-1] != depth:
        raise ValueError(f"{source}: the last of --layers must be {depth}, as speculators and vLLM dump the last state")


def _divide(files: Sequence[Path], settings: ImportSettings) -> tuple[tuple[int, int], ...]:
    """Returns the files of the dump that each shard holds: as many as fill it."""
    ranges, begin, filled = [], 0, 0
    for number, path in enumerate(files, 1):
        filled += path.stat().st_size
        if filled >= settings.shard_gb * 1e9 or number == len(files):
            ranges.append((begin, number))
            begin, filled = number, 0
    return tuple(ranges)
