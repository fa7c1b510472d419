"""The Llama target computes what transformers computes, from folders that either of them wrote."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.interchange.hf import load_target, write_llama
from jaxspec.nn import cache as kv
from jaxspec.nn.attention import causal_mask
from jaxspec.parallel.mesh import make_mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # tiny matrices; its threads would only contend with XLA's

TOLERANCE = 2e-4  # greatest fp32 logit error
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,  # so that with 16 positions every branch of the formula is taken
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIATIONS = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped": {},
    "multi-query": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 14},
    "long theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "tied": {"tie_word_embeddings": True, "vocab_size": 60},
}
LENGTHS = (5, 9)  # prompt tokens of the two rows
STEPS = (1, 3, 1, 4)  # tokens of each cached call


def reference(**fields: Any) -> Any:
    """Returns a random transformers model whose norms are not all ones."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **fields})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def reference_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.float().numpy()


def random_tokens(vocab: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab, (2, max(LENGTHS) + sum(STEPS)))


def whole_logits(folder: Path, tokens: np.ndarray, **options: Any) -> np.ndarray:
    """Returns the logits of one causal call over all tokens."""
    module, params, _ = load_target(folder, **{"dtype": jnp.float32, **options})
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    out = module.forward(params, jnp.asarray(tokens), positions, causal_mask(tokens.shape[1]))
    return np.asarray(module.logits(params, out.features_BLD))


@pytest.mark.parametrize("fields", VARIATIONS.values(), ids=VARIATIONS.keys())
def test_prefill_equals_transformers(tmp_path: Path, fields: Any):
    model = reference(**fields)
    model.save_pretrained(tmp_path)
    tokens = random_tokens(model.config.vocab_size)
    error = np.abs(whole_logits(tmp_path, tokens) - reference_logits(model, tokens)).max()
    assert error <= TOLERANCE


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["grouped", "multi-query", "llama3", "tied"])
def test_cached_steps_of_rows_of_different_lengths_equal_transformers(tmp_path: Path, name: str, stacked: bool):
    model = reference(**VARIATIONS[name])
    model.save_pretrained(tmp_path)
    tokens = random_tokens(model.config.vocab_size)
    expected = reference_logits(model, tokens)
    module, params, _ = load_target(tmp_path, dtype=jnp.float32, stacked=stacked)
    cache, length = module.empty_cache(2, tokens.shape[1] + 2), jnp.zeros(2, jnp.int32)
    forward = jax.jit(module.forward, static_argnames="keep_kv")
    for step, count in enumerate((max(LENGTHS), *STEPS)):
        real = np.asarray(LENGTHS) if step == 0 else np.full(2, count)
        rows = np.asarray(length)[:, None] + np.arange(count)
        seen = jnp.asarray(np.take_along_axis(tokens, rows, axis=1))
        prefix = None if step == 0 else (cache, length)
        out = forward(params, seen, jnp.asarray(rows), causal_mask(count), prefix, keep_kv=True)
        assert out.fresh is not None
        cache = kv.commit(cache, out.fresh, length)
        logits = np.asarray(module.logits(params, out.features_BLD))
        for b in range(2):
            wanted = expected[b, rows[b, : real[b]]]
            assert np.abs(logits[b, : real[b]] - wanted).max() <= TOLERANCE, (step, b)
        length = length + jnp.asarray(real, jnp.int32)


def test_shards_that_transformers_wrote_are_read(tmp_path: Path):
    model = reference()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = random_tokens(61)
    assert np.abs(whole_logits(tmp_path, tokens) - reference_logits(model, tokens)).max() <= TOLERANCE


def test_logits_over_eight_devices_equal_transformers(tmp_path: Path):
    model = reference(vocab_size=64)
    model.save_pretrained(tmp_path)
    tokens, mesh = random_tokens(64), make_mesh(2, 2, 2)
    error = np.abs(whole_logits(tmp_path, tokens, mesh=mesh) - reference_logits(model, tokens)).max()
    assert error <= TOLERANCE


@pytest.mark.parametrize("fields", VARIATIONS.values(), ids=VARIATIONS.keys())
def test_transformers_reads_what_is_written(tmp_path: Path, fields: Any):
    model = reference(**fields)
    model.save_pretrained(tmp_path / "theirs")
    _, params, config = load_target(tmp_path / "theirs", dtype=jnp.float32)
    write_llama(tmp_path / "ours", params, config, dtype="float32")
    again, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    before, after = model.config.to_dict(), again.config.to_dict()
    for name in ("rope_parameters", "tie_word_embeddings", "head_dim", "eos_token_id", "pad_token_id", "rms_norm_eps"):
        assert before[name] == after[name], name
    theirs, ours = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    tokens = random_tokens(config.vocab)
    np.testing.assert_array_equal(reference_logits(model, tokens), reference_logits(again.eval(), tokens))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_bfloat16_folder_loads(tmp_path: Path, dtype: Any):
    reference().to(torch.bfloat16).save_pretrained(tmp_path)
    tokens = random_tokens(61)
    # The model is read again, because `.to(bfloat16)` rounds its rotary frequencies too.
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = reference_logits(model.eval(), tokens)
    logits = whole_logits(tmp_path, tokens, dtype=dtype)
    if dtype == jnp.float32:
        assert np.abs(logits - expected).max() <= TOLERANCE
    else:
        assert np.abs(logits - expected).mean() <= 0.02 * np.abs(expected).mean()


def test_stop_ids_pass_both_ways(tmp_path: Path):
    model = reference()
    model.generation_config.eos_token_id = [2, 9]
    model.save_pretrained(tmp_path / "theirs")
    _, params, config = load_target(tmp_path / "theirs", dtype=jnp.float32)
    assert config.eos_ids == (2, 9) and config.bos_id == 1 and config.pad_id == 0
    write_llama(tmp_path / "ours", params, config)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.generation_config.eos_token_id == [2, 9] and again.dtype == torch.bfloat16
