"""Time speculative against plain decoding, and one round phase by phase.

All arms run in one process on the same prompts and budgets, taking turns; figures are medians over the repeats.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxspec import cli, cost, decode, flags, loading, report, serving
from jaxspec.base import Array
from jaxspec.cost import Part
from jaxspec.data.prompts import encode_prompt, read_prompts, text_prompt
from jaxspec.decode import DecodeState
from jaxspec.flags import DraftFlags
from jaxspec.generation import NO_LIMIT, Generation, collect, run_prefill, run_rounds, sizes, tau
from jaxspec.loading import Models
from jaxspec.regeneration import SENSIBLE, write_user_turns
from jaxspec.requests import NO_STOP, Requests, make_requests
from jaxspec.serving import Job
from jaxspec.trees import parse_tree
from jaxspec.verify import rule_named, simulated

Shape = Literal["tiny", "125m", "llama3-1b", "llama3-8b", "llama3-70b"]
NOTES = """\
tokens/s: new tokens by the time from prompts to last token, prefill included, compilation not; median of {repeats}
tau: tokens per target call, bonus token included; the prefill call and the token it gives are not counted
mbsu: the speed-up if time were the weights read alone: tau / (1 + drafter's parameters / target's * drafter's passes)
efficiency: speed-up / tau: the share of the longer steps that is left after drafting and wider target calls
same: share of prompts whose tokens are those of the plain arm; fp32 differs only at near ties; not shown where a rule
keeps the law and not the text
round: one round of the fused program in the middle of an answer; draft, target, verify, commit: its parts as separate
programs on the same shapes, taking turns with it; dispatch subtracted from all
overhead: what is left of the round; below 0 where fusion saves more than the rest costs"""


@dataclass(frozen=True, kw_only=True)
class Args(DraftFlags):
    drafter: str = "none"
    """Folder of a drafter; `none` times plain decoding alone."""
    tree: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A tree to time, an arm each: chain:DEPTH, static:eagle1, static:0,1,00, dynamic:NODESxDEPTHxBEAM or
    best_first:NODESxDEPTHxWIDTH. Repeat the flag, or join trees by commas. Default: the tree saved with the
    drafter."""
    prompts: str | None = None
    """File of prompts, as `jaxspec generate` reads it; default: user turns that the target writes itself."""
    limit: int = 16
    """Prompts taken; those that do not fill a batch are left out."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    batch: int = 1
    """Prompts decoded together."""
    repeats: int = 3
    """Times each arm runs all prompts."""
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
            parse_tree(spec)
        if self.drafter == "none" and self.shape is None:
            self.needs_drafter(tree=self.trees, **{"simulate-acceptance": self.simulate_acceptance})
        flags.refuse_below_one(self, "limit", "batch", "repeats", "prefix")
        _ = self.profile
        others = (self.prompts, self.drafter != "none", self.draft_vocab, self.peer != "none")
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
        """Whether prompts are stand-ins, so that reading them is no part of what is measured."""
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
        """The trees named, in order; a comma inside a static tree's paths joins no trees."""
        return [spec for item in self.tree for spec in re.split(r",\s*(?=none|chain|static|dynamic|best_first)", item)]


class Run(NamedTuple):
    """One pass of an arm over all batches."""

    prefill_seconds: float
    """0 where prefill is not what is measured."""
    round_seconds: float
    rounds: int
    """Rounds of the loop; a batch goes on until its last row ends."""
    generations: list[Generation]

    @property
    def tokens(self) -> list[np.ndarray]:
        """New tokens of every prompt."""
        return [row for generation in self.generations for row in generation.tokens]

    @property
    def tokens_per_second(self) -> float:
        """New tokens by all the time."""
        return sum(map(len, self.tokens)) / (self.prefill_seconds + self.round_seconds)

    @property
    def tau(self) -> float:
        """Tokens per target call; prefill and its token are not counted."""
        tokens = self.tokens
        return tau(sum(map(len, tokens)) - len(tokens), sum(int(g.calls.sum()) for g in self.generations))


class Peer(NamedTuple):
    """Another library's pass over the same batches."""

    seconds: float
    tokens: list[np.ndarray]


def main(argv: list[str]) -> int:
    """Runs the verb."""
    started = time.monotonic()
    args = cli.parse(argv, Args, prog="jaxspec bench decode", description=__doc__ or "")
    drafter = None if args.drafter == "none" else args.drafter
    models = (
        shaped(args)
        if args.shape
        else loading.load_models(
            args.target,
            drafter=drafter,
            tree=args.trees[0] if args.trees else None,
            mode=args.draft_mode,
            rule=args.rule,
            draft_vocab=args.draft_vocab,
            dtype=loading.DTYPES[args.dtype],
        )
    )
    peer = load_peer(args, models) if args.peer != "none" else None
    batches = make_batches(models, args)
    arms = make_arms(models, args)
    runs, peers = time_arms(arms, batches, args, peer)
    with report.progress("timing parts", len(arms), "arms") as bar:
        rows = []
        for name, arm in arms.items():
            rows.append(make_row(name, arm, runs, batches, args))
            bar.advance()
    result = make_result(args, rows, make_peer(args, runs, peers), started)
    print_result(result, args)
    if args.json:
        report.write_json(args.json, result)
    return 0


def shaped(args: Args) -> Models:
    """Models of the shape that is asked for."""
    assert args.shape is not None
    tree = parse_tree(args.trees[0] if args.trees else loading.DEFAULT_TREE)
    models = loading.random_models(args.shape, tree, dtype=loading.DTYPES[args.dtype], seed=args.seed)
    return models.with_rule(args.draft_mode, args.rule)


def random_batches(models: Models, args: Args) -> list[Requests]:
    """Batches of random prompts that nothing stops before their budget."""
    rng = np.random.default_rng(args.seed)
    return [
        make_requests(
            list(rng.integers(0, models.config.vocab, (args.batch, args.prefix))),
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=[serving.row_seed(args.seed, i * args.batch + row) for row in range(args.batch)],
            draft_temperature=args.draft_temperature,
        )
        for i in range(max(1, args.limit // args.batch))
    ]


def make_batches(models: Models, args: Args) -> list[Requests]:
    """Full batches of like length; prompts that cannot be read are named and left out."""
    if args.shape is not None:
        return random_batches(models, args)
    if args.prompts is None:
        turns = islice(write_user_turns(models.plain(), args.limit, seed=args.seed, settings=SENSIBLE), args.limit)
        prompts = [text_prompt(str(turn.attempt), turn.text) for turn in turns]
    else:
        prompts = read_prompts(args.prompts, limit=args.limit)
    jobs = []
    for index, prompt in enumerate(prompts):
        try:
            tokens = encode_prompt(prompt, models.tokenizer)
            serving.check_length(tokens, models.config)
        except ValueError as error:
            sys.stderr.write(f"jaxspec bench decode: prompt {prompt.id!r} {cli.sentence(error)}\n")
        else:
            jobs.append(Job(index, tokens, serving.row_seed(args.seed, index)))
    jobs.sort(key=lambda job: len(job.tokens))
    count = len(jobs) // args.batch
    if not count:
        raise ValueError(f"{len(jobs)} prompts do not fill a batch of {args.batch}: give more, or lower --batch")
    rows = [jobs[i * args.batch : (i + 1) * args.batch] for i in range(count)]
    batches = [serving.batch_requests(models, row, args.settings, batch=args.batch) for row in rows]
    if args.profile is None:
        return batches
    # What is written means nothing then, and nor does a stop id in it.
    return [b._replace(stop_BR=jnp.full_like(b.stop_BR, NO_STOP)) for b in batches]


def make_arms(models: Models, args: Args) -> dict[str, Models]:
    """`plain`, then one arm a tree."""
    arms = {"plain": models.plain()}
    if models.engine.tree is not None:
        trees = [parse_tree(spec) for spec in args.trees] or [models.engine.tree]
        arms |= {getattr(tree, "spec", str(tree)): simulate(models.with_tree(tree), args) for tree in trees}
    return arms


def simulate(models: Models, args: Args) -> Models:
    """The arm with its accept lengths drawn from the profile, if one is given."""
    tree = models.engine.tree
    if args.profile is None or tree is None:
        return models
    profile = args.profile
    if len(profile) == 1:
        further = profile[0]
        profile = (*(further**i * (1 - further) for i in range(tree.depth)), further**tree.depth)
    rule = simulated(models.engine.rule, profile)
    return models._replace(engine=dataclasses.replace(models.engine, rule=rule))


def time_arms(
    arms: dict[str, Models], batches: list[Requests], args: Args, peer: Callable[[Requests], list[np.ndarray]] | None
) -> tuple[dict[str, list[Run]], list[Peer]]:
    """Every arm's passes over all batches, arms taking turns; the first pass of each compiles and is not kept."""
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    peers: list[Peer] = []
    passes = (len(arms) + (peer is not None)) * (args.repeats + 1)
    with report.progress("timing", passes, "passes") as bar:
        for repeat in range(args.repeats + 1):
            for name, arm in arms.items():
                run = decode_all(arm, batches, args)
                runs[name] += [run] if repeat else []
                bar.advance(1, f"{name}: {report.four_digits(run.tokens_per_second)} tokens/s" if repeat else name)
            if peer is not None:
                run = peer_all(peer, batches)
                peers += [run] if repeat else []
                bar.advance(1, args.peer)
    return runs, peers


def decode_all(models: Models, batches: list[Requests], args: Args) -> Run:
    """One pass."""
    prefill = rounds = 0.0
    states = []
    for requests in batches:
        started = time.perf_counter()
        state = jax.block_until_ready(begin(models, requests, args))
        between = time.perf_counter()
        state = jax.block_until_ready(run_rounds(models.engine, models.weights, state, NO_LIMIT))
        prefill += 0.0 if args.rounds_only else between - started
        rounds += time.perf_counter() - between
        states.append(collect(state))
    return Run(prefill, rounds, sum(int(g.calls.max()) for g in states), states)


def begin(models: Models, requests: Requests, args: Args) -> DecodeState:
    """The prefilled state of a batch."""
    return run_prefill(models.engine, models.weights, requests, *capacity_and_slots(models, requests, args))


def capacity_and_slots(models: Models, requests: Requests, args: Args) -> tuple[int, int]:
    """Of the cache a row, and of the output."""
    capacity, slots = sizes(models.engine, requests.tokens_BL.shape[1], args.max_new_tokens)
    return max(capacity, args.capacity), slots


# The phases of `decode.decode_step`, each a program of its own.
grow = jax.jit(decode.grow, static_argnames="engine")
score = jax.jit(decode.score, static_argnames="engine")
accept = jax.jit(decode.accept, static_argnames="engine")
extend = jax.jit(decode.extend, static_argnames="engine")
commit = jax.jit(decode.commit, donate_argnames="state")


@jax.jit
def nothing(*arguments: Any) -> Array:
    """What handing a program its arguments costs."""
    return jnp.zeros(())


def time_parts(models: Models, requests: Requests, args: Args, rounds: int) -> dict[str, float]:
    """Seconds of a whole round and of each of its parts, in the middle of decoding `requests`."""
    engine, weights = models.engine, models.weights
    state = run_rounds(engine, weights, begin(models, requests, args), np.int32(max(1, rounds // 2)))
    tree = grow(engine, weights, state)
    scored = score(engine, weights, state, tree)
    accepted = accept(engine, state, tree, scored.logits_BNV)
    one_round = functools.partial(run_rounds, engine)
    parts = {
        "nothing": Part(nothing, (weights, state)),
        "round": Part(one_round, (weights, state, np.int32(1)), donated=1),
        "target": Part(functools.partial(score, engine), (weights, state, tree)),
        "verify": Part(functools.partial(accept, engine), (state, tree, scored.logits_BNV)),
        "commit": Part(commit, (state, scored.fresh, accepted), donated=0),
    }
    if engine.drafter is not None:
        path = (weights, state, scored.read_BND, accepted)
        parts["grow"] = Part(functools.partial(grow, engine), (weights, state))
        parts["extend"] = Part(functools.partial(extend, engine), path)
    seconds = cost.in_turns(parts, repeats=15)
    dispatch = seconds.pop("nothing")
    seconds = {name: max(0.0, taken - dispatch) for name, taken in seconds.items()}
    seconds["draft"] = seconds.pop("grow", 0.0) + seconds.pop("extend", 0.0)
    return seconds


def make_row(
    name: str, models: Models, runs: dict[str, list[Run]], batches: list[Requests], args: Args
) -> dict[str, Any]:
    """One arm's row: medians of its runs, the parts of a round, and the work a second by the models' sizes."""
    mine = runs[name]
    middle = len(batches) // 2
    rounds = int(mine[0].generations[middle].calls.max())
    parts = time_parts(models, batches[middle], args, rounds) if rounds else {}
    round_seconds = parts.pop("round", 0.0)
    prompt = float(np.mean([np.mean(np.asarray(r.length_B)) for r in batches]))
    prefix = prompt + np.mean([len(row) for row in mine[0].tokens]) / 2
    work = round_work(models, args.batch, float(prefix))
    speed = float(np.median([run.tokens_per_second for run in mine]))
    plain = float(np.median([run.tokens_per_second for run in runs["plain"]]))
    tree = models.engine.tree
    # Otherwise only the law is the same, or not even that.
    comparable = tree is None or (args.profile is None and (args.temperature == 0 or args.rule_name == "target-draw"))
    same = [np.array_equal(a, b) for a, b in zip(mine[0].tokens, runs["plain"][0].tokens, strict=True)]
    return {
        "arm": name,
        "batch": args.batch,
        "prefix": round(float(prefix)),
        "nodes": 1 if tree is None else tree.nodes,
        "tokens_per_second": speed,
        "tau": mine[0].tau,
        "block_efficiency": mine[0].tau,
        "mbsu": memory_bound_speedup(models, mine[0].tau),
        "speedup": speed / plain,
        "efficiency": speed / plain / mine[0].tau if mine[0].tau else None,
        "identical_fraction": float(np.mean(same)) if comparable else None,
        "capacity": capacity_and_slots(models, batches[0], args)[0],
        "round_ms": 1e3 * round_seconds if parts else None,
        **{f"{part}_ms": 1e3 * parts[part] if parts else None for part in ("draft", "target", "verify", "commit")},
        "overhead_ms": 1e3 * (round_seconds - sum(parts.values())) if parts else None,
        "prefill_ms": 1e3 * float(np.median([run.prefill_seconds for run in mine])) / len(batches),
        "bytes_per_second": work.bytes / round_seconds if parts else None,
        "flops_per_second": work.flops / round_seconds if parts else None,
    }


def memory_bound_speedup(models: Models, tau: float) -> float:
    """The arm's `cost.mbsu`; that of plain decoding is its tau, 1."""
    engine, weights = models.engine, models.weights
    if engine.tree is None or engine.drafter is None:
        return tau
    head_VD = decode.borrowed(engine, weights).head_VD if engine.drafter.vocab is None else None
    ratio = cost.draft_ratio(weights.drafter, weights.target, head_VD)
    return cost.mbsu(tau, ratio=ratio, passes=cost.drafter_passes(engine.drafter, engine.tree.depth))


def round_work(models: Models, batch: int, prefix: float) -> cost.Work:
    """Bytes and FLOPs of one round: the target's call and, with a drafter, the tree's growth."""
    engine, weights = models.engine, models.weights
    itemsize = engine.target.empty_cache(1, 1).k_YBKCS.dtype.itemsize
    nodes = 1 if engine.tree is None else engine.tree.nodes
    work = cost.target_work(weights.target, models.config, batch=batch, tokens=nodes, prefix=prefix, itemsize=itemsize)
    if engine.tree is None or engine.drafter is None:
        return work
    lent = decode.borrowed(engine, weights)
    return work + cost.draft_work(engine.drafter, weights.drafter, lent, engine.tree, batch=batch)


def load_peer(args: Args, models: Models) -> Callable[[Requests], list[np.ndarray]]:
    """From a batch to its tokens by the greedy `generate` of transformers: same folder, fp32, a thread a core."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(
            f"--peer transformers needs {error.name}, which is not installed: install jaxspec-decoding[parity]"
        ) from error
    torch.set_num_threads(report.machine_facts()["cores"] or 1)
    folder = loading.target_folder(args.target)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    pad = models.tokenizer.pad_id
    stops = list(models.stop_ids)

    def generate(requests: Requests) -> list[np.ndarray]:
        lengths, budgets = np.asarray(requests.length_B), np.asarray(requests.budget_B)
        width = int(lengths.max())
        tokens, mask = np.full((len(lengths), width), pad), np.zeros((len(lengths), width), np.int64)
        for row, seen, prompt, length in zip(tokens, mask, np.asarray(requests.tokens_BL), lengths, strict=True):
            row[width - length :], seen[width - length :] = prompt[:length], 1
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(mask),
                do_sample=False,
                max_new_tokens=int(budgets.max()),
                eos_token_id=stops,
                pad_token_id=pad,
            )
        rows = out[:, width:].numpy()
        return [cut(row[:budget], stops) for row, budget in zip(rows, budgets, strict=True)]

    return generate


def cut(row: np.ndarray, stops: Sequence[int]) -> np.ndarray:
    """`row` up to its first stop id, which is kept."""
    found = np.flatnonzero(np.isin(row, stops))
    return row[: found[0] + 1] if found.size else row


def peer_all(peer: Callable[[Requests], list[np.ndarray]], batches: list[Requests]) -> Peer:
    """The peer's pass."""
    started = time.perf_counter()
    tokens = [row for requests in batches for row in peer(requests)]
    return Peer(time.perf_counter() - started, tokens)


def make_peer(args: Args, runs: dict[str, list[Run]], peers: list[Peer]) -> dict[str, Any] | None:
    """The peer's entry in the result; None without one."""
    if not peers:
        return None
    plain = runs["plain"]
    speed = float(np.median([sum(map(len, p.tokens)) / p.seconds for p in peers]))
    same = [np.array_equal(a, b) for a, b in zip(peers[0].tokens, plain[0].tokens, strict=True)]
    return {
        "name": args.peer,
        "version": importlib.metadata.version(args.peer),
        "tokens_per_second": speed,
        "identical_fraction": float(np.mean(same)),
        "plain_speedup": float(np.median([run.tokens_per_second for run in plain])) / speed,
    }


def make_result(args: Args, rows: list[dict[str, Any]], peer: dict[str, Any] | None, started: float) -> dict[str, Any]:
    """The verb's JSON; `speedup` and `efficiency` are the fastest speculative arm's."""
    best = max(rows[1:], key=lambda row: row["tokens_per_second"], default=None)
    dtype = loading.DTYPES[args.dtype]
    return report.result(
        "bench decode",
        dtype=dtype,
        seed=args.seed,
        started=started,
        target=args.shape or args.target,
        simulated_acceptance=args.profile,
        max_new_tokens=args.max_new_tokens,
        repeats=args.repeats,
        temperature=args.temperature,
        drafter=None if args.drafter == "none" else args.drafter,
        draft_mode=args.draft_mode,
        rule=args.rule_name,
        rows=rows,
        best=best and best["arm"],
        speedup=best and best["speedup"],
        efficiency=best and best["efficiency"],
        peer=peer,
        machine_copy_bytes_per_second=cost.copy_bandwidth(),
        machine_matmul_flops_per_second=cost.matmul_rate(dtype),
    )


def print_result(result: dict[str, Any], args: Args) -> None:
    """Prints the arms, the parts of their rounds, the peer, and what every figure means."""
    rows, peer = result["rows"], result["peer"]
    columns = {
        "arm": "arm",
        "nodes": "nodes",
        "tokens/s": "tokens_per_second",
        "x plain": "speedup",
        "tau": "tau",
        "mbsu": "mbsu",
        "efficiency": "efficiency",
        "same": "identical_fraction",
    }
    table = [[row[key] for key in columns.values()] for row in rows]
    if peer:
        theirs = peer["tokens_per_second"]
        name = f"{peer['name']} {peer['version']}"
        table.append(
            [name, 1, theirs, theirs / rows[0]["tokens_per_second"], 1.0, None, None, peer["identical_fraction"]]
        )
    title = f"Decoding, batch {args.batch}, {args.dtype}, temperature {args.temperature:g}"
    report.print_table(title, list(columns), table)
    parts = ["round", "draft", "target", "verify", "commit", "overhead"]
    rates = ("bytes_per_second", "flops_per_second")
    table = [
        [row["arm"], *(row[f"{part}_ms"] for part in parts), *(row[k] and row[k] / 1e9 for k in rates)] for row in rows
    ]
    report.print_table("One round, ms", ["arm", *parts, "GB/s", "GFLOP/s"], table)
    sys.stdout.write(
        f"this machine: copies {result['machine_copy_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"multiplies {result['machine_matmul_flops_per_second'] / 1e9:.0f} GFLOP/s; "
        "GB/s and GFLOP/s above are what the models' sizes ask for\n"
    )
    if args.rounds_only:
        sys.stdout.write("prompts are stand-ins: prefill is left out of tokens/s, and what is written means nothing\n")
    if peer:
        sys.stdout.write(f"plain decoding is {peer['plain_speedup']:.2f} times as fast as {peer['name']}\n")
    sys.stdout.write(NOTES.format(repeats=args.repeats) + "\n")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
