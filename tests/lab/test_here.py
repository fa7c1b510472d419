"""Trees for a drafter on this machine: found by acceptance and costs, measured by whoever asks, kept where they fit."""

from __future__ import annotations

import numpy as np
import pytest
from random_models import write_drafter, write_target

from jaxspec.decoding.generation import generate, generate_plain
from jaxspec.decoding.requests import Settings, make_requests
from jaxspec.lab import here
from jaxspec.lab.ranks import Text
from jaxspec.serving.loading import Models, load_models
from jaxspec.trees import AdaptiveTree, StaticTree


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("here")
    return load_models(str(write_target(folder / "target")), drafter=write_drafter(folder / "drafter"))


def test_trees_are_found_for_texts_and_all_of_them_write_the_plain_text(models: Models, monkeypatch):
    monkeypatch.setattr(here, "NODES", (1, 4))
    monkeypatch.setattr(here, "WIDTHS", (1, 2))
    monkeypatch.setattr(here, "REPEATS", 1)
    monkeypatch.setattr(here, "LOOKUP", 3)
    prompts = [np.arange(6 + i) % 50 + 10 for i in range(4)]
    requests = make_requests([models.request(p, Settings(24)) for p in prompts])
    plain = generate_plain(models.engine, models.weights, requests)
    texts = [Text(prompt, answer.tokens) for prompt, answer in zip(prompts, plain, strict=True)]
    told: list[str] = []
    found = here.trees_here(models, texts, tell=told.append)
    assert told[:2] == ["acceptance", "costs"] and told[-1] == "search"
    adaptive = [tree for tree in found.trees.values() if isinstance(tree, AdaptiveTree)]
    fixed = [tree for tree in found.trees.values() if isinstance(tree, StaticTree)]
    assert len(adaptive) == 2 and adaptive[1].lookup is not None and fixed
    assert all(tree.nodes <= 4 for tree in found.trees.values())
    assert found.choice.chosen.tree.spec in found.trees and "predicted to" in found.told
    for tree in found.trees.values():
        drafted = models.with_tree(tree)
        for a, b in zip(generate(drafted.engine, drafted.weights, requests), plain, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
