"""Time speculative against plain decoding, and one round phase by phase.

All arms run in one process on the same prompts and budgets, taking turns; figures are medians over the repeats.
"""

from __future__ import annotations

import importlib.metadata
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro

from jaxspec.console import cli, results, tables
from jaxspec.data.prompts import Prompt, encode_prompt, read_prompts, text_prompt
from jaxspec.decoding.requests import NO_STOP, Request, Requests, make_requests
from jaxspec.evaluation import timing
from jaxspec.evaluation.arms import DecodingArm, check_tree, first_tree, make_arms, split_trees
from jaxspec.evaluation.machine import Drift, copy_bandwidth, drift_of, matmul_rate, spread
from jaxspec.evaluation.peers import load_transformers
from jaxspec.evaluation.timing import Load, Parts, PeerRun, Run
from jaxspec.parallel.agreement import say
from jaxspec.serving import loading
from jaxspec.serving.flags import DraftFlags, Shape
from jaxspec.serving.loading import Models
from jaxspec.serving.regeneration import SENSIBLE, write_user_turns
from jaxspec.trees import other_batches, parse_tree
from jaxspec.verify import rule_named

NOTES = """\
tokens/s: new tokens by the time from prompts to last token, prefill included, compilation not; median of {repeats},
with the least and greatest; x plain and efficiency are refused (-) where the copy bandwidth moved by over 10 %
tau: tokens per target call, bonus token included; the prefill call and the token it gives are not counted
mbsu: the speed-up if time were the weights read alone: tau / (1 + drafter's parameters / target's * drafter's passes)
efficiency: speed-up / tau: the share of the longer steps that is left after drafting and wider target calls
same: share of prompts whose tokens are those of the plain arm; fp32 differs only at near ties; not shown where a rule
keeps the distribution and not the text
round: one round of the fused program in the middle of an answer; draft, target, verify, commit: its parts as separate
programs on the same shapes, those of all arms taking turns; dispatch subtracted from all
overhead: what is left of the round; below 0 where fusion saves more than the rest costs
x draft: the time of drafting, growing the tree and extending the drafter's cache, over the first drafted arm's"""
PARTS = ("round", "draft", "target", "verify", "commit", "overhead")


@dataclass(frozen=True, kw_only=True)
class Args(DraftFlags):
    drafter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder of a drafter, `lookup`, or `smollm2-head`, which comes with jaxspec; repeat the flag to compare several,
    each with every tree. Default: plain decoding alone."""
    tree: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A tree to time, an arm each: chain:DEPTH, static:eagle1, static:0,1,00, dynamic:NODESxDEPTHxBEAM,
    best_first:NODESxDEPTHxWIDTH, lookup:LENGTH, a FILE.json of jaxspec lab search, or `served`: the chain that servers
    verify, as long as the drafter's own pass, or of three tokens. Repeat the flag, or join trees by commas. Default:
    the tree saved with the drafter."""
    prompts: str | None = None
    """File of prompts, as `jaxspec generate` reads it; default: user turns that the target writes itself."""
    limit: int = 16
    """Prompts taken; those that do not fill a batch are left out."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    batch: int = 1
    """Prompts decoded together."""
    repeats: int = 5
    """Times each arm runs all prompts, behind a first time that is not counted; 5 or more for times to rely on."""
    shape: Shape | None = None
    """Instead of --target: a model of this shape and a head for it, both with random weights, on random prompts."""
    prefix: int = 128
    """Tokens of a random prompt."""
    capacity: int = 0
    """Least slots of the cache, for what a large one costs; default: what prompt and answer need."""
    simulate_acceptance: str | None = None
    """Accept lengths drawn instead of decided, so that speed can be measured without a good head: the chance of each
    further token (0.8), or of accepting 0, 1, 2 ... tokens (0.1,0.2,0.7)."""
    peer: Literal["none", "transformers"] = "none"
    """Also time this library on the same folder, prompts and budgets: greedy, fp32, a thread a core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for spec in self.trees:
            check_tree(spec)
        twice = [path for path in self.drafter if self.drafter.count(path) > 1]
        if twice:
            raise ValueError(f"--drafter {twice[0]} is given twice; give every drafter once")
        if not self.drafter and self.shape is None:
            self.needs_drafter(tree=self.trees, **{"simulate-acceptance": self.simulate_acceptance})
        cli.refuse_below_one(self, "limit", "batch", "repeats", "prefix")
        _ = self.profile
        others = (self.prompts, self.drafter, self.draft_vocab, self.peer != "none")
        if self.shape is not None and any(others):
            raise ValueError(
                "--shape has random weights and prompts: leave out --prompts, --drafter, --draft-vocab and --peer"
            )
        if self.peer != "none" and (self.temperature or self.dtype != "fp32"):
            raise ValueError(f"--peer {self.peer} is greedy and in fp32: leave out --temperature and --dtype")

    @property
    def rule_name(self) -> str:
        """The rule named, or the usual one for the draft mode."""
        return rule_named(self.rule, self.draft_mode).name

    @property
    def rounds_only(self) -> bool:
        """Returns whether prompts are stand-ins, so that reading them is no part of what is measured."""
        return self.shape is not None or self.simulate_acceptance is not None

    @property
    def profile(self) -> tuple[float, ...] | None:
        """One chance for every further token, or the probabilities of all accept lengths."""
        if self.simulate_acceptance is None:
            return None
        try:
            values = tuple(float(word) for word in self.simulate_acceptance.split(","))
        except ValueError:
            values = ()
        if not values or not all(0 <= v <= 1 for v in values) or (len(values) > 1 and abs(sum(values) - 1) > 1e-6):
            raise ValueError(
                f"--simulate-acceptance is {self.simulate_acceptance!r}; give one chance from 0 to 1, or the "
                "probabilities of 0, 1, 2 ... accepted tokens, which sum to 1"
            )
        return values

    @property
    def trees(self) -> list[str]:
        """The trees named, in order."""
        return split_trees(self.tree)


def main(argv: list[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec bench decode", description=__doc__ or "")
    args.refuse_slow_dtype()
    for note in other_batches(args.trees, args.batch):
        say(note)
    prompts = None if args.prompts is None else read_prompts(args.prompts, limit=args.limit)
    every = [shaped(args)] if args.shape else load_every(args)
    models = every[0]
    peer = None if args.peer == "none" else (args.peer, load_transformers(args.target, models))
    load = Load(make_batches(models, prompts, args), args.max_new_tokens, args.capacity, args.rounds_only)
    arms = make_arms(every, args.drafter, args.trees, profile=args.profile)
    found = BenchFigures({}, [], [], [], prompt_facts(args, load))
    with cli.sigterm_interrupts():
        try:
            measure(found, arms, load, args, peer)
        except KeyboardInterrupt:
            tell_stopped(found, arms, load, args, started)
            raise
    result = make_result(args, found, started)
    print_result(result, args)
    if args.json:
        results.write_json(args.json, result)
    return 0


class BenchFigures(NamedTuple):
    """The figures that a bench has made so far."""

    runs: dict[str, list[Run]]
    """Passes of every arm."""
    peers: list[PeerRun]
    rows: list[dict[str, Any]]
    """Rows of the arms, once all their passes are made."""
    bandwidths: list[float]
    """Bytes that a copy moves a second, before and after all passes."""
    prompts: dict[str, Any]
    """See `prompt_facts`."""

    @property
    def drift(self) -> Drift:
        """Returns how far the bandwidth moved meanwhile."""
        return drift_of(self.bandwidths)


def prompt_facts(args: Args, load: Load) -> dict[str, Any]:
    """Returns the number of prompts that are decoded, and their file's name and hash: None where they are made here."""
    file = {"name": None, "sha256": None} if args.prompts is None else results.file_facts(args.prompts)
    return {**file, "count": len(load.batches) * args.batch}


def measure(
    found: BenchFigures, arms: dict[str, DecodingArm], load: Load, args: Args, peer: tuple[str, timing.Peer] | None
) -> None:
    """Times all arms, prints their speeds, and times the parts of their rounds."""
    timed = {name: arm.models for name, arm in arms.items()}
    found.bandwidths.append(copy_bandwidth())
    _, peers = timing.time_arms(timed, load, repeats=args.repeats, peer=peer, runs=found.runs)
    found.bandwidths.append(copy_bandwidth())
    found.peers.extend(peers)
    found.rows.extend(make_row(name, arm, found, load, args) for name, arm in arms.items())
    print_arms(found, args)  # the parts take as long again
    middle = len(load.batches) // 2
    rounds = {name: timing.most_calls(mine[0].answers[middle]) for name, mine in found.runs.items()}
    parts = timing.time_parts({n: m for n, m in timed.items() if rounds[n]}, load, load.batches[middle], rounds)
    for row in found.rows:
        if row["arm"] in parts:
            add_parts(row, arms[row["arm"]].models, parts[row["arm"]], mean_prefix(load, found.runs[row["arm"]]))
    compare_drafting(found.rows)


def tell_stopped(found: BenchFigures, arms: dict[str, DecodingArm], load: Load, args: Args, started: float) -> None:
    """Prints and writes what a run that is being stopped has measured."""
    if not any(found.runs.values()):
        sys.stderr.write("jaxspec bench decode: stopped before anything was measured\n")
        return
    if not found.rows:
        found.rows.extend(make_row(name, arms[name], found, load, args) for name, mine in found.runs.items() if mine)
        print_arms(found, args)
    compare_drafting(found.rows)
    passes = min(len(mine) for mine in found.runs.values() if mine)
    sys.stderr.write(
        f"jaxspec bench decode: stopped; the table above is of {passes} of {args.repeats} repeats, and rounds are not "
        "taken apart\n"
    )
    if args.json:
        results.write_json(args.json, make_result(args, found, started, stopped=True))


def load_every(args: Args) -> list[Models]:
    """Returns the target with each drafter, or alone."""
    plain, tree = args.load_target(), first_tree(args.trees)
    return [args.add_drafter(plain, drafter, tree) for drafter in args.drafter] or [plain]


def shaped(args: Args) -> Models:
    """Returns random models of the shape that the flags name."""
    assert args.shape is not None
    tree = parse_tree(first_tree(args.trees) or loading.DEFAULT_TREE)
    models = loading.random_models(args.shape, tree, dtype=loading.DTYPES[args.dtype], seed=args.seed)
    return models.with_rule(args.draft_mode, args.rule)


def random_batches(models: Models, args: Args) -> list[Requests]:
    """Returns batches of random prompts that nothing stops before their budget."""
    rng, batches = np.random.default_rng(args.seed), []
    for first in range(0, args.batch * max(1, args.limit // args.batch), args.batch):
        tokens_BL = rng.integers(0, models.config.vocab, (args.batch, args.prefix))
        rows = [Request(tokens, args.settings.for_row(first + row)) for row, tokens in enumerate(tokens_BL)]
        batches.append(make_requests(rows))
    return batches


def make_batches(models: Models, prompts: Sequence[Prompt] | None, args: Args) -> list[Requests]:
    """Returns full batches of like length; prompts that cannot be read are named and left out."""
    if args.shape is not None:
        return random_batches(models, args)
    requests = sorted(readable_requests(models, prompts, args), key=lambda request: len(request.tokens))
    count = len(requests) // args.batch
    if not count:
        raise ValueError(f"{len(requests)} prompts do not fill a batch of {args.batch}: give more, or lower --batch")
    batches = [make_requests(requests[i * args.batch : (i + 1) * args.batch]) for i in range(count)]
    if args.profile is None:
        return batches
    # Texts mean nothing then, and nor does a stop id in them.
    return [b._replace(stop_BR=jnp.full_like(b.stop_BR, NO_STOP)) for b in batches]


def readable_requests(models: Models, prompts: Sequence[Prompt] | None, args: Args) -> list[Request]:
    """Returns the requests of a file's prompts, or of user turns that the target writes; names those left out."""
    if prompts is None:
        turns = islice(write_user_turns(models.plain(), args.limit, seed=args.seed, settings=SENSIBLE), args.limit)
        prompts = [text_prompt(str(turn.attempt), turn.text) for turn in turns]
    requests = []
    for index, prompt in enumerate(prompts):
        try:
            tokens = encode_prompt(prompt, models.tokenizer)
            requests.append(models.request(tokens, args.settings.for_row(index), index))
        except ValueError as error:
            sys.stderr.write(f"jaxspec bench decode: {prompt.name} {cli.sentence(error)}\n")
    return requests


def compare_drafting(rows: list[dict[str, Any]]) -> None:
    """Adds to every row its drafting time over that of the first arm that drafts; None where nothing is drafted."""
    first = next((row["draft_ms"] for row in rows if row["draft_ms"]), None)
    for row in rows:
        row["draft_ratio"] = row["draft_ms"] / first if first and row["draft_ms"] else None


def mean_prefix(load: Load, mine: Sequence[Run]) -> float:
    """Returns the tokens of prompt and half an answer, in the mean."""
    prompt = float(np.mean([np.mean(np.asarray(r.length_B)) for r in load.batches]))
    return float(prompt + np.mean([len(row) for row in mine[0].tokens]) / 2)


def make_row(name: str, arm: DecodingArm, found: BenchFigures, load: Load, args: Args) -> dict[str, Any]:
    """Returns an arm's row: medians of its runs; what `add_parts` adds is None.

    Ratios of times are None where the copy bandwidth moved.
    """
    runs = found.runs
    models, mine, batches = arm.models, runs[name], load.batches
    speeds = spread("tokens_per_second", [run.tokens_per_second for run in mine])
    plain = float(np.median([run.tokens_per_second for run in runs["plain"]]))
    over = None if found.drift.refused else speeds["tokens_per_second"] / plain
    tree = models.engine.tree
    # Otherwise only the distribution is the same, or not even that.
    comparable = tree is None or (args.profile is None and (args.temperature == 0 or args.rule_name == "target-draw"))
    same = [np.array_equal(a, b) for a, b in zip(mine[0].tokens, runs["plain"][0].tokens, strict=True)]
    return {
        "arm": name,
        "drafter": arm.drafter,
        "tree": arm.tree,
        "batch": args.batch,
        "prefix": round(mean_prefix(load, mine)),
        "nodes": 1 if tree is None else tree.nodes,
        **speeds,
        "tau": mine[0].tau,
        "block_efficiency": mine[0].tau,
        "mbsu": timing.memory_bound_speedup(models, mine[0].tau),
        "speedup": over,
        "efficiency": over / mine[0].tau if over and mine[0].tau else None,
        "identical_fraction": float(np.mean(same)) if comparable else None,
        "capacity": load.sizes(models, batches[0])[0],
        **{f"{part}_ms": None for part in PARTS},
        "prefill_ms": 1e3 * float(np.median([run.prefill_seconds for run in mine])) / len(batches),
        "bytes_per_second": None,
        "flops_per_second": None,
    }


def add_parts(row: dict[str, Any], models: Models, parts: Parts, prefix: float) -> None:
    """Adds the parts of a round to an arm's row, and the work a second by the models' sizes."""
    work = timing.round_work(models, row["batch"], prefix)
    row |= {f"{part}_ms": 1e3 * getattr(parts, part) for part in PARTS}
    row |= {"bytes_per_second": work.bytes / parts.round, "flops_per_second": work.flops / parts.round}


def make_peer(args: Args, found: BenchFigures) -> dict[str, Any] | None:
    """Returns the peer's entry in the result; None without one."""
    plain, peers = found.runs["plain"], found.peers
    if not peers:
        return None
    speeds = spread("tokens_per_second", [sum(map(len, p.tokens)) / p.seconds for p in peers])
    own = float(np.median([run.tokens_per_second for run in plain]))
    same = [np.array_equal(a, b) for a, b in zip(peers[0].tokens, plain[0].tokens, strict=True)]
    return {
        "name": args.peer,
        "version": importlib.metadata.version(args.peer),
        **speeds,
        "identical_fraction": float(np.mean(same)),
        "plain_speedup": None if found.drift.refused else own / speeds["tokens_per_second"],
    }


def make_result(args: Args, found: BenchFigures, started: float, *, stopped: bool = False) -> dict[str, Any]:
    """Returns the verb's JSON; `speedup` and `efficiency` are the fastest speculative arm's.

    That of a run that was stopped says so, and has no rates of the machine.
    """
    rows = found.rows
    best = max(rows[1:], key=lambda row: row["tokens_per_second"], default=None)
    dtype = loading.DTYPES[args.dtype]
    return results.result(
        "bench decode",
        dtype=dtype,
        seed=args.seed,
        started=started,
        target=args.shape or args.target,
        simulated_acceptance=args.profile,
        prompts=found.prompts,
        max_new_tokens=args.max_new_tokens,
        repeats=args.repeats,
        temperature=args.temperature,
        drafters=list(args.drafter),
        draft_mode=args.draft_mode,
        rule=args.rule_name,
        rows=rows,
        best=best and best["arm"],
        speedup=best and best["speedup"],
        efficiency=best and best["efficiency"],
        peer=make_peer(args, found),
        copy_bandwidth=found.drift.facts,
        machine_copy_bytes_per_second=None if stopped else found.bandwidths[-1],
        machine_matmul_flops_per_second=None if stopped else matmul_rate(dtype),
        **({"stopped": True} if stopped else {}),
    )


def print_result(result: dict[str, Any], args: Args) -> None:
    """Prints the parts of the arms' rounds, the peer, and the meaning of every figure."""
    print_rounds(result)
    if args.rounds_only:
        sys.stdout.write("prompts are stand-ins: prefill is left out of tokens/s, and what is written means nothing\n")
    peer = result["peer"]
    if peer and peer["plain_speedup"]:
        sys.stdout.write(f"plain decoding is {peer['plain_speedup']:.2f} times as fast as {peer['name']}\n")
    sys.stdout.write(NOTES.format(repeats=args.repeats) + "\n")


def print_arms(found: BenchFigures, args: Args) -> None:
    """Prints speed and tau of every arm, and the peer's."""
    rows, peer = found.rows, make_peer(args, found)
    columns = {
        "arm": "arm",
        "nodes": "nodes",
        "tokens/s": "tokens_per_second",
        "least": "tokens_per_second_min",
        "greatest": "tokens_per_second_max",
        "x plain": "speedup",
        "tau": "tau",
        "mbsu": "mbsu",
        "efficiency": "efficiency",
        "same": "identical_fraction",
    }
    table = [[row[key] for key in columns.values()] for row in rows]
    if peer:
        name, over = f"{peer['name']} {peer['version']}", peer["plain_speedup"]
        shown = peer | {"arm": name, "nodes": 1, "speedup": over and 1 / over, "tau": 1.0}
        table.append([shown.get(key) for key in columns.values()])
    title = f"Decoding, batch {args.batch}, {args.dtype}, temperature {args.temperature:g}"
    tables.print_table(title, list(columns), table)
    sys.stdout.write(found.drift.sentence())
    sys.stdout.flush()


def print_rounds(result: dict[str, Any]) -> None:
    """Prints the parts of every arm's round, beside the rates of the machine."""
    rates = ("bytes_per_second", "flops_per_second")
    columns = {part: f"{part}_ms" for part in PARTS} | {"x draft": "draft_ratio"}
    table = [
        [row["arm"], *(row[key] for key in columns.values()), *(row[k] and row[k] / 1e9 for k in rates)]
        for row in result["rows"]
    ]
    tables.print_table("One round, ms", ["arm", *columns, "GB/s", "GFLOP/s"], table)
    sys.stdout.write(
        f"this machine: copies {result['machine_copy_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"multiplies {result['machine_matmul_flops_per_second'] / 1e9:.0f} GFLOP/s; "
        "GB/s and GFLOP/s above are what the models' sizes ask for\n"
    )


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
