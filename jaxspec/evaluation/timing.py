"""Decoding timed: whole passes of several arms in turns, a round phase by phase, and the bytes and FLOPs of a round."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.base import Array, Drafter, TreePolicy
from jaxspec.console import progress, tables
from jaxspec.decoding import rounds as phases
from jaxspec.decoding.answers import Answer, total_tau, total_tokens
from jaxspec.decoding.generation import NO_LIMIT, collect, run_prefill, run_rounds, sizes
from jaxspec.decoding.requests import Requests
from jaxspec.decoding.rounds import DecodeState, Engine, shared_tables
from jaxspec.drafters.prompt_lookup import PromptLookup
from jaxspec.evaluation.machine import TimedProgram, in_turns
from jaxspec.planning.work import Work, draft_ratio, draft_work, drafter_passes, mbsu, target_work
from jaxspec.serving.loading import Models
from jaxspec.trees import AdaptiveTree
from jaxspec.verify import simulated

Peer = Callable[[Requests], list[np.ndarray]]
"""Another library, as a function from a batch to its new tokens."""


class Load(NamedTuple):
    """The batches that every arm decodes."""

    batches: list[Requests]
    max_new_tokens: int
    """At least the largest budget."""
    capacity: int = 0
    """Least slots of the cache; 0: as many as prompts and answers need."""
    rounds_only: bool = False
    """Whether prompts are stand-ins, so that reading them is not measured."""

    def sizes(self, models: Models, requests: Requests) -> tuple[int, int]:
        """Returns the slots of the cache a row, and of the output."""
        capacity, slots = sizes(models.engine, requests.tokens_BL.shape[1], self.max_new_tokens)
        return max(capacity, self.capacity), slots

    def begin(self, models: Models, requests: Requests) -> DecodeState:
        """Returns the prefilled state of a batch."""
        return run_prefill(models.engine, models.weights, requests, *self.sizes(models, requests))


class Run(NamedTuple):
    """One pass of an arm over all batches."""

    prefill_seconds: float
    """0 where prefill is not measured."""
    round_seconds: float
    rounds: int
    """Rounds of the loop; a batch goes on until its last row ends."""
    answers: list[list[Answer]]
    """Of each batch."""

    @property
    def tokens(self) -> list[np.ndarray]:
        """New tokens of every prompt."""
        return [answer.tokens for answers in self.answers for answer in answers]

    @property
    def tokens_per_second(self) -> float:
        """New tokens by all the time."""
        return sum(map(total_tokens, self.answers)) / (self.prefill_seconds + self.round_seconds)

    @property
    def tau(self) -> float:
        """Tokens per target call; prefill and its token are not counted."""
        return total_tau(answer for answers in self.answers for answer in answers)


class Parts(NamedTuple):
    """Seconds of one round and of its parts, each a program of its own; without the dispatch of a program."""

    round: float
    draft: float
    target: float
    verify: float
    commit: float

    @property
    def overhead(self) -> float:
        """The round without its parts; below 0 where fusion saves more than the rest costs."""
        return self.round - sum(self[1:])


class PeerRun(NamedTuple):
    """Another library's pass over the same batches."""

    seconds: float
    tokens: list[np.ndarray]


def simulate(models: Models, profile: Sequence[float] | None) -> Models:
    """Returns the models with accept lengths drawn from `profile`; unchanged without one, or where nothing is drafted.

    One number is the chance of every further token; several are the probabilities of accepting 0, 1, 2 ... tokens.
    """
    tree = models.engine.tree
    if profile is None or tree is None:
        return models
    if len(profile) == 1:
        further = profile[0]
        profile = (*(further**i * (1 - further) for i in range(tree.depth)), further**tree.depth)
    rule = simulated(models.engine.rule, tuple(profile))
    return models._replace(engine=dataclasses.replace(models.engine, rule=rule))


def time_arms(
    arms: dict[str, Models],
    load: Load,
    *,
    repeats: int,
    peer: tuple[str, Peer] | None = None,
    runs: dict[str, list[Run]] | None = None,
) -> tuple[dict[str, list[Run]], list[PeerRun]]:
    """Returns every arm's passes over all batches, arms taking turns; their first passes compile and are dropped.

    The passes are also put into `runs` as they are made, for a caller who is interrupted.
    """
    runs = {} if runs is None else runs
    runs.update({name: [] for name in arms})
    peers: list[PeerRun] = []
    passes = (len(arms) + (peer is not None)) * (repeats + 1)
    with progress.progress("timing", passes, "passes") as bar:
        for repeat in range(repeats + 1):
            for name, arm in arms.items():
                if not repeat:
                    bar.tell(f"compiling {name}")
                run = decode_all(arm, load)
                runs[name] += [run] if repeat else []
                told = f"{name}: {tables.four_digits(run.tokens_per_second)} tokens/s, tau {run.tau:.2f}"
                bar.advance(1, told if repeat else f"{name} is compiled", at_once=True)
            if peer is not None:
                run = peer_all(peer[1], load)
                peers += [run] if repeat else []
                bar.advance(1, peer[0])
    return runs, peers


def decode_all(models: Models, load: Load) -> Run:
    """Returns one pass over all batches."""
    prefill = rounds = 0.0
    answers = []
    for requests in load.batches:
        started = time.perf_counter()
        state = jax.block_until_ready(load.begin(models, requests))
        between = time.perf_counter()
        state = jax.block_until_ready(run_rounds(models.engine, models.weights, state, NO_LIMIT))
        prefill += 0.0 if load.rounds_only else between - started
        rounds += time.perf_counter() - between
        answers.append(collect(state))
    return Run(prefill, rounds, sum(map(most_calls, answers)), answers)


def most_calls(answers: Sequence[Answer]) -> int:
    """Returns the rounds of a batch, which goes on until its last row ends."""
    return max(answer.calls for answer in answers)


def peer_all(peer: Peer, load: Load) -> PeerRun:
    """Returns the peer's pass."""
    started = time.perf_counter()
    tokens = [row for requests in load.batches for row in peer(requests)]
    return PeerRun(time.perf_counter() - started, tokens)


# The phases of `rounds.decode_step`, each a program of its own.
grow = jax.jit(phases.grow, static_argnames="engine")
score = jax.jit(phases.score, static_argnames="engine")
accept = jax.jit(phases.accept, static_argnames="engine")
extend = jax.jit(phases.extend, static_argnames="engine")
commit = jax.jit(phases.commit, donate_argnames="state")


@functools.partial(jax.jit, static_argnames="engine")
def nothing(engine: Engine, *arguments: Any) -> Array:
    """Does nothing: its time is that of handing a program its arguments and finding it by its engine."""
    return jnp.zeros(())


def time_parts(arms: dict[str, Models], load: Load, requests: Requests, rounds: dict[str, int]) -> dict[str, Parts]:
    """Times a whole round of every arm and each part of it, in the middle of the `rounds` that its `requests` take.

    All parts of all arms take turns, so arms compare as well as parts do; every arm holds a cache meanwhile.
    """
    parts = {}
    with progress.progress("compiling the parts of a round", len(arms), "arms") as bar:
        for name, models in arms.items():
            bar.tell(name)
            mine = _parts(models, load, requests, rounds[name])
            for program in mine.values():
                program.run()
            parts |= {(name, part): program for part, program in mine.items()}
            bar.advance(at_once=True)
    repeats = 15
    with progress.progress("timing parts", repeats + 1, "turns") as bar:
        seconds = in_turns(parts, repeats=repeats, advance=bar.advance)
    return {name: _without_dispatch({p: taken for (n, p), taken in seconds.items() if n == name}) for name in arms}


def _parts(models: Models, load: Load, requests: Requests, rounds: int) -> dict[str, TimedProgram]:
    """Returns the programs of one arm's round, of its phases, and one that does nothing with the same arguments."""
    engine, weights = models.engine, models.weights
    state = run_rounds(engine, weights, load.begin(models, requests), np.int32(max(1, rounds // 2)))
    tree = grow(engine, weights, state)
    scored = score(engine, weights, state, tree)
    accepted = accept(engine, state, tree, scored.logits_BNV)
    one_round = functools.partial(run_rounds, engine)
    parts = {
        "nothing": TimedProgram(functools.partial(nothing, engine), (weights, state)),
        "round": TimedProgram(one_round, (weights, state, np.int32(1)), donated=1),
        "target": TimedProgram(functools.partial(score, engine), (weights, state, tree)),
        "verify": TimedProgram(functools.partial(accept, engine), (state, tree, scored.logits_BNV)),
        "commit": TimedProgram(commit, (state, scored.fresh, accepted), donated=0),
    }
    if engine.drafter is not None:
        path = (weights, state, scored.read_BND, accepted)
        parts["grow"] = TimedProgram(functools.partial(grow, engine), (weights, state))
        parts["extend"] = TimedProgram(functools.partial(extend, engine), path)
    return parts


def _without_dispatch(seconds: dict[str, float]) -> Parts:
    """Returns the seconds of each program beyond `nothing`; drafting is growing the tree and extending the drafter."""
    dispatch = seconds["nothing"]
    taken = {name: max(0.0, spent - dispatch) for name, spent in seconds.items()}
    drafting = taken.get("grow", 0.0) + taken.get("extend", 0.0)
    return Parts(taken["round"], drafting, taken["target"], taken["verify"], taken["commit"])


def memory_bound_speedup(models: Models, tau: float) -> float:
    """Returns the arm's `work.mbsu`; that of plain decoding is its tau, 1."""
    engine, weights = models.engine, models.weights
    drafting = passes_of(engine)
    if drafting is None:
        return tau
    drafter, tree = drafting
    head_VD = shared_tables(engine, weights).head_VD if drafter.vocab is None else None
    ratio = draft_ratio(weights.drafter, weights.target, head_VD)
    return mbsu(tau, ratio=ratio, passes=drafter_passes(drafter, tree.depth))


def passes_of(engine: Engine) -> tuple[Drafter, TreePolicy] | None:
    """Returns the drafter that runs passes and the tree that they grow, of an adaptive tree all it may draft.

    None where nothing is drafted, or looked-up tokens alone.
    """
    drafter, tree = engine.drafter, engine.tree
    if isinstance(drafter, PromptLookup):
        drafter = drafter.head
    if isinstance(tree, AdaptiveTree):
        tree = tree.base
    return None if drafter is None or tree is None else (drafter, tree)


def round_work(models: Models, batch: int, prefix: float) -> Work:
    """Returns bytes and FLOPs of one round: the target's call and, with a drafter, the growth of the tree."""
    engine, weights = models.engine, models.weights
    itemsize = engine.target.empty_cache(1, 1).v_YBKSC.dtype.itemsize
    nodes = 1 if engine.tree is None else engine.tree.nodes
    work = target_work(weights.target, models.config, batch=batch, tokens=nodes, prefix=prefix, itemsize=itemsize)
    drafting = passes_of(engine)
    if drafting is None:
        return work
    drafter, tree = drafting
    return work + draft_work(drafter, weights.drafter, shared_tables(engine, weights), tree, batch=batch)
