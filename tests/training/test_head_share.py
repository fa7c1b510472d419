"""The note of `jaxspec train` and `jaxspec compare` where the LM head is most of what a drafter reads for a draft."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxspec.checkpoints.models import save_drafter
from jaxspec.config import load
from jaxspec.drafters import DraftLM, DraftLMConfig
from jaxspec.targets.decoder import LlamaConfig
from jaxspec.training import head_share
from jaxspec.training.head_share import Reads, drafter_reads, vocab_note

SMALL, LARGE = (LlamaConfig(vocab, 32, 7, 4, 2, 8, 64) for vocab in (100, 4000))
LAYER = 32 * 8 * 8 + 32 * 32 + 3 * 32 * 64
"""Matrices of a drafter's layer."""


@pytest.fixture(autouse=True)
def shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, LlamaConfig]:
    """The target's shape, which a test may change; the working directory is empty."""
    found = {"shape": LARGE}
    monkeypatch.setattr(head_share, "read_config", lambda _: found["shape"])
    monkeypatch.chdir(tmp_path)
    return found


def test_what_is_read_is_the_head_that_is_scored_with_and_the_matrices_of_the_rest():
    for name, head, matrices in (
        ("eagle2", 4000 * 32, LAYER + 64 * 32),
        ("medusa", 5 * 4000 * 32, 5 * 32 * 32),
        ("eagle3", 4000 * 32, LAYER + 32 * 8 * 8 + 3 * 32 * 32),
    ):
        reads = drafter_reads(load(name), LARGE)
        assert reads is not None and reads.head == head and matrices <= reads.rest < matrices + 500, name


@pytest.mark.parametrize("name", ["eagle2", "best", "eagle3", "medusa", "parallelspec_eagle"])
def test_a_dominant_head_is_told_with_the_commands_that_make_it_less(name: str):
    note = vocab_note(load(name, ["target=tiny", "data.train=a.jsonl:2,b.jsonl:1"]), "draft_vocab=")
    assert note is not None and f"% of the weights that {name} reads for a draft are the LM head's, over 4,000" in note
    assert "jaxspec draft-vocab a.jsonl --target tiny --size 1000 --out vocab.safetensors, then draft_vocab=" in note


def test_the_saving_is_that_of_the_whole_drafter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head_share, "drafter_reads", lambda *_: Reads(800, 200))
    note = vocab_note(load("eagle2"), "--draft-vocab ")
    assert note is not None and "80% of the weights" in note and "reads 2.5 times fewer" in note
    assert note.endswith("then --draft-vocab vocab.safetensors")


def test_nothing_is_said_where_it_would_not_help(shape: dict[str, LlamaConfig], tmp_path: Path):
    config = load("eagle2")
    assert vocab_note(config, "") is not None
    assert vocab_note(dataclasses.replace(config, draft_vocab="v.safetensors"), "") is None
    lm = DraftLM(DraftLMConfig(4000, 8, 1, 2, 1, 4, 16))
    weights: Any = jax.jit(lm.init_params)(jax.random.key(0))
    save_drafter(tmp_path / "lm", "draft_lm", lm, weights)
    assert vocab_note(load("draft_lm_kld", [f"init_from={tmp_path / 'lm'}"]), "") is None
    assert vocab_note(load("draft_lm_kld", ["init_from=nowhere"]), "") is None  # its training says so
    (tmp_path / "runs/eagle2/100").mkdir(parents=True)  # begun, and resumed as it is
    assert vocab_note(config, "") is None
    assert vocab_note(load("hass"), "") is not None
    shape["shape"] = SMALL
    assert vocab_note(load("hass"), "") is None
