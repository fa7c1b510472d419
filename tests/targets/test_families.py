"""Every family of targets computes what transformers computes, and goes out to transformers as it came in."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.data.tokenizer_files import read_stop_ids
from jaxspec.interchange import export, tensors
from jaxspec.interchange.hf import load_target, read_llama
from jaxspec.interchange.hf_config import read_config
from jaxspec.nn import cache as kv
from jaxspec.nn.attention import causal_mask
from jaxspec.targets.families import FAMILIES
from jaxspec.targets.rope_places import ORIGINAL

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # tiny matrices; its threads would only contend with XLA's

TOLERANCE = 3e-4  # greatest fp32 logit error
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
}
GEMMA3_ROPE = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
UNCAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
PATTERN = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "tie_word_embeddings": False,
    "final_logit_softcapping": 5.0,
}
EXPERTS = {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
UPPER = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
VARIATIONS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "mistral window": {"sliding_window": 4, "head_dim": 12},
    "mistral llama3": {"sliding_window": None, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2 upper window, stacked": UPPER,
    "qwen2 yarn": {"rope_parameters": YARN},
    "qwen3": {"head_dim": 12},
    "qwen3 upper window, bias": {"head_dim": 8, "attention_bias": True, **UPPER},
    "qwen3 linear, stacked": {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": LINEAR},
    "phi3 window": {"sliding_window": 4},
    "phi3 partial": {"tie_word_embeddings": True, "rope_parameters": {"partial_rotary_factor": 0.5, **PLAIN}},
    "phi3 longrope, partial, stacked": {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE},
    "phi3 longrope, long texts": {"original_max_position_embeddings": 4, "rope_parameters": LONGROPE},
    "gemma2": {"head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 2.0},
    "gemma2 uncapped, bias, stacked": {"head_dim": 8, "sliding_window": 4, "attention_bias": True, **UNCAPPED},
    "gemma3": {"head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 10, "rope_parameters": GEMMA3_ROPE},
    "gemma3 pattern, untied, stacked": {"head_dim": 8, "sliding_window": 4, "num_hidden_layers": 3, **PATTERN},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral window, stacked": {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 4},
    "qwen3_moe": {**EXPERTS, "norm_topk_prob": True},
    "qwen3_moe bias, stacked": {**EXPERTS, "attention_bias": True},
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
GROWING: dict[str, dict[str, Any]] = {
    "mistral dynamic": {"sliding_window": None, "max_position_embeddings": 8, "rope_parameters": DYNAMIC}
}
"""Models whose rotary positions change as a text grows; transformers keeps the keys of the shorter text."""
CONFIGS = {
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi3",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3Text",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
}
LONG = 20  # tokens of a text
LENGTHS = (9, 5)  # prompt tokens of the two rows
# Nodes of a tree: a root, two children, and a child of each.
PARENTS, DEPTHS = (-1, 0, 0, 1, 2), (0, 1, 1, 2, 2)
PATHS = ((0, 1, 3), (0, 2, 4))
NODES = len(PARENTS)
ANCESTORS = np.asarray(
    [[any(m in p[: p.index(n) + 1] for p in PATHS if n in p) for m in range(NODES)] for n in range(NODES)]
)


@functools.cache
def reference(name: str) -> Any:
    """Returns a random transformers model whose norms and biases are all different."""
    family, fields = name.split()[0], {**SMALL, **(VARIATIONS | GROWING)[name]}
    torch.manual_seed(0)
    config = getattr(transformers, f"{CONFIGS[family]}Config")(**copy.deepcopy(fields), attn_implementation="eager")
    model = getattr(transformers, FAMILIES[config.model_type].architecture)(config).eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if "norm" in weight_name:
                weight.add_(torch.empty_like(weight).uniform_(-0.5, 0.5))
            if weight_name.endswith("bias"):
                weight.uniform_(-0.5, 0.5)
    return model


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function of a name to the folder that transformers saved its reference in."""

    @functools.cache
    def saved(name: str) -> Path:
        folder = tmp_path_factory.mktemp("hf")
        reference(name).save_pretrained(folder)
        return folder

    return saved


def wanted(model: Any, *tokens: np.ndarray) -> np.ndarray:
    """Returns the reference's logits of the given stretches, one after another, of one text."""
    with torch.no_grad():
        return model(torch.as_tensor(np.concatenate(tokens)[None])).logits.float().numpy()[0]


@pytest.mark.parametrize("name", VARIATIONS)
def test_prefill_trees_and_chains_equal_transformers(folder_of: Callable[[str], Path], name: str):
    model = reference(name)
    module, params, config = load_target(folder_of(name), dtype=jnp.float32, stacked=name.endswith("stacked"))
    rng = np.random.default_rng(1)
    prompt, tree, chain = (rng.integers(3, config.vocab, (2, count)) for count in (max(LENGTHS), NODES, NODES))

    @jax.jit
    def call(tokens: Any, positions: Any, mask: Any, prefix: Any) -> tuple[Any, Any]:
        out = module.forward(params, tokens, positions, mask, prefix, keep_kv=True)
        return module.logits(params, out.features_BLD), out.fresh

    def near(logits: Any, expected: np.ndarray) -> None:
        assert np.abs(np.asarray(logits) - expected).max() <= TOLERANCE

    places = jnp.broadcast_to(jnp.arange(max(LENGTHS)), prompt.shape)
    logits, fresh = call(prompt, places, causal_mask(max(LENGTHS)), None)
    for b, length in enumerate(LENGTHS):
        near(logits[b, :length], wanted(model, prompt[b, :length]))
    length_B = jnp.asarray(LENGTHS)
    cache = kv.commit(module.empty_cache(2, 24), fresh, jnp.zeros(2, jnp.int32))

    logits, fresh = call(tree, length_B[:, None] + np.asarray(DEPTHS), jnp.asarray(ANCESTORS)[None], (cache, length_B))
    for b, length in enumerate(LENGTHS):
        for path in map(list, PATHS):
            near(logits[b, path], wanted(model, prompt[b, :length], tree[b, path])[length:])
    path = list(PATHS[1])
    cache = kv.commit(cache, kv.take_rows(fresh, jnp.tile(jnp.asarray(path), (2, 1))), length_B)
    length_B = length_B + len(path)

    logits, _ = call(chain, length_B[:, None] + np.arange(NODES), causal_mask(NODES), (cache, length_B))
    for b, length in enumerate(LENGTHS):
        near(logits[b], wanted(model, prompt[b, :length], tree[b, path], chain[b])[length + len(path) :])


def test_a_text_beyond_the_original_length_has_the_base_of_its_length(folder_of: Callable[[str], Path]):
    (name,) = GROWING
    module, params, config = load_target(folder_of(name), dtype=jnp.float32)
    assert config.max_positions == 16
    text = np.random.default_rng(0).integers(3, config.vocab, (1, LONG))
    out = module.forward(params, jnp.asarray(text), jnp.arange(LONG)[None], causal_mask(LONG))
    assert np.abs(module.logits(params, out.features_BLD)[0] - wanted(reference(name), text[0])).max() <= TOLERANCE


@pytest.mark.parametrize("name", VARIATIONS | GROWING)
def test_what_is_written_is_what_was_read_and_transformers_loads_it(
    tmp_path: Path, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
):
    if name.endswith("stacked"):
        monkeypatch.setattr(tensors, "SHARD_BYTES", 20_000)
    source, out, model = folder_of(name), tmp_path / "out", reference(name)
    export.write("hf", out, export.find_model(str(source)))
    assert (out / "model.safetensors.index.json").exists() == name.endswith("stacked")
    module, params = read_llama(source, dtype=jnp.float32)
    ours, back = read_llama(out, dtype=jnp.float32)
    assert ours == module
    jax.tree.map(np.testing.assert_array_equal, back, params)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs, loaded = model.state_dict(), again.state_dict()
    assert theirs.keys() == loaded.keys() and all(torch.equal(theirs[key], loaded[key]) for key in theirs)
    text = np.random.default_rng(0).integers(3, module.config.vocab, LONG)
    assert np.abs(wanted(again.eval(), text) - wanted(model, text)).max() <= TOLERANCE

    fields = json.loads((out / "config.json").read_text())
    del fields["rope_parameters"]  # as readers before transformers 5 know it
    (out / "config.json").write_text(json.dumps(fields))
    assert read_config(out) == module.config


def config_of(folder: Path, **fields: Any) -> Any:
    (folder / "config.json").write_text(json.dumps({**SMALL, **fields}))
    return read_config(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt2"}, ["'gpt2'", "MistralForCausalLM", "'qwen3'"]),
        (
            {"model_type": "mistral", "rope_parameters": {"rope_type": "ntk", "factor": 2.0}},
            ["'ntk'", "'yarn'"],
        ),
        ({"model_type": "qwen2", "hidden_act": "relu2"}, ["hidden_act", "'relu2'", "'silu'"]),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 2, **UPPER}, ["'linear_attention'"]),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, ["mlp_only_layers=[0]", "experts"]),
        ({"model_type": "gemma3"}, ["'gemma3'", "gemma3_text"]),
        ({"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0]}}, ["short_factor", "4 numbers"]),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(tmp_path: Path, fields: Any, words: list[str]):
    with pytest.raises(ValueError) as caught:
        config_of(tmp_path, **fields)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("vocab_size", float("inf"), "must be a positive whole number"),
        ("vocab_size", float("nan"), "must be a positive whole number"),
        ("hidden_act", ["silu"], "is not supported"),
        ("max_window_layers", None, "must be a whole number of layers"),
        ("max_window_layers", "1", "must be a whole number of layers"),
        ("rope_scaling", {"rope_type": ["yarn"]}, "must be a name"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "must be above 1"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, ORIGINAL: 1}, "must be above 1"),
    ],
)
def test_values_that_cannot_be_are_one_sentence(tmp_path: Path, name: str, value: Any, said: str):
    with pytest.raises(ValueError, match=said):
        config_of(tmp_path, model_type="qwen2", **{**UPPER, name: value})


@pytest.mark.parametrize("ids", [[1, None], ["</s>"], True, [1.0], "2"])
def test_stop_ids_that_are_none_are_one_sentence(tmp_path: Path, ids: Any):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ValueError, match="must be a token id or a list of them"):
        read_stop_ids(tmp_path, 2)
