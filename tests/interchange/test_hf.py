"""HuggingFace Llama folders: what config.json means, that weights survive the trip, and what is refused."""

import contextlib
import json
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxspec.interchange import hf_layout
from jaxspec.interchange import tensors as files
from jaxspec.interchange.hf import load_target, read_llama, write_llama
from jaxspec.interchange.hf_config import read_config
from jaxspec.interchange.hf_layout import tensor_shapes, weight_shapes
from jaxspec.nn.rope import RopeScaling
from jaxspec.parallel.mesh import make_mesh, shardings
from jaxspec.targets.decoder import LlamaConfig, unstack

SMALL = LlamaConfig(
    vocab=48, width=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp=24, bos_id=1, eos_ids=(2, 7), pad_id=0
)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
MINIMAL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3_FIELDS = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def made(config: LlamaConfig, *, stacked: bool = False, seed: int = 0) -> Any:
    """Random fp32 weights of this config, norms included."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.standard_normal(a.shape, np.float32), weight_shapes(config, stacked))


def assert_same(left: Any, right: Any) -> None:
    left, right = unstack(left), unstack(right)
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def config_of(folder: Path, generation: dict[str, Any] | None = None, **fields: Any) -> LlamaConfig:
    """Returns the shape that `read_config` reads from a minimal config.json with these fields; None removes one."""
    raw = {name: value for name, value in {**MINIMAL, **fields}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_config(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in fp32 that `read_llama` loads."""
    write_llama(tmp_path, made(SMALL), SMALL, dtype="float32")
    return tmp_path


def rewrite(folder: Path, change: Any) -> None:
    """Change the dict of stored tensors of a folder in place."""
    stored = dict(load_file(folder / "model.safetensors"))
    change(stored)
    save_file(stored, folder / "model.safetensors")


def split(folder: Path) -> None:
    """Turn a folder's weights into two shards with an index."""
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(stored))}
    for shard in set(names.values()):
        save_file({name: stored[name] for name in names if names[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


# ---- config.json


def test_absent_fields_mean_what_they_mean_to_transformers(tmp_path: Path):
    assert config_of(tmp_path) == LlamaConfig(
        vocab=48, width=16, layers=2, heads=4, kv_heads=4, head_dim=4, mlp=24, norm_eps=1e-6, bos_id=1, eos_ids=(2,)
    )


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4}}, 1e6, RopeScaling("linear", 4.0)),
        (
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 4}},
            1e6,
            RopeScaling("linear", 4.0),
        ),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_FIELDS}, 5e5, LLAMA3),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3_FIELDS}}, 5e5, LLAMA3),
    ],
)
def test_both_generations_of_rotary_fields_are_read(tmp_path: Path, fields: Any, theta: float, scaling: Any):
    config = config_of(tmp_path, **fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("generation", "fields", "expected"),
    [
        (None, {"eos_token_id": 5}, (5,)),
        (None, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": [9, 5]}, {"eos_token_id": 5}, (9, 5)),
        ({"eos_token_id": 9}, {"eos_token_id": [5, 6]}, (9,)),
        ({"temperature": 0.6}, {"eos_token_id": 5}, (5,)),
    ],
)
def test_stop_ids_of_the_generation_config_win(tmp_path: Path, generation: Any, fields: Any, expected: Any):
    assert config_of(tmp_path, generation, **fields).eos_ids == expected


def test_a_negative_pad_id_means_none(tmp_path: Path):
    assert config_of(tmp_path, pad_token_id=-1).pad_id is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, ["GPT2LMHeadModel", "supported"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", "supported"]),
        ({"architectures": None, "model_type": None}, ["architectures", "model_type"]),
        ({"hidden_size": None}, ["hidden_size", "config.json"]),
        ({"num_hidden_layers": "two"}, ["num_hidden_layers", "'two'"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"hidden_size": 18}, ["hidden_size=18", "head_dim"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps", "-1"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>"]),
        ({"rope_scaling": {"type": "ntk", "factor": 2}}, ["rope_scaling", "'ntk'", "'linear'", "'dynamic'"]),
        ({"rope_parameters": {"rope_type": "proportional"}}, ["rope_parameters", "'proportional'", "'llama3'"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "factor"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["rope_parameters", "full_attention"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
    ],
)
def test_a_config_that_is_not_supported_is_refused_in_one_sentence(tmp_path: Path, fields: Any, words: list[str]):
    with pytest.raises(ValueError) as caught:
        config_of(tmp_path, **fields)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_missing_or_broken_config_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)


# ---- weights


@st.composite
def configs(draw: Any) -> LlamaConfig:
    kv_heads = draw(st.integers(1, 3))
    scaling = draw(st.sampled_from([None, RopeScaling("linear", 2.0), LLAMA3]))
    return LlamaConfig(
        vocab=draw(st.integers(3, 30)),
        width=draw(st.integers(1, 9)),
        layers=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 3)),
        mlp=draw(st.integers(1, 9)),
        rope_theta=draw(st.floats(1.0, 1e7)),
        rope_scaling=scaling,
        norm_eps=draw(st.floats(1e-8, 1e-3)),
        tied=draw(st.booleans()),
        bos_id=draw(st.none() | st.integers(0, 9)),
        eos_ids=tuple(draw(st.lists(st.integers(0, 9), max_size=3, unique=True))),
        pad_id=draw(st.none() | st.integers(0, 9)),
    )


@settings(max_examples=15, deadline=None)
@given(config=configs(), seed=st.integers(0, 9), stacked=st.tuples(st.booleans(), st.booleans()))
def test_writing_then_reading_is_exact(tmp_path_factory: Any, config: LlamaConfig, seed: int, stacked: Any):
    params = made(config, stacked=stacked[0], seed=seed)
    folder = tmp_path_factory.mktemp("model")
    write_llama(folder, params, config, dtype="float32")
    module, back = read_llama(folder, dtype=jnp.float32, stacked=stacked[1])
    assert module.config == config and module.stacked == stacked[1]
    assert_same(params, back)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_weights_are_cast_once(tmp_path: Path, stored: str, wanted: Any):
    params = made(SMALL)
    write_llama(tmp_path, params, SMALL, dtype=stored)
    loaded = load_target(tmp_path, dtype=wanted)
    assert loaded.module.dtype == wanted and loaded.config == SMALL
    assert_same(jax.tree.map(lambda a: a.astype(stored).astype(wanted), params), loaded.params)


def test_parameters_may_be_wider_than_activations(folder: Path):
    module, params = read_llama(folder, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert module.dtype == jnp.bfloat16 and params["embed"].dtype == module.param_dtype == jnp.float32


def test_shards_equal_the_single_file(folder: Path):
    _, single = read_llama(folder, dtype=jnp.float32)
    split(folder)
    assert_same(single, read_llama(folder, dtype=jnp.float32)[1])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_a_sharded_read_equals_the_single_device_read(folder: Path, sizes: Any, stacked: bool):
    _, single = read_llama(folder, dtype=jnp.float32, stacked=stacked)
    mesh = make_mesh(*sizes)
    _, spread = read_llama(folder, dtype=jnp.float32, stacked=stacked, mesh=mesh)
    assert jax.tree.map(lambda a: a.sharding, spread) == shardings(mesh, single)
    assert_same(single, spread)
    flat = zip(jax.tree.leaves(single), jax.tree.leaves(spread), strict=True)
    for whole, array in flat:
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(whole)[shard.index], np.asarray(shard.data))


def test_a_mesh_that_does_not_divide_the_weights_is_refused(folder: Path):
    with pytest.raises(ValueError, match="`out` of shape"):
        read_llama(folder, dtype=jnp.float32, mesh=make_mesh(2, 1, 4))


def traced_peak(action: Any) -> int:
    """Greatest host memory that Python and numpy held during an action; arrays on devices are not counted."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# 21 MB, of which the largest weight takes 2 MB (16 MB stacked over the layers).
LARGE = LlamaConfig(vocab=512, width=256, layers=8, heads=8, kv_heads=2, head_dim=32, mlp=1024, eos_ids=(2,))
LARGEST = 4 * 256 * 2 * 1024
SLACK = 2**19  # bytes for names, headers, handles and one copied piece


def zeros(stacked: bool) -> Any:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), weight_shapes(LARGE, stacked))


@pytest.fixture(scope="module")
def large(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("large")
    write_llama(folder, zeros(False), LARGE, dtype="float32")
    assert (folder / "model.safetensors").stat().st_size > 8 * LARGEST
    return folder


def empty_unaligned(shape: list[int], dtype: Any) -> np.ndarray:
    """Returns an empty array at an address that is no multiple of 64."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = (16 - raw.ctypes.data) % 64
    return raw[start : start + size].view(dtype).reshape(shape)


@pytest.fixture
def copied_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses buffers that a CPU device cannot take over, so that it copies them as any other device does."""
    monkeypatch.setattr(hf_layout, "np", SimpleNamespace(empty=empty_unaligned, ndarray=np.ndarray))
    monkeypatch.setattr(files, "CHUNK_BYTES", 2**17)


@pytest.mark.usefixtures("copied_blocks")
@pytest.mark.parametrize(
    ("options", "held"),
    [({}, LARGEST), ({"stacked": True}, 8 * LARGEST), ({"mesh": (1, 4, 2)}, LARGEST / 8)],
    ids=["a weight", "a stacked weight", "a device's block"],
)
def test_reading_holds_one_weight_on_the_host(large: Path, options: Any, held: float):
    if "mesh" in options:
        options = {"mesh": make_mesh(*options["mesh"])}
    assert traced_peak(lambda: read_llama(large, dtype=jnp.float32, **options)) < held + SLACK


@pytest.mark.parametrize("stacked", [False, True])
def test_writing_holds_one_weight_on_the_host(tmp_path: Path, stacked: bool):
    params = zeros(stacked)
    assert traced_peak(lambda: write_llama(tmp_path, params, LARGE)) < LARGEST + SLACK


# ---- refusals


def without(name: str) -> Any:
    return lambda stored: stored.pop(name)


def replaced(name: str, array: np.ndarray) -> Any:
    return lambda stored: stored.__setitem__(name, array)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), ["model.layers.1.mlp.up_proj.weight", "no tensor"]),
        (without("lm_head.weight"), ["lm_head.weight", "no tensor"]),
        (replaced("model.norm.weight", np.ones(7, np.float32)), ["model.norm.weight", "(7,)", "(16,)"]),
        (replaced("model.norm.weight", np.ones(16, np.int8)), ["model.norm.weight", "I8", "BF16"]),
        (replaced("model.layers.0.self_attn.q_proj.bias", np.ones(24, np.float32)), ["q_proj.bias"]),
        (replaced("model.layers.2.mlp.up_proj.weight", np.ones((24, 16), np.float32)), ["model.layers.2.mlp"]),
    ],
)
def test_a_tensor_out_of_place_is_named(folder: Path, change: Any, words: list[str]):
    rewrite(folder, change)
    with pytest.raises(ValueError) as caught:
        read_llama(folder, dtype=jnp.float32)
    assert all(word in str(caught.value) for word in words)


def test_rotary_buffers_of_old_folders_are_ignored(folder: Path):
    _, before = read_llama(folder, dtype=jnp.float32)
    rewrite(folder, replaced("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(3, np.float32)))
    assert_same(before, read_llama(folder, dtype=jnp.float32)[1])


def test_a_tied_head_that_is_stored_again_is_ignored(tmp_path: Path):
    tied = LlamaConfig(vocab=9, width=4, layers=1, heads=1, kv_heads=1, head_dim=4, mlp=4, tied=True)
    write_llama(tmp_path, made(tied), tied, dtype="float32")
    rewrite(tmp_path, lambda stored: stored.update({"lm_head.weight": stored["model.embed_tokens.weight"]}))
    assert "head" not in read_llama(tmp_path, dtype=jnp.float32)[1]


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_truncated_file_is_named(folder: Path, cut: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupt"):
        read_llama(folder, dtype=jnp.float32)


def test_a_missing_shard_is_named(folder: Path):
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors"):
        read_llama(folder, dtype=jnp.float32)


def test_a_folder_without_weights_says_so(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        read_llama(folder, dtype=jnp.float32)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is no zip archive"):
        read_llama(folder, dtype=jnp.float32)


def test_weights_that_do_not_fit_the_config_are_not_written(tmp_path: Path):
    params = made(SMALL)
    params["layers"][1]["down"] = jnp.ones((3, 16))
    with pytest.raises(ValueError, match=r"layers/1/down has shape \(3, 16\)"):
        write_llama(tmp_path, params, SMALL)
    with pytest.raises(ValueError, match="head has shape absent"):
        write_llama(tmp_path, {k: v for k, v in made(SMALL).items() if k != "head"}, SMALL)
    with pytest.raises(ValueError, match="dtype='int8'"):
        write_llama(tmp_path, made(SMALL), SMALL, dtype="int8")
    assert not any(tmp_path.iterdir())


def chunks_of_a_full_disk() -> Iterator[bytes]:
    yield b"half"
    raise OSError("disk full")


def test_a_write_that_fails_leaves_the_old_file(folder: Path):
    path = folder / "model.safetensors"
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, chunks_of_a_full_disk())
    assert path.read_bytes() == before and not list(folder.glob(".*"))


def test_a_written_file_is_what_the_safetensors_library_reads(folder: Path):
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(files.safe_open(folder / "model.safetensors", framework="numpy"))
        assert file.metadata() == {"format": "pt"}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    assert shapes == tensor_shapes(SMALL)
