"""Import hidden states that another project dumped, to train drafters from them without running the target.

FOLDER holds files of vLLM's hidden-states connector or of speculators (`hs_N.safetensors`, with its Arrow set or
without), or SpecForge's offline files (`rows_A-B/data_N.ckpt`, also .gz) of EAGLE-3 or DSpark. Of the target only
embedding, final norm, LM head, config.json and tokenizer are read, so it may be one that jaxspec cannot run. OUT is
then the features, `OUT/train` and `OUT/eval` the tokens with their loss masks; the command to train with is printed.

Whether the last states lie before or behind the final norm is found out. An import that was stopped goes on with the
same command.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

from jaxspec.console import cli, progress, results, tables
from jaxspec.data import shards
from jaxspec.data.target_outputs import Kind
from jaxspec.interchange import import_features, import_plan
from jaxspec.interchange.dump_checks import USUAL, Finding
from jaxspec.interchange.dumps import KINDS
from jaxspec.interchange.import_features import ImportSummary
from jaxspec.interchange.import_plan import DumpImport, ImportSettings
from jaxspec.parallel.agreement import say
from jaxspec.parallel.processes import refuse_several
from jaxspec.serving import flags


@dataclass(frozen=True, kw_only=True)
class Args:
    """Command line of `jaxspec import features`."""

    folder: Positional[Path]
    """Folder of the dump."""
    out: Positional[Path]
    """Folder for the features and the corpora."""
    target: str
    """HuggingFace folder of the target that made the states; of its weights only embedding, final norm and LM head."""
    layers: str | None = None
    """Layers that the states of a token enter, in the dump's order, as vLLM numbers them: 2,18,33,36; SpecForge's
    numbers are one less. The last is the number of layers. Default for four states: 2, L / 2, L - 3 and L."""
    template: str | None = None
    """Chat template that the training names too, by default the target folder's own; `none` where there is none."""
    conversations: Path | None = None
    """Folder of speculators' set, where the files `hs_N` are neither in it nor in its folder `hidden_states`."""
    store: Kind = "bf16"
    """How features are stored; int8 with one scale a row (and layer of auxiliary hidden states)."""
    length: int = 2048
    """Number of tokens of a document that are kept."""
    limit: int | None = None
    """Take at most this many documents."""
    held_out: int = 64
    """Documents that are held out for evaluation, a tenth of all at most."""
    agreement: float | None = None
    """Least share of the answers' tokens that are the LM head's greedy ones; lower it for text of another author.
    Default: 0.6, and 0.3 of all tokens where the dump does not say which are the answers'."""
    recompute: Literal["auto", "yes", "no"] = "auto"
    """Run the target over a document and compare; auto: where jaxspec can and it has at most a billion parameters."""
    skip_bad: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave out documents that cannot be used (unreadable, NaN, foreign tokens), and count them."""
    shard_gb: float = 1.0
    """A file ends with the document that fills it, in GB of the dump."""
    shard: str = "0/1"
    """Make only every n-th file, beginning with the i-th: 0/4, 1/4, 2/4 or 3/4."""
    count_only: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check the dump and show the sizes, and make nothing."""
    json: Path | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        cli.refuse_below_one(self, "limit", "held_out")
        if self.length < 2:
            raise ValueError(f"--length is {self.length}; it must be 2 or above")
        if self.agreement is not None and not 0 <= self.agreement <= 1:
            raise ValueError(f"--agreement is {self.agreement:g}; it must be from 0 to 1")
        if not self.shard_gb > 0:
            raise ValueError(f"--shard-gb is {self.shard_gb:g}; it must be above 0")
        _ = self.part, self.numbers

    @property
    def part(self) -> tuple[int, int]:
        """Number of the shard, and number of shards."""
        return flags.parse_part(self.shard)

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """The layers."""
        if self.layers is None:
            return None
        parts = [part.strip() for part in self.layers.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise ValueError(f"--layers is {self.layers!r}; give numbers joined by commas, such as 2,16,29,32")
        return tuple(map(int, parts))

    @property
    def settings(self) -> ImportSettings:
        """The settings of the import."""
        return ImportSettings(
            self.target, self.template, self.conversations, self.numbers, self.store, self.length, self.limit,
            self.held_out, self.shard_gb, self.agreement, {"auto": None, "yes": True, "no": False}[self.recompute],
            self.skip_bad,
        )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns the exit code."""
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec import features", description=__doc__ or "")
    refuse_several("jaxspec import features", "start one on every machine, alone, each with its own --shard i/n")
    work = import_plan.open_work(args.folder, args.out, args.settings)
    sample = import_features.read_sample(work)
    announce(work, import_features.estimate(work, sample))
    if args.count_only:
        finding, _ = import_features.examine(work, sample)
    else:
        finding = import_features.begin_import(work, sample)
    say(sentence(finding))
    if finding.of == "answers" and finding.agreement < USUAL:
        say(f"that is low for a target's own answers (from about {USUAL:.0%}): are --target and --layers right?")
    outcome = None if args.count_only else run(work, finding, args.part)
    report(args, work, finding, outcome, started)
    return 0


def announce(work: DumpImport, about: tuple[int, int]) -> None:
    """Says what the dump holds and about how large the store is; ValueError if the disk cannot hold it."""
    free, (tokens, size) = shards.free_bytes(work.out), about
    config, without = work.tables.config, work.reader.without_states
    say(
        f"{work.dump.folder}: {KINDS[work.dump.kind].title}, {len(work.files):,} documents; of the "
        f"target ({getattr(config, 'family', 'llama')}) embedding, norm and LM head are read"
    )
    left_out = {"in use by a writer": work.dump.locked, "without states": without, "came later": work.later}
    if told := ", ".join(f"{count:,} {why}" for why, count in left_out.items() if count):
        say(f"left out: {told}")
    each = ", ".join(f"{field.name} {field.width} x {field.dtype}" for field in work.fields)
    say(
        f"about {tokens:,} tokens, {tables.four_digits(size / 1e9)} GB ({each}) in {len(work.shards):,} files; "
        f"{tables.four_digits(free / 1e9)} GB are free"
    )
    held = sum(path.stat().st_size for path in work.out.glob("*.array_record"))
    if size - held > free:
        raise ValueError(
            f"{work.out}: about {tables.four_digits((size - held) / 1e9)} GB do not fit into the "
            f"{tables.four_digits(free / 1e9)} GB that are free; make room, store int8, or take fewer with --limit"
        )


def sentence(finding: Finding) -> str:
    """Returns what was found out of the last states."""
    return (
        f"the last states lie {finding.last_state} the final norm ({finding.unit_share:.0%} of them are normed); next "
        f"token of {finding.of}: cross entropy {finding.cross_entropy:.3f} ({finding.cross_entropy_otherwise:.3f} read "
        f"otherwise), greedy agreement {finding.agreement:.1%} over {finding.places:,} places"
    )


def run(work: DumpImport, finding: Finding, part: tuple[int, int]) -> ImportSummary | None:
    """Makes the files; returns what became of the dump, None while files of other parts are missing."""
    wanted = sum(last - first for first, last in work.shards[part[0] :: part[1]])
    with progress.progress("import features", wanted, "documents") as bar:
        for done in import_features.import_shards(work, finding, part):
            bar.advance(done)
    return import_features.finish_import(work)


def report(args: Args, work: DumpImport, finding: Finding, outcome: ImportSummary | None, started: float) -> None:
    """Shows the result, and the command to train with."""
    result: dict[str, Any] = {"out": str(args.out), "kind": work.dump.kind, "target": args.target}
    result |= {"complete": outcome is not None, "layers": list(work.layers), "taps": list(work.taps)}
    result |= {"files": len(work.files), "in_use": work.dump.locked, "without_states": work.reader.without_states}
    result |= {"came_later": work.later, "finding": finding._asdict()}
    if outcome is not None:
        result |= {**outcome._asdict(), "train_with": train_with(args, work, outcome)}
        rows = [[n, v] for n, v in outcome._asdict().items() if n not in ("skipped", "examples")]
        rows += [[f"skipped: {why}", count] for why, count in outcome.skipped.items()]
        tables.print_table(str(args.out), ["measure", "value"], rows)
        for why, example in outcome.examples.items():
            say(f"left out, {why}: {outcome.skipped[why]:,} documents; the first: {example}")
        sys.stdout.write(f"{result['train_with']}\n")
    elif not args.count_only:
        say(f"{args.out}: this part is finished, and files of other parts are missing")
    if args.json:
        dtype = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}[args.store]
        results.write_json(
            args.json, results.result("import features", dtype=dtype, seed=None, started=started, **result)
        )


def train_with(args: Args, work: DumpImport, outcome: ImportSummary) -> str:
    """Returns the command that trains a drafter from the store."""
    words = [f"jaxspec train {'eagle3' if work.taps else 'eagle2'}", f"target={args.target}"]
    words += [f"data.train={args.out / 'train'}", f"data.eval={args.out / 'eval'}", f"data.features={args.out}"]
    words += [f"data.length={outcome.longest}", f"data.loss_on={'assistant' if outcome.answer_tokens else 'all'}"]
    words += [f"head.taps={','.join(map(str, work.taps))}"] if work.taps else []
    words += [] if args.template is None else [f"data.template={args.template}"]
    return " ".join(words)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
