"""From folders and prompts to answers: models loaded and matched, and a queue decoded in batches of like length."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import models as bundled
from jaxspec.base import Drafter, DraftMode, Params, TreePolicy
from jaxspec.checkpoint import load_drafter
from jaxspec.data.chat import ChatTokenizer
from jaxspec.data.draft_vocab import load_maps
from jaxspec.decode import DraftVocab, Engine, Weights
from jaxspec.drafters import Eagle, EagleConfig
from jaxspec.generation import NO_LIMIT, Slots, collect, run_rounds, start, tau
from jaxspec.interchange.hf import load_target
from jaxspec.requests import Requests, bucket, make_requests
from jaxspec.targets.llama import SHAPES, Llama, LlamaConfig
from jaxspec.trees import parse_tree
from jaxspec.verify import rule_named

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
DEFAULT_TREE = "dynamic:60x6x10"
"""EAGLE-2's own, for a drafter that was saved without a tree."""
SEEDS = 2**32
"""Seeds are below this."""
RuleName = Literal[
    "target-draw", "recursive-rejection", "specinfer", "speculative-sampling", "block", "traversal", "typical"
]
"""The names of `verify.RULES`, for the command line."""


class Models(NamedTuple):
    """A target with its tokenizer, and perhaps a drafter with its tree, ready to decode."""

    engine: Engine
    weights: Weights
    tokenizer: ChatTokenizer
    config: LlamaConfig
    """The target's shape."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, as the model's and the tokenizer's files list them."""
        return tuple(sorted({*self.config.eos_ids, *self.tokenizer.stop_ids}))

    def plain(self) -> Models:
        """The target alone."""
        return self._replace(engine=Engine(self.engine.target), weights=Weights(self.weights.target))

    def with_drafter(
        self, drafter: Drafter, params: Params, tree: TreePolicy, draft_vocab: Sequence[int] | None = None
    ) -> Models:
        """The same target drafted for by `drafter`, which scores the tokens `draft_vocab` (None: all)."""
        target, vocab = self.weights.target, None
        if draft_vocab is not None:
            token_U = jnp.asarray(draft_vocab, jnp.int32)
            vocab = DraftVocab(token_U, self.engine.target.borrowed(target).head_VD[token_U])
        return self._replace(engine=Engine(self.engine.target, drafter, tree), weights=Weights(target, params, vocab))

    def with_tree(self, tree: TreePolicy) -> Models:
        """The same models with another tree."""
        return self._replace(engine=dataclasses.replace(self.engine, tree=tree))

    def with_rule(self, mode: DraftMode, rule: str | None = None) -> Models:
        """The same models with children chosen by `mode` and kept by `rule` (None: the usual one for the mode).

        Raises ValueError where the rule is not one for that mode or tree.
        """
        return self._replace(engine=dataclasses.replace(self.engine, mode=mode, rule=rule_named(rule, mode)))


def random_models(shape: str, tree: TreePolicy, *, dtype: Any = jnp.float32, seed: int = 0) -> Models:
    """A target of one of `targets.llama.SHAPES` and an EAGLE-2 head for it, with random weights and no tokenizer."""
    config = c = SHAPES[shape]
    target = Llama(config, stacked=False, dtype=dtype, param_dtype=dtype)
    head = EagleConfig(c.width, c.heads, c.kv_heads, c.head_dim, c.mlp, c.rope_theta, c.rope_scaling, bias=False)
    drafter = Eagle(head, dtype=dtype)

    def weights(key: jax.Array) -> Weights:
        made = Weights(target.init_params(key), drafter.init_params(jax.random.fold_in(key, 1)))
        return jax.tree.map(lambda a: a.astype(dtype), made)

    engine = Engine(target, drafter, tree)
    return Models(engine, jax.jit(weights)(jax.random.key(seed)), cast(Any, None), config)


def target_folder(name: str) -> Path:
    """The HuggingFace folder that `name` stands for: `tiny` is the bundled target, anything else a path."""
    if name != "tiny":
        return Path(name)
    folder = bundled.tiny_path()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: the bundled tiny target is not there; reinstall, or give --target a folder")
    return folder


def load_models(
    target: str,
    *,
    drafter: str | Path | None = None,
    tree: str | None = None,
    mode: DraftMode = "topk",
    rule: str | None = None,
    draft_vocab: str | None = None,
    dtype: Any = jnp.float32,
) -> Models:
    """The target of a HuggingFace folder (or `tiny`), with the drafter that `save_drafter` wrote and the tree `tree`.

    `tree` defaults to the one saved with the drafter, `rule` to the usual one for the draft mode.
    `draft_vocab` is a file of maps (see `data.draft_vocab`), `none` for all tokens, or None for what was saved with the
    drafter. Raises ValueError naming what is missing or does not match.
    """
    if drafter is None and tree is not None:
        raise ValueError(f"a tree ({tree}) needs a drafter: give one, or leave the tree out")
    folder = target_folder(target)
    loaded = load_target(folder, dtype=dtype, stacked=False)
    plain = Models(Engine(loaded.module), Weights(loaded.params), ChatTokenizer.load(folder), loaded.config)
    if drafter is None:
        return plain
    head = load_drafter(drafter, dtype=dtype)
    width = getattr(head.module.config, "width", plain.config.width)
    if width != plain.config.width:
        raise ValueError(
            f"{drafter}: the drafter reads features of width {width}, but the target {folder} has width "
            f"{plain.config.width}; it was made for another target"
        )
    scored = head.draft_vocab
    if scored is not None and not (scored and 0 <= scored[0] and scored[-1] < plain.config.vocab):
        raise ValueError(
            f"{drafter}: its draft vocabulary is not part of the target's {plain.config.vocab} tokens; it was made for "
            "another target"
        )
    if draft_vocab is not None:
        scored = None if draft_vocab == "none" else load_maps(draft_vocab, plain.config.vocab).tolist()
    policy = parse_tree(tree or head.about.get("tree") or DEFAULT_TREE)
    return plain.with_drafter(head.module, head.params, policy, scored).with_rule(mode, rule)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are drawn. ValueError names a field out of range."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 decodes greedily."""
    top_k: int = 0
    """0 keeps all tokens."""
    top_p: float = 1.0
    draft_temperature: float | None = None
    """Of the law that drawn children come from; None for `temperature`."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer, besides the model's own."""

    def __post_init__(self) -> None:
        for name, holds, range_ in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or above"),
            ("draft_temperature", 0 <= (self.draft_temperature or 0) < float("inf"), "0 (likeliest) or above"),
            ("top_k", self.top_k >= 0, "0 (keep all) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not holds:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be {range_}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of every verb that decodes; each adds its own."""

    target: str = "tiny"
    """HuggingFace folder of a Llama-family model; `tiny` is the one that comes with jaxspec."""
    max_new_tokens: int = 256
    """Most tokens of an answer; one that reaches the target's last position ends there."""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 draws from the target's own distribution."""
    top_k: int = 0
    """Draw among the likeliest K tokens; 0 keeps all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Seed of the draws; every prompt has its own noise, whatever batch it is in and whatever drafts for it."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations."""
    json: str | None = None
    """File for the result."""

    def __post_init__(self) -> None:
        _ = self.settings
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"--seed is {self.seed}; it must be from 0 to 2^32 - 1")

    @property
    def settings(self) -> Settings:
        """How answers are drawn."""
        return Settings(self.max_new_tokens, self.temperature, self.top_k, self.top_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftFlags(Flags):
    """The flags of verbs that draft, as given; how a drafter is named is the verb's own."""

    draft_mode: DraftMode = "topk"
    """How a node's children are chosen: its likeliest tokens, or draws from the draft's law with or without (swor)
    replacement."""
    rule: RuleName | None = None
    """Which drafted tokens are kept; all are lossless but typical, which keeps what is likely enough. Default:
    target-draw for topk (the text is then that of plain decoding, token for token), specinfer for sample,
    recursive-rejection for swor."""
    draft_temperature: float | None = None
    """Of the law that children are drawn from. Default: --temperature."""
    draft_vocab: str | None = None
    """File of the tokens that the drafter scores, as jaxspec draft-vocab writes it; `none` for all. Default: those
    saved with the drafter. It changes the speed, not the text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft_mode == "topk" and self.draft_temperature is not None:
            raise ValueError("--draft-temperature is for drawn children: give --draft-mode sample or swor")
        rule_named(self.rule, self.draft_mode).check_mode(self.draft_mode)

    def needs_drafter(self, **flags: object) -> None:
        """ValueError naming the first of `flags`, or of these, that is given although nothing is drafted."""
        given = {**flags, "rule": self.rule, "draft-vocab": self.draft_vocab, "draft-mode": self.draft_mode != "topk"}
        for name, value in given.items():
            if value:
                raise ValueError(f"--{name} needs a --drafter, for plain decoding drafts nothing")

    @property
    def settings(self) -> Settings:
        """How answers are drawn."""
        return dataclasses.replace(super().settings, draft_temperature=self.draft_temperature)


def refuse_below_one(args: object, *names: str) -> None:
    """ValueError naming the first of these flags that is given and less than 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def row_seed(seed: int, index: int) -> int:
    """The seed of prompt `index` of a run: the same in whatever batch, shard or order it is decoded."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def check_length(tokens: np.ndarray, config: LlamaConfig) -> None:
    """ValueError, a sentence without its subject, if the target has no position left for a single new token."""
    if not len(tokens):
        raise ValueError("is empty")
    if len(tokens) >= config.max_positions:
        raise ValueError(
            f"has {len(tokens):,} tokens, and the target has {config.max_positions:,} positions: shorten it"
        )


class Job(NamedTuple):
    """One prompt in the queue."""

    key: Any
    """The caller's own name for it."""
    tokens: np.ndarray
    seed: int = 0
    settings: Settings | None = None
    """Its own; None for those of the queue."""


class Answer(NamedTuple):
    """What the target wrote."""

    tokens: np.ndarray
    """New tokens, the stop id included."""
    finish: str
    """`stop`, or `length` at the budget or the target's last position."""
    calls: int
    accepted: np.ndarray
    """Rounds that accepted 0, 1, .. T drafted tokens."""

    @property
    def tau(self) -> float:
        """Tokens per target call, bonus tokens included; the prefill call and the token it gives are not counted."""
        return tau(len(self.tokens) - 1, self.calls)


class Batch(NamedTuple):
    """Jobs that were decoded together."""

    jobs: list[Job]
    answers: list[Answer]
    seconds: float
    """From the prompts to the last token, on the host's clock."""

    @property
    def tokens(self) -> int:
        """New tokens of all answers."""
        return sum(len(a.tokens) for a in self.answers)


class Queue:
    """Prompts that wait, by padded length: a batch holds one length only, so what a prompt gets does not depend on
    which others stand beside it, and few programs are compiled."""

    def __init__(self, jobs: Iterable[Job], *, batch: int) -> None:
        self.batch = batch
        self._waiting: dict[int, list[Job]] = {}
        for job in jobs:
            self.add(job)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, job: Job) -> None:
        """Let `job` wait; jobs may be added while the queue is being decoded."""
        self._waiting.setdefault(bucket(len(job.tokens)), []).append(job)

    def take(self) -> list[Job]:
        """The next batch: a full one of the longest prompts, else what waits of the shortest.

        So conversations that have begun are finished before others are begun, and batches fill up.
        """
        full = [width for width, jobs in self._waiting.items() if len(jobs) >= self.batch]
        width = max(full) if full else min(self._waiting)
        taken, left = self._waiting[width][: self.batch], self._waiting[width][self.batch :]
        self._waiting[width] = left
        if not left:
            del self._waiting[width]
        return taken


def answer(models: Models, queue: Queue, settings: Settings, *, warm: bool = False) -> Iterator[Batch]:
    """Decode the queue until it is empty, a batch at a time; yields each batch when it is done.

    The last batch of a length is padded with rows that end at once. With `warm`, a batch of a new length is prepared
    before its clock starts, so that `seconds` hold no compilation.
    """
    warmed: set[int] = set()
    while queue:
        jobs = queue.take()
        requests = batch_requests(models, jobs, settings, batch=queue.batch)
        if warm and requests.tokens_BL.shape[1] not in warmed:
            warm_up(models, requests, settings)
            warmed.add(requests.tokens_BL.shape[1])
        started = time.perf_counter()
        state = start(models.engine, models.weights, requests, max_new_tokens=settings.max_new_tokens)
        done = collect(run_rounds(models.engine, models.weights, state, NO_LIMIT))
        seconds = time.perf_counter() - started
        rows = zip(done.tokens, done.finish, done.calls.tolist(), done.accepted, strict=True)
        yield Batch(jobs, [Answer(*row) for row in rows][: len(jobs)], seconds)


class Served(NamedTuple):
    """A prompt that was answered in a slot."""

    job: Job
    answer: Answer
    seconds: float
    """Of the queue so far, compilation left out."""


def serve(models: Models, jobs: Sequence[Job], settings: Settings, *, slots: int) -> Iterator[Served]:
    """Answer the jobs in `slots` rows of one running batch, each row taking the next job when it has finished.

    Yields as they finish. Everything is compiled before the first. What a prompt gets does not depend on which others
    run beside it.
    """
    jobs = sorted(jobs, key=lambda job: -len(job.tokens))
    if not jobs:
        return
    budgets = [budget(models, job, settings) for job in jobs]
    room = functools.partial(
        Slots,
        models.engine,
        models.weights,
        min(slots, len(jobs)),
        longest=len(jobs[0].tokens),
        max_new_tokens=max(budgets),
        stops=max(1, *(len(stop_ids(models, job, settings)) for job in jobs)),
    )
    _warm(models, room(), jobs, settings)
    running, waiting, held = room(), list(reversed(jobs)), {}
    started = time.perf_counter()
    while waiting or held:
        while waiting and running.free:
            job, row = waiting.pop(), running.free[0]
            running.admit(slot_request(models, job, settings, running), row)
            held[row] = job
        done = running.run()
        seconds = time.perf_counter() - started
        for row, g in done.items():
            yield Served(held.pop(row), Answer(g.tokens[0], g.finish[0], int(g.calls[0]), g.accepted[0]), seconds)


def _warm(models: Models, running: Slots, jobs: Sequence[Job], settings: Settings) -> None:
    """Run every program that serving `jobs` will, once."""
    for job in {running.width(len(job.tokens)): job for job in jobs}.values():
        running.admit(slot_request(models, job, settings, running), running.free[0])
        running.run(limit=1)
        if not running.free:
            running.run()


def slot_request(models: Models, job: Job, settings: Settings, running: Slots) -> Requests:
    """`job` as the one row that a slot takes."""
    width = running.width(len(job.tokens))
    return batch_requests(models, [job], settings, batch=1, width=width, stop_width=running.stops)


def budget(models: Models, job: Job, settings: Settings) -> int:
    """New tokens the job may have; answers end at the target's last position."""
    return min((job.settings or settings).max_new_tokens, models.config.max_positions - len(job.tokens))


def stop_ids(models: Models, job: Job, settings: Settings) -> tuple[int, ...]:
    """Ids that end the job's answer."""
    return (*models.stop_ids, *(job.settings or settings).stop_ids)


def batch_requests(
    models: Models, jobs: list[Job], settings: Settings, *, batch: int, width: int = 0, stop_width: int = 1
) -> Requests:
    """`jobs` as `batch` rows; answers end at the target's last position, rows that pad with their first token."""
    rows = jobs + jobs[-1:] * (batch - len(jobs))
    own = [job.settings or settings for job in rows]
    drafts_at = [s.temperature if s.draft_temperature is None else s.draft_temperature for s in own]
    return make_requests(
        [job.tokens for job in rows],
        max_new_tokens=[budget(models, job, settings) for job in jobs] + [1] * (batch - len(jobs)),
        temperature=[s.temperature for s in own],
        top_k=[s.top_k for s in own],
        top_p=[s.top_p for s in own],
        seed=[job.seed for job in rows],
        stop_ids=[stop_ids(models, job, settings) for job in rows],
        draft_temperature=drafts_at,
        vocab=models.config.vocab,
        width=width,
        stop_width=stop_width,
    )


def warm_up(models: Models, requests: Requests, settings: Settings) -> None:
    """Compile what decoding `requests` runs, and run a round of it: some kernels are built when they first run."""
    state = start(models.engine, models.weights, requests, max_new_tokens=settings.max_new_tokens)
    jax.block_until_ready(run_rounds(models.engine, models.weights, state, np.int32(1)))
