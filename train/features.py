"""Run a target over a data set once and store its features, for `jaxspec train CONFIG data.features=FOLDER`.

Give the config and overrides that the drafter is to be trained with: they say which target, data, rows and
auxiliary hidden states. Every document of the training, mixed and held-out data is stored once, whatever it is packed
with later. Training online, without a store, is the default: it needs no disk, and pays where the data is seen a few
times only.

Sizes are shown before anything is made. A run that was stopped goes on where it was: give the same command. Many
machines can fill one folder, each with its own --shard i/n.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tyro.conf import Positional

from jaxspec.config import DistillConfig, load, to_dict
from jaxspec.console import cli, progress, results, tables
from jaxspec.data import shards
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.corpus import fingerprint as documents_hash
from jaxspec.data.draft_vocab import load_maps
from jaxspec.data.feature_store import BatchPiece, FeaturePlan, begin_store, feature_fields, new_records, plan_features
from jaxspec.data.packing import PackedBatches
from jaxspec.data.shards import Field, Shard, ShardWriter
from jaxspec.data.target_outputs import Kind, store, to_arrays
from jaxspec.distillation.compilers import under
from jaxspec.distillation.loss import read_target
from jaxspec.distillation.task import Batch
from jaxspec.interchange import target_folders
from jaxspec.interchange.hf import fingerprint, load_target
from jaxspec.interchange.hf_config import read_config
from jaxspec.parallel.agreement import say
from jaxspec.parallel.mesh import batch_sharding
from jaxspec.parallel.processes import refuse_several
from jaxspec.serving import flags
from jaxspec.targets.decoder import LlamaConfig
from jaxspec.training.batches import HostBatch, place_rows, read_data
from jaxspec.training.loop import termination_notice
from jaxspec.training.resolve import attention_blocks, check_length, drafter_for, mesh_of

UNSTORED = (
    *("train", "eval", "mix", "limit", "eval_limit", "template", "template_args", "date", "thinking"),
    *("last_turn_only", "max_turns", "skip_bad", "features", "top_k", "workers"),
)
"""Settings of the data that name documents, whose hashes are noted, or say nothing of what is stored."""
Run = Callable[[PackedBatches, HostBatch], Any]
"""From packed batches and one of them to the arrays stored of it, on their way to the host."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Command line of `jaxspec features`."""

    config: Positional[str]
    """Name of an experiment in configs/, or path of a Python file."""
    overrides: Positional[tuple[str, ...]] = ()
    """Changes such as data.train=answers.jsonl target=HF_FOLDER."""
    out: str
    """Folder for the features."""
    store: Kind = "bf16"
    """How features are stored; int8 with one scale a row (and layer of auxiliary hidden states)."""
    top_k: int = 0
    """Store so many of the likeliest next tokens too, with the mass of all others; for data.top_k."""
    shard_gb: float = 1.0
    """A file ends with the batch that fills it, in GB."""
    shard: str = "0/1"
    """Make only every n-th file, beginning with the i-th: 0/4, 1/4, 2/4 or 3/4."""
    verify: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check the SHA-256 of finished files first, and make damaged ones anew."""
    count_only: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the sizes, and make nothing."""
    json: str | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ValueError(f"--top-k is {self.top_k}; it must be 0 (none) or above")
        if not self.shard_gb > 0:
            raise ValueError(f"--shard-gb is {self.shard_gb:g}; it must be above 0")
        _ = self.part

    @property
    def part(self) -> tuple[int, int]:
        """Returns the number of this shard and of all shards."""
        return flags.parse_part(self.shard)


def main(argv: Sequence[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec features", description=__doc__ or "")
    config = load(args.config, args.overrides)
    if not isinstance(config, DistillConfig):
        raise ValueError(f"{args.config}: holds a {type(config).__name__}, not a DistillConfig")
    refuse_several("jaxspec features", "start one on every machine, alone, each with its own --shard i/n")
    about, fields = describe(config, args)
    parts = choose_parts(config)
    about["documents"] = [documents_hash(part.corpus) for part in parts]
    plan = plan_features(parts, fields, shard_bytes=int(args.shard_gb * 1e9))
    work = FeatureWork(config, args, tuple(about["taps"]), fields, parts, plan)
    announce(work)
    tokens, seconds = 0, 0.0
    if not args.count_only:
        begin_store(work.folder, about, plan)
        tokens, seconds = run(work)
    result = {
        "out": args.out,
        "documents": len(plan.index),
        "tokens": plan.tokens,
        "bytes_per_token": plan.bytes_per_token,
        "total_bytes": sum(plan.size(i) for i in range(len(plan.shards))),
        "shards": len(plan.shards),
        "resumed_from": len(plan.shards) - len(work.todo),
        "tokens_per_second": tokens / seconds if tokens else None,
        **{name: about[name] for name in ("target", "store", "taps", "top_k")},
    }
    tables.print_table(args.out, ["measure", "value"], [[k, v] for k, v in result.items() if k not in ("out", "taps")])
    if args.json:
        written = results.result("features", dtype=config.dtype, seed=config.seed, started=started, **result)
        results.write_json(args.json, written)
    return 0


@dataclass(frozen=True, eq=False)
class FeatureWork:
    """The features to make, and their files."""

    config: DistillConfig
    args: Args
    taps: tuple[int, ...]
    fields: Sequence[Field]
    parts: Sequence[PackedBatches]
    plan: FeaturePlan

    @property
    def folder(self) -> Path:
        """Folder of the store."""
        return Path(self.args.out)

    @functools.cached_property
    def todo(self) -> list[int]:
        """Files that this machine has still to make; says which one is damaged."""
        index, count = self.args.part
        return [i for i in range(index, len(self.plan.shards), count) if not self._is_made(Shard(self.folder, i))]

    def _is_made(self, shard: Shard) -> bool:
        if shard.note() is None:
            return False
        damaged = self.args.verify and shard.is_damaged()
        if damaged:
            say(f"{shard.path}: is damaged, and will be made anew")
        return not damaged


def describe(config: DistillConfig, args: Args) -> tuple[dict[str, Any], tuple[Field, ...]]:
    """Returns the manifest of the store and the fields of its records."""
    folder = target_folders.target_folder(config.target)
    shape = read_config(folder)
    check_length(config, shape)
    if args.top_k >= shape.vocab:
        raise ValueError(f"--top-k is {args.top_k}, and the target has {shape.vocab} tokens; give fewer")
    taps = drafter_taps(config, shape)
    fields = feature_fields(shape.width, shape.vocab, args.store, taps=len(taps), top_k=args.top_k, whole=True)
    about = {
        "target": config.target,
        "weights": fingerprint(folder),
        "target_weights": config.target_weights,
        **ChatTokenizer.load(folder, config.data.chat).fingerprint,
        "dtype": config.dtype,
        "store": args.store,
        "taps": list(taps),
        "top_k": args.top_k,
        "data": {name: value for name, value in to_dict(config.data).items() if name not in UNSTORED},
        "seed": config.seed,
        "shard_gb": args.shard_gb,
        "fields": [list(field) for field in fields],
    }
    return about, fields


def drafter_taps(config: DistillConfig, target: LlamaConfig) -> tuple[int, ...]:
    """Returns the layers of the target that the config's drafter reads."""
    scored = None if config.draft_vocab is None else len(load_maps(config.draft_vocab, target.vocab))
    return drafter_for(config, target, scored).module.taps


def choose_parts(config: DistillConfig) -> list[PackedBatches]:
    """Returns batches that hold every document.

    The first epoch as it is trained, so that it is read in the order of the files; the documents that mixes leave for
    later epochs; the held-out ones.
    """
    tokenizer = ChatTokenizer.load(target_folders.target_folder(config.target), config.data.chat)
    data = read_data(config, tokenizer, mesh_of(config.mesh))
    parts = [dataclasses.replace(data.train, epochs=1)]
    if data.train.mixes:
        parts.append(dataclasses.replace(data.train, epochs=1, mixes=(), shuffle=False))
    return [*parts, data.eval]


def announce(work: FeatureWork) -> None:
    """Says how large the features are; ValueError if the disk cannot hold those left to make."""
    plan, free = work.plan, shards.free_bytes(work.folder)
    each = ", ".join(f"{field.name} {field.width} x {field.dtype}" for field in work.fields)
    held = f"{len(plan.index):,} documents, {plan.tokens:,} tokens"
    say(f"features of {held}: {plan.bytes_per_token:,} bytes a token ({each})")
    total, left = (sum(plan.size(i) for i in files) for files in (range(len(plan.shards)), work.todo))
    say(
        f"{gigabytes(total)} in {len(plan.shards):,} files, of which {len(work.todo):,} are to be made here, "
        f"{gigabytes(left)}; {gigabytes(free)} are free"
    )
    if left > free:
        raise ValueError(
            f"{work.folder}: {gigabytes(left)} do not fit into the {gigabytes(free)} that are free; make room, store "
            "int8, take fewer documents with data.limit, or train online"
        )


def gigabytes(size: int) -> str:
    """Returns `size` bytes in words."""
    return f"{tables.four_digits(size / 1e9)} GB"


def run(work: FeatureWork) -> tuple[int, float]:
    """Makes the files; returns tokens and seconds, compilation included. SIGTERM raises Preempted."""
    plan, tokens, began = work.plan, 0, time.monotonic()
    if not work.todo:
        return 0, 0.0
    target, keys = open_target(work), [np.asarray(part.corpus.keys) for part in work.parts]
    total = sum(int(plan.of(number)["length"].sum()) for number in work.todo)
    with termination_notice() as noticed, progress.progress("features", total, "tokens") as bar:
        for made, number in enumerate(work.todo):
            writer = ShardWriter(Shard(work.folder, number), "group_size:1,uncompressed")
            for piece, batch, arrays in run_pieces(target, plan.pieces[slice(*plan.shards[number])], work.parts):
                for record in new_records(plan, piece, work.fields, keys[piece.part], batch, arrays):
                    writer.write(record)
                done = int(plan.index["length"][piece.first : piece.first + piece.count].sum())
                tokens += done
                bar.advance(done, f"file {made + 1:,} of {len(work.todo):,}")
                if noticed(tokens):
                    raise cli.Preempted(f"stopped; {made:,} of {len(work.todo):,} files are finished in {work.folder}")
            writer.seal()
    return tokens, time.monotonic() - began


def open_target(work: FeatureWork) -> Run:
    """Returns the target as one program on the config's mesh."""
    config, args = work.config, work.args
    mesh = mesh_of(config.mesh)
    folder, dtype = target_folders.target_folder(config.target), jnp.dtype(config.dtype)
    how = {"stacked": config.scan_layers, "weights": config.target_weights}
    loaded = load_target(folder, dtype=dtype, mesh=mesh, **how)
    target = loaded.module.clone(**attention_blocks(config, mesh), taps=work.taps)
    frozen = loaded.params

    @jax.jit
    def compute(frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        out = read_target(target, frozen, batch)
        return to_arrays(store(target, frozen, out, kind=args.store, taps=len(work.taps), top_k=args.top_k))

    place, made = functools.partial(place_rows, batch_sharding(mesh)), under(mesh, compute)
    return lambda data, batch: made(frozen, place(data, batch))


def run_pieces(
    target: Run, pieces: Sequence[BatchPiece], parts: Sequence[PackedBatches]
) -> Iterator[tuple[BatchPiece, HostBatch, dict[str, np.ndarray]]]:
    """Yields each piece with its batch and the target's output; the next is begun before one is handed out."""
    running: tuple[BatchPiece, HostBatch, Any] | None = None
    for piece in pieces:
        data = parts[piece.part]
        batch = data[piece.index]
        begun = (piece, batch, target(data, batch))
        if running is not None:
            yield *running[:2], jax.device_get(running[2])
        running = begun
    if running is not None:
        yield *running[:2], jax.device_get(running[2])


if __name__ == "__main__":
    sys.exit(cli.run(main))
