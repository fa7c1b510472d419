"""The flags that verbs share, as frozen dataclasses for `cli.parse`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxspec.base import DraftMode
from jaxspec.serving.queue import SEEDS, Settings
from jaxspec.verify import rule_named

RuleName = Literal[
    "target-draw", "recursive-rejection", "specinfer", "speculative-sampling", "block", "traversal", "typical"
]
"""The names of `verify.RULES`, for the command line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of every verb that decodes; each adds its own."""

    target: str = "tiny"
    """HuggingFace folder of a Llama-family model; `tiny` is the one that comes with jaxspec."""
    template: str | None = None
    """Chat template: vicuna, llama-2-chat, llama-3, chatml, or a file of Jinja. Default: the target folder's own."""
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
        """ValueError naming the first of `flags`, or of these, that is given although nothing is drafted."""
        given = {**flags, "rule": self.rule, "draft-vocab": self.draft_vocab, "draft-mode": self.draft_mode != "topk"}
        for name, value in given.items():
            if value:
                raise ValueError(f"--{name} needs a --drafter, for plain decoding drafts nothing")

    @property
    def settings(self) -> Settings:
        """How answers are drawn."""
        return dataclasses.replace(super().settings, draft_temperature=self.draft_temperature)


def parse_part(text: str) -> tuple[int, int]:
    """Which shard of how many `--shard i/n` says. ValueError for any other form."""
    words = text.split("/")
    if len(words) == 2 and all(w.isdecimal() for w in words) and int(words[0]) < int(words[1]):
        return int(words[0]), int(words[1])
    raise ValueError(f"--shard is {text!r}; it must be i/n with i below n, from 0/4 to 3/4 for four shards")
