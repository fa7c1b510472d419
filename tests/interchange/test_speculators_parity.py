"""Exported heads in the package `speculators` itself, and dumped hidden states that it reads too.

It has an environment of its own, since it wants other versions of transformers than we do: `python -m venv DIR &&
DIR/bin/pip install speculators==0.9.0`, without torchvision where that is not the torch's own, and then
`JAXSPEC_SPECULATORS=DIR/bin/python python -m pytest -m slow tests/interchange/test_speculators_parity.py`.
"""

import os
import re
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from dump_toys import answered_texts, write_normed_target
from random_models import SIZE, write_target
from safetensors.numpy import load_file
from test_published import HEADS, LAYERS, SERVED, WIDTH, head

from jaxspec.__main__ import main
from jaxspec.base import SharedTables, UnrollInputs
from jaxspec.data.feature_store import FeatureStore
from jaxspec.data.tokenized_corpus import StoredCorpus
from jaxspec.drafters import DRAFTERS
from jaxspec.interchange.export import write

KINDS = [kind for kind, servers in SERVED.items() if "speculators" in servers]
ROWS, STEPS = 9, 3
AXES = {"tokens": "L", "mask": "L", "states": "LND", "features": "LD"}
"""Fields of a text of `dump_toys`, without and with their axes."""


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter that has speculators."""
    found = os.environ.get("JAXSPEC_SPECULATORS")
    if not found:
        pytest.fail("set JAXSPEC_SPECULATORS to the python of an environment that has speculators==0.9.0")
    return found


@pytest.fixture(scope="module")
def drafted(python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a kind, with its inputs and what speculators makes of them, of all kinds in one process."""
    folder, draw = tmp_path_factory.mktemp("heads"), np.random.default_rng(7)
    target = write_target(folder / "target", layers=LAYERS)
    for kind in KINDS:
        write("speculators", folder / kind, head(kind), str(target))
        features = draw.normal(size=(ROWS, 3 * WIDTH)).astype(np.float32)
        np.savez(folder / kind / "inputs.npz", input_ids=draw.integers(0, SIZE, ROWS), hidden_states=features)
    program = Path(__file__).resolve().parents[1] / "speculators_drafts.py"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([python, program, *(folder / kind for kind in KINDS)], check=True, env=environment)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_head_drafts_in_speculators_as_here(kind: str, drafted: Path):
    given, theirs = np.load(drafted / kind / "inputs.npz"), np.load(drafted / kind / "logits.npz")
    name, config, _ = HEADS[kind]
    embed = jnp.asarray(load_file(drafted / kind / "model.safetensors")["embed_tokens.weight"])
    module, shared, params = DRAFTERS[name].module(config), SharedTables(embed, embed), head(kind).params
    # Ours is given a token and the feature of the one before in one row, theirs each token with what it is paired with.
    tokens, at = np.append(0, given["input_ids"]), jnp.arange(ROWS + 1)[None]
    features = np.append(given["hidden_states"], np.zeros((1, 3 * WIDTH), np.float32), axis=0)
    mask = jnp.tril(jnp.ones((1, ROWS + 1, ROWS + 1), bool))
    rows = UnrollInputs(jnp.asarray(tokens[None]), jnp.asarray(features[None]), at, mask)
    out = module.unroll(params, shared, rows, STEPS)
    ours = np.stack([module.logits(params, shared, out.hidden_TBLD[j], j)[0] for j in range(STEPS)])
    if name == "peagle":
        real = theirs["anchor"] >= 0  # at depth 1 they may draw a group in front of the text
        depth, anchor = theirs["depth"][real], theirs["anchor"][real]
        assert set(depth) == set(range(STEPS))
        np.testing.assert_allclose(ours[depth, anchor], theirs["logits"][real], atol=1e-4, rtol=1e-4)
        return
    for j in range(STEPS):  # behind the last token they read zeros
        np.testing.assert_allclose(ours[j, : ROWS - j], theirs["logits"][j, : ROWS - j], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_dump_that_speculators_reads_is_imported_as_it_reads_it(python: str, tmp_path: Path):
    """And its target's loss from torch's own pickles is that from the dump."""
    target = write_normed_target(tmp_path / "target")
    texts = answered_texts(target, 12)
    named = {name: [getattr(text, f"{name}_{axes}") for text in texts] for name, axes in AXES.items()}
    np.savez(tmp_path / "texts.npz", **{f"{name}_{i}": a for name, all in named.items() for i, a in enumerate(all)})
    program = Path(__file__).resolve().parents[1] / "speculators_dumps.py"
    subprocess.run([python, program, tmp_path], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    theirs, found = np.load(tmp_path / "read.npz"), {}
    for name in ("dump", "files"):
        out = tmp_path / f"{name}_out"
        words = [str(tmp_path / name), str(out), "--target", str(target), "--recompute", "yes"]
        assert main(["import", "features", *words]) == 0
        store = FeatureStore(out)
        for part in ("train", "eval"):
            corpus = StoredCorpus(out / part)
            for id, place in zip(corpus.ids, store.find(corpus), strict=True):
                number = int(re.findall(r"\d+", id)[-1])
                document = corpus.read([list(corpus.ids).index(id)])[0]
                found[name, number] = document, store.read([int(place)], ["features", "taps"])[0]
    assert len(found) == 2 * len(texts)
    for (_, number), (document, record) in found.items():
        np.testing.assert_array_equal(document.tokens, theirs[f"input_ids_{number}"])
        np.testing.assert_array_equal(document.assistant_mask, theirs[f"loss_mask_{number}"] != 0)
        np.testing.assert_array_equal(record["taps"].astype(np.float32), theirs[f"hidden_states_{number}"])
        features = record["features"].astype(np.float32)
        np.testing.assert_allclose(features, texts[number].features_LD, rtol=2e-2, atol=2e-2)
