"""A real target measured on a device: answers by batch, a head trained for the time that is left, decoding with it."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec.checkpoints.models import save_drafter
from jaxspec.data import jsonl
from jaxspec.data.corpus import tokenize_conversations
from jaxspec.data.messages import Conversation
from jaxspec.data.packing import PackedBatches
from jaxspec.decoding.answers import Answer
from jaxspec.decoding.requests import Request, Settings, bucket, make_requests
from jaxspec.distillation.step import init_state, train_step
from jaxspec.distillation.task import Frozen
from jaxspec.evaluation import timing
from jaxspec.evaluation.device_plan import DevicePlan
from jaxspec.evaluation.equivalence import TIES
from jaxspec.evaluation.measurements import Figures, Measurement
from jaxspec.evaluation.peer_processes import COMPARED, compare_tokens
from jaxspec.evaluation.timing import Load
from jaxspec.parallel.mesh import batch_sharding
from jaxspec.serving import loading
from jaxspec.serving.dialogue import Rewritten
from jaxspec.serving.loading import Models
from jaxspec.serving.regeneration import LONG, RewriteOptions, rewrite, write_user_turns
from jaxspec.training.batches import place_rows
from jaxspec.training.resolve import DistillStep
from jaxspec.trees import parse_tree

ROWS, LENGTH = 8, 512
"""Rows of a training batch, and tokens of a row."""
MOST_STEPS = 3000
AT_LEAST = 60.0
"""Seconds that decoding needs behind the training."""
TREE = "chain:5"
HELD_OUT = 16
"""Prompts that are decoded and not trained on."""
PLAIN = "plain_answers"
"""Name of the file with the tokens of plain decoding, which those of the speculative arm are compared with."""


class TargetBench:
    """Measures one target, step by step: `regenerate`, then `train_head` on its answers, then decoding.

    `make` returns the training step for a loaded target and a number of updates. What a step makes is kept in `folder`
    for a later session. Raises whatever a measurement runs into.
    """

    def __init__(
        self, plan: DevicePlan, folder: Path, deadline: float, make: Callable[[Models, int, Any], DistillStep]
    ) -> None:
        self.plan, self.folder, self.deadline, self.make = plan, folder, deadline, make

    def measure(self, m: Measurement) -> Figures:
        """Returns the figures of one measurement."""
        if m.kind == "regenerate":
            return self._regenerate(m.settings["batch"])
        if m.kind == "train_head":
            return self._train()
        return self._decode(drafts=m.kind == "decode_speculative")

    @functools.cached_property
    def models(self) -> Models:
        """The target alone."""
        return loading.load_models(self.plan.target, dtype=loading.DTYPES[self.plan.dtype])

    def _regenerate(self, batch: int) -> Figures:
        """Lets the target answer user turns that it has written, twice: the first time compiles, and is not counted."""
        turns = list(self._turns(self.plan.answers + HELD_OUT, batch))
        settings = Settings(max_new_tokens=self.plan.max_new_tokens, temperature=1.0, seed=self.plan.seed)
        asked = [
            Conversation(str(i), "self", ({"role": "user", "content": t},)) for i, t in enumerate(turns[HELD_OUT:])
        ]
        first, answered = _timed_answers(self.models, asked, settings, batch)
        seconds, _ = _timed_answers(self.models, asked, settings, batch)
        if not answered:
            raise ValueError(f"{self.plan.target}: the target answered none of {len(asked)} prompts")
        self._keep("held_out", [{"text": turn} for turn in turns[:HELD_OUT]])
        self._keep("answers", [{"id": r.conversation.id, "messages": r.conversation.messages} for r in answered])
        tokens = sum(r.tokens for r in answered)
        return {
            "seconds": seconds,
            "compile_seconds": max(0.0, first - seconds),
            "tokens_per_second": tokens / seconds,
            "tokens": tokens,
            "answers": len(answered),
        }

    def _turns(self, count: int, batch: int) -> Any:
        written = write_user_turns(self.models, count, seed=self.plan.seed, settings=LONG, batch=batch)
        return (turn.text for turn in itertools.islice(written, count))

    def _keep(self, name: str, records: list[dict[str, Any]]) -> None:
        path = self.folder / f"{name}.jsonl"
        path.unlink(missing_ok=True)
        jsonl.append(path, records)

    def _kept(self, name: str) -> list[dict[str, Any]]:
        found = jsonl.read_lines(self.folder / f"{name}.jsonl")
        if not found:
            raise ValueError(f"{self.folder}: has no {name}.jsonl, because the target's answers were not measured")
        return found

    def _train(self) -> Figures:
        """Trains a head until `AT_LEAST` seconds are left for decoding, and saves it."""
        talks = [Conversation(r["id"], "self", tuple(r["messages"])) for r in self._kept("answers")]
        corpus = tokenize_conversations(talks, self.models.tokenizer, length=LENGTH)
        data = PackedBatches(corpus, LENGTH, ROWS, seed=self.plan.seed, epochs=None, loss_on="assistant")
        built = self.make(self.models, MOST_STEPS, (ROWS, LENGTH))
        target: Any = built.task.target
        frozen, place = (
            Frozen(self.models.weights.target),
            functools.partial(place_rows, batch_sharding(built.mesh), data),
        )
        key = jax.random.key(self.plan.seed)
        state = init_state(built.task.drafter, built.optimizer, key, target.shared_tables(frozen.params))
        step = jax.jit(functools.partial(train_step, built.task, built.optimizer), donate_argnums=1)
        started, losses, loss = time.perf_counter(), [], None
        state, loss = jax.block_until_ready(step(frozen, state, place(data[0])))
        compiling, steps = time.perf_counter() - started, 1
        while steps < self._most_steps and time.time() < self.deadline - AT_LEAST:
            state, loss = step(frozen, state, place(data[steps]))
            steps += 1
            # Steps that wait in a queue would run past the deadline.
            losses += [float(loss)] if steps % 10 == 0 else []
        seconds = time.perf_counter() - started - compiling
        drafter: Any = built.task.drafter
        params = jax.device_get(state.params)
        save_drafter(self.folder / "drafter", "eagle", drafter, params, {"target": self.plan.target, "tree": TREE})
        tokens = (steps - 1) * ROWS * LENGTH
        return {
            "seconds": seconds / max(1, steps - 1),
            "compile_seconds": compiling,
            "tokens_per_second": tokens / seconds,
            "steps": steps,
            "loss": float(np.asarray(loss)),
            "first_loss": losses[0] if losses else None,
        }

    @property
    def _most_steps(self) -> int:
        """Steps that make some passes over the answers; more would learn little."""
        return max(2, min(MOST_STEPS, 6 * self.plan.answers))

    def _decode(self, *, drafts: bool) -> Figures:
        """Decodes held-out prompts one by one, greedily, as `jaxspec bench decode` does."""
        models = self.models
        if drafts:
            models = loading.add_drafter(models, self.folder / "drafter", dtype=loading.DTYPES[self.plan.dtype])
            models = models.with_tree(parse_tree(TREE))
        settings = Settings(max_new_tokens=self.plan.max_new_tokens, seed=self.plan.seed)
        tokenizer = self.models.tokenizer
        prompts = [tokenizer.encode_prompt([{"role": "user", "content": r["text"]}]) for r in self._kept("held_out")]
        requests = [models.request(np.asarray(tokens), settings, i) for i, tokens in enumerate(prompts)]
        width = max(len(r.tokens) for r in requests)  # one program reads them all
        load = Load([make_requests([r], width=bucket(width)) for r in requests], self.plan.max_new_tokens)
        runs, _ = timing.time_arms({"arm": models}, load, repeats=1)
        run = runs["arm"][0]
        answers = [answer for answers in run.answers for answer in answers]
        if not drafts:
            self._keep(PLAIN, [{"tokens": answer.tokens.tolist()} for answer in answers])
        return {
            "seconds": run.prefill_seconds + run.round_seconds,
            "tokens_per_second": run.tokens_per_second,
            "tau": run.tau,
            "round_seconds": run.round_seconds / run.rounds,
            **(self._compared(models, requests, answers) if drafts else {}),
        }

    def _compared(self, models: Models, requests: list[Request], answers: list[Answer]) -> Figures:
        """Returns how the answers differ from plain decoding's, ties by the plan's dtype; None where it has none."""
        kept = self._kept(PLAIN) if (self.folder / f"{PLAIN}.jsonl").exists() else []
        if len(kept) != len(answers):
            return dict.fromkeys(COMPARED)
        tie = TIES[np.dtype(loading.DTYPES[self.plan.dtype]).name]
        return compare_tokens(models, requests, kept, [{"tokens": answer.tokens} for answer in answers], tie=tie)


def _timed_answers(
    models: Models, asked: list[Conversation], settings: Settings, batch: int
) -> tuple[float, list[Rewritten]]:
    """Returns the seconds of answering all, and the conversations that have answers."""
    started, options = time.perf_counter(), RewriteOptions(batch=batch)
    done = [r for _, finished in rewrite(models, enumerate(asked), settings, options) for r in finished if r.turns]
    return time.perf_counter() - started, done
