"""Rotary fields of a config.json mean what they mean to transformers, wherever they stand and whatever wins."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxspec.interchange.hf_config import read_config
from jaxspec.nn.rope import rope_frequencies
from jaxspec.targets.decoder import LlamaConfig

SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT, LONG = [1.0 + i / 10 for i in range(8)], [2.0 + i for i in range(8)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": LINEAR,
    "dynamic": DYNAMIC,
    "yarn": {**YARN, "original_max_position_embeddings": 32},
    "yarn, mscale": {**YARN, "original_max_position_embeddings": 32, "mscale": 0.8, "mscale_all_dim": 0.5},
    "yarn, every field": {
        **YARN, "original_max_position_embeddings": 32, "attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2,
        "truncate": False,
    },
    "llama3": {**LLAMA3, "original_max_position_embeddings": 32},
    "longrope": {**LONGROPE, "original_max_position_embeddings": 32},
    "longrope, factor": {**LONGROPE, "original_max_position_embeddings": 32, "factor": 3.0, "attention_factor": 1.5},
}  # fmt: skip


def old(kind: dict[str, Any]) -> dict[str, Any]:
    """The fields of a kind with the older name of its type."""
    return {"type" if name == "rope_type" else name: value for name, value in kind.items()}


PLACES: dict[str, dict[str, Any]] = {}
"""Name -> rotary fields of a Llama's config.json."""
for name, kind in KINDS.items():
    PLACES |= {
        f"{name}: rope_parameters": {"rope_parameters": {"rope_theta": 5e5, **kind}},
        f"{name}: rope_scaling, theta beside it": {"rope_theta": 5e5, "rope_scaling": kind},
        f"{name}: rope_scaling, theta in it": {"rope_scaling": {"rope_theta": 5e5, **kind}},
        f"{name}: rope_scaling by its older name": {"rope_theta": 5e5, "rope_scaling": old(kind)},
        f"{name}: rope_parameters by its older name": {"rope_parameters": {"rope_theta": 5e5, **old(kind)}},
        f"{name}: both": {"rope_theta": 5e5, "rope_scaling": kind, "rope_parameters": {"rope_theta": 5e5, **kind}},
        f"{name}: rope_parameters, theta beside it": {"rope_theta": 5e5, "rope_parameters": kind},
        f"{name}: no theta": {"rope_parameters": kind},
    }
TOP = {"original_max_position_embeddings": 32}
PLACES |= {
    "nothing": {},
    "theta alone": {"rope_theta": 5e5},
    "empty rope_scaling": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 5e5, **LINEAR}},
    "null rope_scaling": {"rope_scaling": None, "rope_parameters": {"rope_theta": 5e5, **LINEAR}},
    "null theta beside it": {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, **LINEAR}},
    "null rope_parameters": {"rope_theta": 5e5, "rope_parameters": None, "rope_scaling": LINEAR},
    "yarn: original length at the top": {"rope_scaling": YARN, **TOP},
    "yarn: original length at the top, rope_parameters": {"rope_parameters": {"rope_theta": 5e5, **YARN}, **TOP},
    "yarn: original length in both places": {"rope_scaling": {**YARN, **TOP}, **TOP},
    "yarn: no original length": {"rope_scaling": YARN},
    "yarn: null factor": {"rope_scaling": {**YARN, "factor": None, **TOP}},
    "llama3: original length at the top": {"rope_theta": 5e5, "rope_scaling": LLAMA3, **TOP},
    "llama3: no original length": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "longrope: original length at the top": {"rope_scaling": LONGROPE, **TOP},
    "longrope: no original length": {"rope_scaling": LONGROPE},
}
SU = {"type": "su", "short_factor": SHORT, "long_factor": LONG}
HALF = {"short_factor": SHORT[:4], "long_factor": LONG[:4]}
PHI3: dict[str, dict[str, Any]] = {
    "nothing": {},
    "yarn": {"rope_scaling": {**SU, "type": "yarn"}, **TOP},
    "longrope": {"rope_scaling": {**SU, "type": "longrope"}, **TOP},
    "rope_parameters": {"rope_parameters": {**LONGROPE, **TOP, "rope_theta": 5e5}, **TOP},
    "default original length": {"rope_scaling": {**SU, "type": "longrope"}, "max_position_embeddings": 131072},
    "part beside it": {"partial_rotary_factor": 0.5, "rope_scaling": {**LONGROPE, **HALF}, **TOP},
    "part in it": {"rope_parameters": {**LONGROPE, **HALF, **TOP, "partial_rotary_factor": 0.5}, **TOP},
    "part alone": {"partial_rotary_factor": 0.5},
    "part in rope_parameters alone": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
}
SLIDING = {"sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
GEMMA3: dict[str, dict[str, Any]] = {
    "nothing": {},
    "top level": {"rope_theta": 5e5, "rope_local_base_freq": 3e4, "rope_scaling": LINEAR},
    "per kind": {"rope_parameters": {"full_attention": {"rope_theta": 5e5, **LINEAR}, **SLIDING}},
    "one kind": {"rope_parameters": {"full_attention": {"rope_theta": 5e5, **LINEAR}}},
    "other kind": {"rope_parameters": SLIDING},
    "theta beside them": {"rope_theta": 5e5, "rope_parameters": {"full_attention": LINEAR, **SLIDING}},
    "local theta beside them": {
        "rope_local_base_freq": 3e4,
        "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}},
    },
    "merged": {"rope_scaling": LINEAR, "rope_parameters": {"full_attention": {"rope_theta": 5e5}, **SLIDING}},
    "yarn": {"rope_parameters": {"full_attention": {"rope_theta": 5e5, **YARN}, **SLIDING}},
    "a flat one that says nothing else": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
PLACES_OF = {"llama": PLACES, "qwen2": PLACES, "phi3": PHI3, "gemma3_text": GEMMA3}
CASES = [(family, name) for family, found in PLACES_OF.items() for name in found]
ROTARY = {
    "llama": "llama.modeling_llama.LlamaRotaryEmbedding",
    "qwen2": "qwen2.modeling_qwen2.Qwen2RotaryEmbedding",
    "phi3": "phi3.modeling_phi3.Phi3RotaryEmbedding",
    "gemma3_text": "gemma3.modeling_gemma3.Gemma3RotaryEmbedding",
}


def written(folder: Path, family: str, fields: dict[str, Any]) -> Path:
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3_text" else {}
    (folder / "config.json").write_text(json.dumps({"model_type": family, **SMALL, **kinds, **fields}))
    return folder


def theirs(folder: Path, family: str, length: int) -> list[tuple[np.ndarray, float]]:
    """Frequencies and amplitude in transformers for a text of `length`, of each kind of layers."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    transformers.logging.set_verbosity_error()
    module, _, name = ROTARY[family].rpartition(".")
    made = getattr(__import__(f"transformers.models.{module}", fromlist=[name]), name)
    rotary = made(transformers.AutoConfig.from_pretrained(folder))
    x, positions = torch.zeros(1, length, 1), torch.arange(length)[None]
    if family != "gemma3_text":
        rotary(x, positions)
        return [(rotary.inv_freq.numpy(), float(rotary.attention_scaling))]
    found = []
    for kind in ("full_attention", "sliding_attention"):
        rotary(x, positions, kind)
        found.append((getattr(rotary, f"{kind}_inv_freq").numpy(), getattr(rotary, f"{kind}_attention_scaling")))
    return found


def ours(config: LlamaConfig, length: int) -> list[tuple[np.ndarray, float]]:
    """The same of a config, as `targets.decoder.view` takes them."""
    scaling, local = config.rope_scaling, config.options.local_theta
    channels = config.options.rotary or config.head_dim
    found = np.asarray(rope_frequencies(channels, config.rope_theta, scaling, length))
    whole = [(found, 1.0 if scaling is None else scaling.amplitude)]
    return whole if local is None else [*whole, (np.asarray(rope_frequencies(channels, local)), 1.0)]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_frequencies_are_those_of_transformers_wherever_the_fields_stand(family: str, name: str, tmp_path: Path):
    folder = written(tmp_path, family, copy.deepcopy(PLACES_OF[family][name]))
    config = read_config(folder)
    for length in (20, 140):  # below and above the lengths that scalings go by
        expected = theirs(folder, family, length)
        for (found, amplitude), (wanted, factor) in zip(ours(config, length), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=2e-6)
            assert amplitude == pytest.approx(factor, rel=1e-6)


def test_the_oldest_name_of_longrope_is_read_too(tmp_path: Path):
    """transformers 5.24 itself fails on it."""
    newer = read_config(written(tmp_path, "phi3", PHI3["longrope"]))
    assert read_config(written(tmp_path, "phi3", {"rope_scaling": SU, **TOP})) == newer


CONTRADICTIONS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, ["rope_theta", "500000", "10000"]),
    ("llama", {"rope_theta": 1e4, "rope_scaling": {**LINEAR, "rope_theta": 5e5}}, ["rope_theta", "500000", "10000"]),
    # transformers takes the default base, 10000, as soon as rope_scaling is set
    ("qwen2", {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6}}, ["rope_theta", "1000000", "10000"]),
    ("llama", {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, ["'linear'", "'default'"]),
    ("llama", {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 2}}, ["factor", "4.0", "2"]),
    ("llama", {"rope_scaling": {**LINEAR, "type": "dynamic"}}, ["'linear'", "'dynamic'"]),
    ("llama", {"rope_scaling": {**YARN, **TOP}, "original_max_position_embeddings": 64}, ["original_max", "32", "64"]),
    ("phi3", {"rope_scaling": {**SU, **TOP}}, ["original_max_position_embeddings", "32", "4096"]),
    (
        "phi3",
        {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        ["partial_rotary_factor", "0.5", "0.25"],
    ),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6, **LINEAR}}, ["rope_parameters", "'linear'", "'default'"]),
    (
        "gemma3_text",
        {"rope_local_base_freq": 3e4, "rope_parameters": SLIDING},
        ["rope_local_base_freq", "30000", "20000"],
    ),
    (
        "gemma3_text",
        {"rope_theta": 1e4, "rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
        ["rope_theta", "500000", "10000"],
    ),
]


@pytest.mark.parametrize(("family", "fields", "words"), CONTRADICTIONS)
def test_places_that_contradict_each_other_are_named_in_one_sentence(
    family: str, fields: dict[str, Any], words: list[str], tmp_path: Path
):
    with pytest.raises(ValueError) as caught:
        read_config(written(tmp_path, family, fields))
    told = str(caught.value)
    assert all(word in told for word in [*words, "config.json", "contradict"]) and "\n" not in told
