"""Other libraries, and this one, as processes that answer prompts one by one: each in a process of its own.

A worker reads a line of JSON for each prompt and writes one with its answer, so that the peers take turns prompt by
prompt, and none holds what another one needs. Token ids go in and out; nothing is tokenized in the timed span.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import time
import traceback
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from jaxspec.decoding.answers import Answer
from jaxspec.decoding.generation import NO_LIMIT, collect, run_prefill, run_rounds, sizes
from jaxspec.decoding.requests import Settings, make_requests
from jaxspec.evaluation.measurements import reason_of
from jaxspec.evaluation.peers import cut, readable_folder
from jaxspec.serving import loading

Reply = dict[str, Any]
ASSISTANT = {
    "tokens": "num_assistant_tokens",
    "threshold": "assistant_confidence_threshold",
    "schedule": "num_assistant_tokens_schedule",
}
"""Settings of assisted generation by their short names."""


class PeerSpec(NamedTuple):
    """A peer and how it decodes; all of them decode greedily, in fp32."""

    name: str
    kind: str
    """One of `KINDS`."""
    target: str
    """HuggingFace folder, GGUF file or name of a target; of llama.cpp the GGUF file."""
    settings: Mapping[str, Any]
    """Keyword arguments of the kind."""
    threads: int
    longest: int
    """Most tokens of a prompt."""
    budget: int
    """New tokens."""


class PeerPrompt(NamedTuple):
    """A prompt for a worker."""

    tokens: list[int]
    stops: list[int]
    settings: Mapping[str, Any] = types.MappingProxyType({})
    """Of the peer, for this prompt and those that follow; see `Worker.configure`."""


def serve(spec: PeerSpec, asked: TextIO, told: TextIO) -> None:
    """Answers prompts until `asked` ends, a line each: the answer, or `failed` with the reason that there is none.

    A first line is about the worker itself, or says why it cannot start; it then takes no prompts.
    """
    # XLA starts a thread a core that it may use, and asks nobody for another number.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec.threads])
    try:
        peer = KINDS[spec.kind](spec)
    except Exception as failure:  # whatever a library runs into, the other peers go on
        _tell(told, _failed(failure))
        return
    _tell(told, {"version": peer.version, **peer.about})
    for line in asked:
        prompt = PeerPrompt(**json.loads(line))
        try:
            peer.configure(**prompt.settings)
            reply = peer.answer(prompt)
        except Exception as failure:  # as above
            reply = _failed(failure)
        _tell(told, reply)


def _failed(failure: Exception) -> Reply:
    if os.environ.get("JAXSPEC_TRACEBACK") == "1":
        traceback.print_exception(failure)
    missing = getattr(failure, "name", None) if isinstance(failure, ImportError) else None
    return {"failed": f"{missing} is not installed" if missing else f"{type(failure).__name__}: {reason_of(failure)}"}


def _tell(told: TextIO, reply: Reply) -> None:
    told.write(json.dumps(reply) + "\n")
    told.flush()


@dataclasses.dataclass
class Worker:
    """A peer that is loaded."""

    spec: PeerSpec
    version: str = ""
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.load(**self.spec.settings)

    def load(self) -> None:
        """Loads what answers."""
        raise NotImplementedError

    def configure(self) -> None:
        """Changes how it decodes; takes no settings unless the kind has some."""

    def answer(self, asked: PeerPrompt) -> Reply:
        """Returns `tokens`, `seconds`, and what the target's `first` call gave: tokens, after `prefill_seconds`.

        `calls` of the target gave `counted` of the tokens. A first call that reads the prompt alone is not counted, and
        nor is its token.
        """
        raise NotImplementedError


class OwnWorker(Worker):
    """This library, plain or with a drafter."""

    def load(self, drafter: str | None = None, tree: str | None = None) -> None:
        """See `Worker`."""
        models = loading.load_models(self.spec.target, drafter=drafter, tree=tree)
        self.models = models
        self.version = importlib.metadata.version("jaxspec-decoding")
        self.about = {"tree": None if models.engine.tree is None else str(getattr(models.engine.tree, "spec", ""))}

    def answer(self, asked: PeerPrompt) -> Reply:
        """See `Worker`."""
        models, spec = self.models, self.spec
        settings = Settings(spec.budget, stop_ids=tuple(asked.stops))
        requests = make_requests([models.request(np.asarray(asked.tokens, np.int32), settings)])
        capacity, slots = sizes(models.engine, max(requests.tokens_BL.shape[1], spec.longest), spec.budget)
        started = time.perf_counter()
        state = run_prefill(models.engine, models.weights, requests, capacity, slots)
        state.root_B.block_until_ready()
        between = time.perf_counter()
        (answer,) = collect(run_rounds(models.engine, models.weights, state, NO_LIMIT))
        return _reply(answer, between - started, time.perf_counter() - started)


def _reply(answer: Answer, prefill: float, seconds: float) -> Reply:
    tokens = answer.tokens.tolist()
    counts = {"first": 1, "calls": answer.calls, "counted": len(tokens) - 1}
    return {"tokens": tokens, "seconds": seconds, "prefill_seconds": prefill, **counts}


class FirstChunk:
    """A streamer of transformers, which gets the prompt, and then the tokens of every target call in one chunk.

    It keeps the number of `tokens` that the first call gave, and `at`, the time when they were there.
    """

    def __init__(self) -> None:
        self.chunks = self.tokens = 0
        self.at = 0.0

    def put(self, value: Any) -> None:
        """Takes a chunk."""
        self.chunks += 1
        if self.chunks == 2:
            self.tokens, self.at = value.numel(), time.perf_counter()

    def end(self) -> None:
        """Takes the end of an answer."""


class TransformersWorker(Worker):
    """`transformers`: plain, with an assistant (`assistant`, a folder), or with prompt lookup (`lookup` tokens)."""

    def load(self, assistant: str | None = None, lookup: int | None = None, ngram: int = 2) -> None:
        """See `Worker`."""
        import torch
        import transformers

        torch.set_num_threads(self.spec.threads)
        self.version = f"{importlib.metadata.version('transformers')}, torch {importlib.metadata.version('torch')}"
        self.torch, self.options = torch, {}
        self.model: Any = self._read(transformers, self.spec.target)
        if assistant is not None:
            self.assistant: Any = self._read(transformers, assistant, target=self.spec.target)
            self._compare_sizes(assistant)
            self.options["assistant_model"] = self.assistant
            self.own = {name: getattr(self.assistant.generation_config, name, None) for name in ASSISTANT.values()}
            # With scikit-learn the threshold adapts, so results depend on a package that need not be there.
            self.about = {"scikit_learn": importlib.util.find_spec("sklearn") is not None, **self.own}
        if lookup is not None:
            self.options |= {"prompt_lookup_num_tokens": lookup, "max_matching_ngram_size": ngram}
        # `generate` fills what its settings leave open from the model's own, such as penalties.
        self.model.generation_config = transformers.GenerationConfig()
        self.calls = 0
        self.model.register_forward_hook(self._count)

    def _read(self, transformers: Any, name: str, *, target: str | None = None) -> Any:
        with readable_folder(name, target=target) as folder:
            return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=self.torch.float32).eval()

    def _compare_sizes(self, name: str) -> None:
        theirs, ours = (model.config.get_text_config().vocab_size for model in (self.assistant, self.model))
        if theirs != ours:
            raise ValueError(f"{name}: scores {theirs:,} tokens, and the target {ours:,}: it is for another target")

    def configure(self, **settings: Any) -> None:
        """Sets `tokens` and `threshold` of the assistant; those that are not given are the library's own."""
        # They stand in the assistant's own settings; as arguments of `generate` they would have no effect.
        for short, name in ASSISTANT.items() if "assistant_model" in self.options else ():
            setattr(self.assistant.generation_config, name, settings.get(short, self.own[name]))

    def _count(self, *_: Any) -> None:
        """Notes a call of the target."""
        self.calls += 1

    def answer(self, asked: PeerPrompt) -> Reply:
        """See `Worker`. The target's first call counts, for it checks drafts together with the prompt."""
        import transformers

        torch = self.torch
        config = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=self.spec.budget,
            eos_token_id=asked.stops,
            pad_token_id=asked.stops[0],
        )
        tokens = torch.tensor([asked.tokens])
        asking = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "generation_config": config}
        first = FirstChunk()
        self.calls = 0
        started = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(**asking, **self.options, streamer=first)
        seconds = time.perf_counter() - started
        new = cut(out[0, len(asked.tokens) :].numpy()[: self.spec.budget], asked.stops)
        return {
            "tokens": new.tolist(),
            "seconds": seconds,
            "prefill_seconds": first.at - started,
            "first": min(first.tokens, len(new)),
            "calls": self.calls,
            "counted": len(new),
        }


class LlamaCppWorker(Worker):
    """llama.cpp by `llama-cpp-python`, on a GGUF file."""

    def load(self) -> None:
        """See `Worker`."""
        llama_cpp = importlib.import_module("llama_cpp")
        if not Path(self.spec.target).is_file():
            raise ValueError(f"{self.spec.target}: no such GGUF file")
        self.version = importlib.metadata.version("llama-cpp-python")
        self.model: Any = llama_cpp.Llama(
            self.spec.target,
            n_ctx=self.spec.longest + self.spec.budget + 8,
            n_threads=self.spec.threads,
            n_threads_batch=self.spec.threads,
            # Its caches are fp16 otherwise, and ours are fp32.
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )

    def answer(self, asked: PeerPrompt) -> Reply:
        """See `Worker`."""
        self.model.reset()
        found: list[int] = []
        started = first = time.perf_counter()
        for token in self.model.generate(asked.tokens, temp=0.0, top_k=1, repeat_penalty=1.0):
            if not found:
                first = time.perf_counter()
            found.append(int(token))
            if token in asked.stops or len(found) == self.spec.budget:
                break
        seconds = time.perf_counter() - started
        counts = {"first": 1, "calls": len(found) - 1, "counted": len(found) - 1}
        return {"tokens": found, "seconds": seconds, "prefill_seconds": first - started, **counts}


KINDS: dict[str, Callable[[PeerSpec], Worker]] = {
    "jaxspec": OwnWorker,
    "transformers": TransformersWorker,
    "llama.cpp": LlamaCppWorker,
}
"""The kinds of peers."""
