"""Forms that drafters are written in for other programs: the tensors and the config.json of each kind of drafter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxspec.base import Params
from jaxspec.drafters.eagle3 import default_taps
from jaxspec.drafters.peagle import PEagleConfig
from jaxspec.interchange.eagle import eagle_table
from jaxspec.interchange.eagle3 import CONVENTION, IDS, NORMS, eagle3_table, vocabulary_maps
from jaxspec.interchange.fspad import fspad_table
from jaxspec.interchange.hf_config import rope_fields
from jaxspec.interchange.layout import EMBEDDING, stored_tensors
from jaxspec.interchange.medusa import medusa_table
from jaxspec.interchange.peagle import TOKENS, peagle_tables
from jaxspec.nn.norm import rms_norm
from jaxspec.targets.decoder import LlamaConfig
from jaxspec.trees import SERVED_TOKENS

_ROWS = 4096
Tensors = dict[str, np.ndarray]
ConfigFields = dict[str, Any]
"""Fields of a config.json."""


class Draft(NamedTuple):
    """A drafter to be written, with the facts of its target that the forms need."""

    family: str
    config: Any
    params: Params
    draft_vocab: tuple[int, ...] | None
    target: LlamaConfig
    target_name: str
    target_classes: list[str]
    """The `architectures` of the target's `config.json`."""
    embed_VD: np.ndarray
    head_VD: np.ndarray


class Keys(NamedTuple):
    """Names of the tensors that a program reads of one kind of drafter."""

    required: frozenset[str]
    optional: frozenset[str] = frozenset()

    def check(self, found: Mapping[str, Any], server: str) -> None:
        """Raises ValueError naming the first tensor that is missing or that the program has no place for."""
        missing, extra = sorted(self.required - found.keys()), sorted(found.keys() - self.required - self.optional)
        if missing:
            raise ValueError(f"{server} requires the tensor {missing[0]}, which this drafter does not have")
        if extra:
            raise ValueError(f"{server} has no place for the tensor {extra[0]}, and would draft without it")


class Form(NamedTuple):
    """Layout in which one program loads one kind of drafter."""

    keys: Callable[[Draft], Keys]
    tensors: Callable[[Draft], Tensors]
    fields: Callable[[Draft], ConfigFields]


LAYER = frozenset(
    f"{name}.weight"
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
)  # fmt: skip
UPPER = LAYER | {"input_layernorm.weight"}
EAGLE3 = UPPER | {"hidden_norm.weight"}


def _keys(prefix: str, layer: frozenset[str], required: set[str], optional: set[str] | None = None) -> Keys:
    extras = _extras(prefix)
    return Keys(frozenset({prefix + name for name in layer} | required), frozenset(extras | (optional or set())))


def _extras(prefix: str) -> set[str]:
    """Returns the tensors that only some layers have; `servers.unserved` checks which programs read them."""
    biases = {f"{prefix}self_attn.{name}_proj.bias" for name in "qkvo"}
    return biases | {f"{prefix}self_attn.{name}_norm.weight" for name in "qk"}


def llama_fields(draft: Draft, architecture: str) -> ConfigFields:
    """Returns the config.json fields that all heads of decoder layers share.

    The rotary base stands there in the spelling of transformers 5 and in the older one.
    """
    c, target = draft.config, draft.target
    scaling = rope_fields(c.rope_scaling)
    dtype = str(next(iter(draft.params.values())).dtype)
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "hidden_size": c.width,
        "intermediate_size": c.mlp,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "num_hidden_layers": c.layers if isinstance(c, PEagleConfig) else 1,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": target.max_positions,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": c.rope_theta, **(scaling or {"rope_type": "default"})},
        "vocab_size": target.vocab,
        "tie_word_embeddings": False,
        "bos_token_id": target.bos_id,
        "eos_token_id": target.eos_ids[0] if len(target.eos_ids) == 1 else list(target.eos_ids) or None,
        "pad_token_id": target.pad_id,
        "torch_dtype": dtype,
        "dtype": dtype,
        **({"qkv_bias": True} if c.qkv_bias else {}),
        **({"attention_bias": True} if c.qkv_bias and c.out_bias else {}),
    }


# EAGLE-1/2, HASS and FSPAD. The input is always [embedding, feature], and no program applies a norm that is not in the
# file.


def own_table(draft: Draft) -> bool:
    """Returns whether an EAGLE or FSPAD head reads another table than the target's embedding as it is."""
    return bool(draft.config.embedding_norm or draft.config.embed_vocab)


def read_table(draft: Draft) -> np.ndarray:
    """Returns the table `[V, D]`, fp32 where it is not the target's own, that an EAGLE or FSPAD head reads tokens from.

    A norm over a token's embedding depends on the token alone, so the normed table is a table too.
    """
    c, w = draft.config, draft.params
    table_VD = np.asarray(w["embed"]) if c.embed_vocab else draft.embed_VD
    if not c.embedding_norm:
        return table_VD
    normed = np.empty(table_VD.shape, np.float32)
    for first in range(0, len(table_VD), _ROWS):
        some = jnp.asarray(table_VD[first : first + _ROWS], jnp.float32)
        normed[first : first + len(some)] = rms_norm(some, jnp.asarray(w["embedding_norm"], jnp.float32), c.norm_eps)
    return normed


def _bare(config: Any) -> Any:
    """Returns the shape of a head without its embedding and the norm of it, which `read_table` holds."""
    return dataclasses.replace(config, embedding_norm=False, embed_vocab=0)


def eagle_tensors(draft: Draft) -> Tensors:
    """Returns the tensors of an EAGLE head without a table."""
    return stored_tensors(eagle_table(_bare(draft.config)), draft.params)


def eagle_tensors_with_embedding(draft: Draft) -> Tensors:
    """Returns the tensors of an EAGLE head and the table that it reads, by default a copy of the target's embedding."""
    return _with_embedding(eagle_tensors(draft), read_table(draft))


def fspad_tensors(draft: Draft) -> Tensors:
    """Returns the tensors of an FSPAD head and the table that it reads, by default a copy of the target's embedding."""
    return _with_embedding(stored_tensors(fspad_table(_bare(draft.config)), draft.params), read_table(draft))


def _with_embedding(tensors: Tensors, table_VD: np.ndarray) -> Tensors:
    return {EMBEDDING: table_VD.astype(next(iter(tensors.values())).dtype), **tensors}


def eagle_tensors_with_zero_bias(draft: Draft) -> Tensors:
    """Returns the tensors of an EAGLE head, with a bias of `fc` in any case.

    SGLang's `fc` has a bias whatever the file says, and keeps a random one if the file has none (sglang issue 5773).
    """
    tensors = eagle_tensors(draft)
    return {"fc.bias": np.zeros(draft.config.width, tensors["fc.weight"].dtype), **tensors}


def has_bias(draft: Draft) -> bool:
    """Returns whether the head's `fc` has a bias other than zeros."""
    return draft.config.bias and bool(np.any(np.asarray(draft.params["fc_bias"])))


def eagle_tensors_without_bias(draft: Draft) -> Tensors:
    """Returns the tensors of an EAGLE head without the bias of `fc`, and the table that it reads unless the target's.

    vLLM's `fc` has no bias, and loading fails on a file that has one. What a token adds to `fc`'s output depends on the
    token alone: a bias moves into the table, which then holds `table @ fc_embedding + bias`, and that half of `fc` is
    the identity.
    """
    tensors = {name: tensor for name, tensor in eagle_tensors(draft).items() if name != "fc.bias"}
    if not has_bias(draft):
        return _with_embedding(tensors, read_table(draft)) if own_table(draft) else tensors
    width, fc = draft.config.width, np.asarray(draft.params["fc"], np.float32)
    table_VD = read_table(draft).astype(np.float32) @ fc[:width] + np.asarray(draft.params["fc_bias"], np.float32)
    identity = np.eye(width, dtype=tensors["fc.weight"].dtype)
    tensors["fc.weight"] = np.concatenate([identity, tensors["fc.weight"][:, width:]], axis=1)
    return _with_embedding(tensors, table_VD)


def eagle_fields(draft: Draft, architecture: str, *, bias: bool | None = None) -> ConfigFields:
    """Returns the config.json of an EAGLE head; `bias` overrides whether it says that `fc` has one."""
    return {**llama_fields(draft, architecture), "bias": draft.config.bias if bias is None else bias}


def eagle_keys(required: set[str], optional: set[str] | None = None) -> Callable[[Draft], Keys]:
    """Returns the `keys` of EAGLE heads of which a program also reads these tensors outside the layer."""
    return lambda _: _keys("layers.0.", LAYER, {"fc.weight", *required}, optional)


def fspad_keys(draft: Draft) -> Keys:
    """Returns the tensors that FSPAD's own code reads."""
    fc = {"fc.bias", "fc.fc.weight", "fc.fc.bias", "fc.post_attention_layernorm.weight", "fc.weight"}
    mlp = {f"fc.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    return _keys("layers.0.", LAYER, {"embed_tokens.weight"}, fc | mlp)


# EAGLE-3 and P-EAGLE. Only `vocabulary_maps` makes offsets of a draft vocabulary.


@dataclass(frozen=True)
class Eagle3Layout:
    """Storage of the tensors of EAGLE-3 and P-EAGLE heads."""

    prefix: str = "midlayer."
    """Of the names of the first layer."""
    maps: bool = False
    """Whether d2t and t2d are stored for heads that score all tokens too."""
    embedding: bool = False
    """Whether the embedding is stored for heads that read the target's too."""

    def tensors(self, draft: Draft) -> Tensors:
        """Returns the tensors of a head."""
        tokens, vocab = draft.draft_vocab, draft.target.vocab
        if self.maps and tokens is None:
            tokens = tuple(range(vocab))
        tensors = self._head_tensors(draft)
        if self.embedding and not draft.config.embed_vocab:
            tensors = _with_embedding(tensors, draft.embed_VD)
        return {**tensors, **vocabulary_maps(tokens, vocab)}

    def _head_tensors(self, draft: Draft) -> Tensors:
        """Returns the tensors of the head's own weights."""
        if not isinstance(draft.config, PEagleConfig):
            return stored_tensors(eagle3_table(draft.config, self.prefix), draft.params)
        first, upper = peagle_tables(draft.config, self.prefix)
        tensors = stored_tensors(first, draft.params)
        for table, layer in zip(upper, draft.params.get("layers", ()), strict=True):
            tensors |= stored_tensors(table, layer)
        return tensors

    def keys(self, draft: Draft) -> Keys:
        """Returns the tensors that a program of this layout reads."""
        required = {"fc.weight", "norm.weight", "lm_head.weight"}
        required |= {"d2t", "t2d"} if self.maps or draft.draft_vocab is not None else set()
        required |= {EMBEDDING} if self.embedding or draft.config.embed_vocab else set()
        required |= {"input_norm.weight"} if draft.config.input_norm else set()
        required |= {f"fc_norm.{i}.weight" for i in range(len(draft.config.taps)) if draft.config.tap_norms}
        optional: set[str] = set()
        if isinstance(draft.config, PEagleConfig):
            required |= {"mask_hidden"}
            upper = [f"layers.{i}." for i in range(1, draft.config.layers)]
            required |= {prefix + name for prefix in upper for name in UPPER}
            optional = {name for prefix in upper for name in _extras(prefix)}
        return _keys(self.prefix, EAGLE3, required, optional)

    def form(self, fields: Callable[[Draft], ConfigFields]) -> Form:
        """Returns the form of this layout with these fields of the config.json."""
        return Form(self.keys, self.tensors, fields)


def _own_fields(draft: Draft) -> ConfigFields:
    """Returns the fields that only EAGLE-3 and P-EAGLE heads have."""
    c = draft.config
    return {
        "draft_vocab_size": c.vocab,
        "norm_before_residual": c.norm_before_residual,
        **{theirs: True for theirs, ours in NORMS.items() if getattr(c, ours)},
        "embed_requires_grad": bool(c.embed_vocab),
        # Readers ask whether there is a `target_hidden_size`, not whether it is null.
        **({"target_hidden_size": c.target_width} if c.target_width else {}),
        **({"mask_token_id": c.mask_token} if isinstance(c, PEagleConfig) else {}),
    }


def ids_by_output(draft: Draft) -> ConfigFields:
    """Returns the layer ids for SGLang, which adds one to the ids in `eagle_config`: they name layers by output."""
    ids = [tap - 1 for tap in draft.config.taps]
    return {"eagle_config": {IDS: ids, "use_aux_hidden_state": True, CONVENTION: "output"}}


def ids_by_input(draft: Draft) -> ConfigFields:
    """Returns the layer ids for vLLM and speculators, which name layers by input, beside `eagle_config`."""
    return {IDS: list(draft.config.taps), CONVENTION: "input"}


def default_ids(draft: Draft) -> ConfigFields:
    """Returns the layer ids for programs that always read the default layers (`servers.DEFAULT_LAYERS`).

    Raises ValueError if the head reads other layers of its target.
    """
    expected = default_taps(draft.target.layers)
    if tuple(draft.config.taps) != expected:
        raise ValueError(
            f"the program would read the inputs of layers {expected} of this target, and the head was trained on "
            f"{draft.config.taps}: it is for another target"
        )
    return ids_by_output(draft)


def eagle3_fields(architecture: str, ids: Callable[[Draft], ConfigFields]) -> Callable[[Draft], ConfigFields]:
    """Returns the `fields` of EAGLE-3 heads for a program with this class of models and these layer ids."""
    return lambda draft: {**llama_fields(draft, architecture), **_own_fields(draft), **ids(draft)}


def vllm_peagle_fields(draft: Draft) -> ConfigFields:
    """Returns the config.json for vLLM's `{"method": "eagle3", "parallel_drafting": true, ..}`."""
    c, fields = draft.config, eagle3_fields("LlamaForCausalLMEagle3", ids_by_input)(draft)
    # Older releases of vLLM read the id of the mask token as `ptd_token_id`.
    return {**fields, "ptd_token_id": c.mask_token, TOKENS: c.tokens}


def speculators_fields(draft: Draft, version: str) -> ConfigFields:
    """Returns the config.json of an EAGLE-3 or P-EAGLE head for a version of the package speculators."""
    layer = llama_fields(draft, "LlamaForCausalLM")
    dtype = layer["torch_dtype"]
    name, proposed = ("PEagle", draft.config.tokens) if draft.family == "peagle" else ("Eagle3", SERVED_TOKENS)
    return {
        "architectures": [f"{name}Speculator"],
        "auto_map": {"": f"{draft.family}.{name}SpeculatorConfig"},
        **_own_fields(draft),
        **ids_by_input(draft),
        "has_no_defaults_at_init": False,
        "target_hidden_size": None,
        "torch_dtype": dtype,
        "speculators_model_type": draft.family,
        "speculators_version": version,
        "speculators_config": {
            "algorithm": draft.family,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": proposed,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": draft.target_name, "architectures": draft.target_classes},
        },
        "transformer_layer_config": {key: value for key, value in layer.items() if key != "architectures"}
        | ({"model_type": "qwen3"} if draft.config.qk_norm else {}),
    }


# Medusa-1, for vLLM.


def _medusa_tables(draft: Draft) -> list[Any]:
    return [medusa_table(draft.config, block, vllm=True) for block in range(draft.config.layers)]


def medusa_tensors(draft: Draft) -> Tensors:
    """Returns the tensors of Medusa heads, and the target's LM head for those that have none of their own."""
    tensors: Tensors = {}
    for table in _medusa_tables(draft):
        tensors |= stored_tensors(table, draft.params)
    if not draft.config.vocab:
        tensors["lm_head.weight"] = draft.head_VD.astype(draft.params["block"].dtype)
    return tensors


def medusa_keys(draft: Draft) -> Keys:
    """Returns the tensors that vLLM reads of Medusa heads."""
    names = {name for table in _medusa_tables(draft) for name in table}
    return Keys(frozenset(names | (set() if draft.config.vocab else {"lm_head.weight"})))


def medusa_fields(draft: Draft) -> ConfigFields:
    """Returns the config.json of Medusa heads for vLLM."""
    c, vocab = draft.config, draft.target.vocab
    dtype = str(draft.params["block"].dtype)
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": c.width,
        "num_heads": c.tokens,
        "num_hidden_layers": c.layers,
        "vocab_size": vocab,
        "truncated_vocab_size": vocab,
        "original_lm_head": not c.vocab,
        "medusa_fc_bias": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


MEDUSA_FORM = Form(medusa_keys, medusa_tensors, medusa_fields)
FSPAD_FORM = Form(fspad_keys, fspad_tensors, functools.partial(eagle_fields, architecture="LlamaForCausalLM"))
