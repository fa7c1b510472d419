"""Drafters as other programs load them: which tensors each requires and admits, and the config.json that it reads.

What a program cannot serve is refused with the reason; so is a tensor that it would not look at, or that it lacks,
before anything is written. None of the programs was run here: `Server.version` says what was assumed of which.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from jaxspec import __version__
from jaxspec.base import Params
from jaxspec.drafters.eagle3 import Eagle3Config, default_taps
from jaxspec.drafters.peagle import PEagleConfig
from jaxspec.interchange.eagle import eagle_table
from jaxspec.interchange.eagle3 import CONVENTION, EMBEDDING, IDS, NORMS, eagle3_table, vocabulary_maps
from jaxspec.interchange.fspad import fspad_table
from jaxspec.interchange.hf_config import rope_fields
from jaxspec.interchange.layout import stored_tensors
from jaxspec.interchange.medusa import medusa_table
from jaxspec.interchange.peagle import TOKENS, peagle_tables
from jaxspec.targets.decoder import LlamaConfig

Tensors = dict[str, np.ndarray]
Fields = dict[str, Any]


class Draft(NamedTuple):
    """A drafter to be written, and what must be known of its target."""

    family: str
    config: Any
    params: Params
    draft_vocab: tuple[int, ...] | None
    target: LlamaConfig
    target_name: str
    embed_VD: np.ndarray
    head_VD: np.ndarray


class Keys(NamedTuple):
    """The tensors of one kind of drafter that a program takes."""

    required: frozenset[str]
    optional: frozenset[str] = frozenset()

    def check(self, found: Mapping[str, Any], server: str) -> None:
        """ValueError naming the first tensor that is missing or that the program has no place for."""
        missing, extra = sorted(self.required - found.keys()), sorted(found.keys() - self.required - self.optional)
        if missing:
            raise ValueError(f"{server} requires the tensor {missing[0]}, which this drafter does not have")
        if extra:
            raise ValueError(f"{server} has no place for the tensor {extra[0]}, and would draft without it")


class Form(NamedTuple):
    """How one kind of drafter is written for one program."""

    keys: Callable[[Draft], Keys]
    tensors: Callable[[Draft], Tensors]
    fields: Callable[[Draft], Fields]


class Server(NamedTuple):
    """A program that loads drafters."""

    version: str
    """Whose behaviour is assumed."""
    forms: dict[str, Form]
    """By family."""
    refusals: dict[str, str]
    """Family -> why it cannot be served, for those that some might expect."""


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
    """What only some layers have; who reads it is told by `_reads_biases` and `NORMED_QUERIES`."""
    biases = {f"{prefix}self_attn.{name}_proj.bias" for name in "qkvo"}
    return biases | {f"{prefix}self_attn.{name}_norm.weight" for name in "qk"}


def llama_fields(draft: Draft, architecture: str) -> Fields:
    """What the config.json of every head of decoder layers says, rotary base in the older and in the newer spelling."""
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


# EAGLE-1/2 and HASS. The input is always [embedding, feature], and no program applies a norm that is not in the file.


def _eagle(draft: Draft) -> Tensors:
    return stored_tensors(eagle_table(draft.config), draft.params)


def _with_embedding(tensors: Tensors, draft: Draft) -> Tensors:
    return {EMBEDDING: draft.embed_VD.astype(next(iter(tensors.values())).dtype), **tensors}


def _with_zero_bias(draft: Draft) -> Tensors:
    """SGLang's `fc` has a bias whatever the file says, and keeps a random one where it has none (sglang issue 5773)."""
    tensors = _eagle(draft)
    return {"fc.bias": np.zeros(draft.config.width, tensors["fc.weight"].dtype), **tensors}


def _without_bias(draft: Draft) -> Tensors:
    """vLLM's `fc` has no bias, and fails on a file that has one; a bias of zeros may go (`_unserved_eagle`)."""
    return {name: tensor for name, tensor in _eagle(draft).items() if name != "fc.bias"}


def _eagle_fields(architecture: str) -> Callable[[Draft], Fields]:
    return lambda draft: {**llama_fields(draft, architecture), "bias": draft.config.bias}


def _sglang_eagle_fields(draft: Draft) -> Fields:
    return {**llama_fields(draft, "LlamaForCausalLMEagle"), "bias": True}


# EAGLE-3 and P-EAGLE. Offsets are made in `vocabulary_maps`, and nowhere else.


def _eagle3(prefix: str = "midlayer.", *, maps: bool = False, embedding: bool = False) -> Callable[[Draft], Tensors]:
    def make(draft: Draft) -> Tensors:
        tokens, vocab = draft.draft_vocab, draft.target.vocab
        if maps and tokens is None:
            tokens = tuple(range(vocab))
        tensors = _heads_own(draft, prefix)
        tensors = _with_embedding(tensors, draft) if embedding and not draft.config.embed_vocab else tensors
        return {**tensors, **vocabulary_maps(tokens, vocab)}

    return make


def _heads_own(draft: Draft, prefix: str) -> Tensors:
    """What the head's own weights are stored as."""
    if not isinstance(draft.config, PEagleConfig):
        return stored_tensors(eagle3_table(draft.config, prefix), draft.params)
    first, upper = peagle_tables(draft.config, prefix)
    tensors = stored_tensors(first, draft.params)
    for table, layer in zip(upper, draft.params.get("layers", ()), strict=True):
        tensors |= stored_tensors(table, layer)
    return tensors


def _eagle3_keys(prefix: str = "midlayer.", *, maps: bool = False, embedding: bool = False) -> Callable[[Draft], Keys]:
    def make(draft: Draft) -> Keys:
        required = {"fc.weight", "norm.weight", "lm_head.weight"}
        required |= {"d2t", "t2d"} if maps or draft.draft_vocab is not None else set()
        required |= {EMBEDDING} if embedding or draft.config.embed_vocab else set()
        required |= {"input_norm.weight"} if draft.config.input_norm else set()
        required |= {f"fc_norm.{i}.weight" for i in range(len(draft.config.taps)) if draft.config.tap_norms}
        optional: set[str] = set()
        if isinstance(draft.config, PEagleConfig):
            required |= {"mask_hidden"}
            upper = [f"layers.{i}." for i in range(1, draft.config.layers)]
            required |= {prefix + name for prefix in upper for name in UPPER}
            optional = {name for prefix in upper for name in _extras(prefix)}
        return _keys(prefix, EAGLE3, required, optional)

    return make


def _shaped(draft: Draft) -> Fields:
    """What only such heads have. Readers ask whether there is a `target_hidden_size`, not whether it is null."""
    c = draft.config
    return {
        "draft_vocab_size": c.vocab,
        "norm_before_residual": c.norm_before_residual,
        **{theirs: True for theirs, ours in NORMS.items() if getattr(c, ours)},
        "embed_requires_grad": bool(c.embed_vocab),
        **({"target_hidden_size": c.target_width} if c.target_width else {}),
        **({"mask_token_id": c.mask_token} if isinstance(c, PEagleConfig) else {}),
    }


def _ids_by_output(draft: Draft) -> Fields:
    """SGLang adds one to the ids of `eagle_config`: they name layers by their outputs."""
    ids = [tap - 1 for tap in draft.config.taps]
    return {"eagle_config": {IDS: ids, "use_aux_hidden_state": True, CONVENTION: "output"}}


def _ids_by_input(draft: Draft) -> Fields:
    """vLLM and speculators name layers by their inputs, beside `eagle_config`."""
    return {IDS: list(draft.config.taps), CONVENTION: "input"}


def _default_ids(draft: Draft) -> Fields:
    """For programs of `DEFAULT_LAYERS`."""
    expected = default_taps(draft.target.layers)
    if tuple(draft.config.taps) != expected:
        raise ValueError(
            f"the program would read the inputs of layers {expected} of this target, and the head was trained on "
            f"{draft.config.taps}: it is another's"
        )
    return _ids_by_output(draft)


def _eagle3_fields(architecture: str, ids: Callable[[Draft], Fields]) -> Callable[[Draft], Fields]:
    return lambda draft: {**llama_fields(draft, architecture), **_shaped(draft), **ids(draft)}


def _vllm_peagle_fields(draft: Draft) -> Fields:
    """For `{"method": "eagle3", "parallel_drafting": true, ..}`; older releases read the mask's id by another name."""
    c, fields = draft.config, _eagle3_fields("LlamaForCausalLMEagle3", _ids_by_input)(draft)
    return {**fields, "ptd_token_id": c.mask_token, TOKENS: c.tokens}


def _speculators_fields(draft: Draft) -> Fields:
    layer = llama_fields(draft, "LlamaForCausalLM")
    dtype = layer["torch_dtype"]
    name, proposed = ("PEagle", draft.config.tokens) if draft.family == "peagle" else ("Eagle3", 3)
    return {
        "architectures": [f"{name}Speculator"],
        "auto_map": {"": f"{draft.family}.{name}SpeculatorConfig"},
        **_shaped(draft),
        **_ids_by_input(draft),
        "has_no_defaults_at_init": False,
        "target_hidden_size": None,
        "torch_dtype": dtype,
        "speculators_model_type": draft.family,
        "speculators_version": SERVERS["speculators"].version,
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
            "verifier": {"name_or_path": draft.target_name, "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": {key: value for key, value in layer.items() if key != "architectures"}
        | ({"model_type": "qwen3"} if draft.config.qk_norm else {}),
    }


# Medusa-1, for vLLM.


def _medusa(draft: Draft) -> Tensors:
    c = draft.config
    tensors: Tensors = {}
    for block in range(c.layers):
        tensors |= stored_tensors(medusa_table(c, block, vllm=True), draft.params)
    if not c.vocab:
        tensors["lm_head.weight"] = draft.head_VD.astype(draft.params["block"].dtype)
    return tensors


def _medusa_keys(draft: Draft) -> Keys:
    tables = (medusa_table(draft.config, block, vllm=True) for block in range(draft.config.layers))
    names = {name for table in tables for name in table}
    return Keys(frozenset(names | (set() if draft.config.vocab else {"lm_head.weight"})))


def _medusa_fields(draft: Draft) -> Fields:
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


_NO_FSPAD = "no server has FSPAD's network; `--to eagle` writes it as its authors' code reads it"
_NO_PARALLEL = "no server has ParallelSpec's network, and no code of its authors is public"
_NO_PEAGLE = "it drafts step by step, and this head in one pass; vllm and speculators have P-EAGLE"
_NO_EAGLE = "it has no EAGLE-1/2 model class (HASS heads are of that class too); an EAGLE-3 head can be served"
_NO_MEDUSA = "it serves no Medusa heads; vllm does"
_NOT_PUBLISHED = "only EAGLE, HASS, EAGLE-3 and FSPAD heads are read by that code"


def _eagle_keys(required: set[str], optional: set[str] | None = None) -> Callable[[Draft], Keys]:
    return lambda _: _keys("layers.0.", LAYER, {"fc.weight", *required}, optional)


_FSPAD = {"fc.bias", "fc.fc.weight", "fc.fc.bias", "fc.post_attention_layernorm.weight", "fc.weight"} | {
    f"fc.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
}

SERVERS: dict[str, Server] = {
    "eagle": Server(
        "SafeAILab/EAGLE cb7e084; HArmonizedSS/HASS 38922e4; Luc4Gui/FSPAD 1c2df5e",
        {
            "eagle": Form(
                _eagle_keys({"embed_tokens.weight"}, {"fc.bias"}),
                lambda draft: _with_embedding(_eagle(draft), draft),
                _eagle_fields("LlamaForCausalLM"),
            ),
            "eagle3": Form(_eagle3_keys(), _eagle3(), _eagle3_fields("LlamaForCausalLM", _default_ids)),
            "fspad": Form(
                lambda _: _keys("layers.0.", LAYER, {"embed_tokens.weight"}, _FSPAD),
                lambda draft: _with_embedding(stored_tensors(fspad_table(draft.config), draft.params), draft),
                _eagle_fields("LlamaForCausalLM"),
            ),
        },
        {"medusa": _NOT_PUBLISHED, "parallelspec": _NO_PARALLEL, "peagle": _NO_PEAGLE, "draft_lm": _NOT_PUBLISHED},
    ),
    "sglang": Server(
        "SGLang, sources of November 2026",
        {
            "eagle": Form(_eagle_keys({"fc.bias"}), _with_zero_bias, _sglang_eagle_fields),
            "eagle3": Form(_eagle3_keys(), _eagle3(), _eagle3_fields("LlamaForCausalLMEagle3", _ids_by_output)),
        },
        {"fspad": _NO_FSPAD, "parallelspec": _NO_PARALLEL, "peagle": _NO_PEAGLE, "medusa": _NO_MEDUSA},
    ),
    "vllm": Server(
        "vLLM, sources of November 2026",
        {
            "eagle": Form(_eagle_keys(set()), _without_bias, lambda draft: llama_fields(draft, "LlamaForCausalLM")),
            "eagle3": Form(
                _eagle3_keys(),
                _eagle3(),
                _eagle3_fields("LlamaForCausalLMEagle3", _ids_by_input),
            ),
            "peagle": Form(_eagle3_keys("layers.0."), _eagle3("layers.0."), _vllm_peagle_fields),
            "medusa": Form(_medusa_keys, _medusa, _medusa_fields),
        },
        {"fspad": _NO_FSPAD, "parallelspec": _NO_PARALLEL},
    ),
    "speculators": Server(
        "0.9.0",
        dict.fromkeys(
            ("eagle3", "peagle"),
            Form(
                _eagle3_keys("layers.0.", maps=True, embedding=True),
                _eagle3("layers.0.", maps=True, embedding=True),
                _speculators_fields,
            ),
        ),
        {
            "eagle": "its registry has no EAGLE-1/2 or HASS; `--to vllm` writes what vllm loads without speculators",
            "fspad": _NO_FSPAD,
            "parallelspec": _NO_PARALLEL,
            "medusa": _NO_MEDUSA,
            "draft_lm": "an independent LM is no speculators model; `--to vllm` writes it as vllm's draft_model",
        },
    ),
    "sglang-jax": Server(
        "sglang-jax, sources of November 2026",
        {"eagle3": Form(_eagle3_keys(), _eagle3(), _eagle3_fields("LlamaForCausalLMEagle3", _default_ids))},
        {
            "eagle": _NO_EAGLE,
            "fspad": _NO_FSPAD,
            "parallelspec": _NO_PARALLEL,
            "peagle": _NO_PEAGLE,
            "medusa": _NO_MEDUSA,
        },
    ),
    "tpu-inference": Server(
        "tpu-inference, sources of November 2026",
        {
            "eagle3": Form(
                _eagle3_keys(),
                _eagle3(),
                _eagle3_fields("LlamaForCausalLM", _default_ids),
            )
        },
        {
            "eagle": _NO_EAGLE,
            "fspad": _NO_FSPAD,
            "parallelspec": _NO_PARALLEL,
            "peagle": _NO_PEAGLE,
            "medusa": _NO_MEDUSA,
            "draft_lm": "it is not known to load an independent LM as drafter",
        },
    ),
}
"""Name -> what `jaxspec export --to` knows of it."""
LM_SERVERS = ("sglang", "vllm", "sglang-jax")
"""Those that draft with an ordinary LM's folder (STANDALONE, draft_model)."""

NORM_FIRST = ("vllm", "speculators", "tpu-inference")
"""Those that honour an EAGLE-3 head's `norm_before_residual`."""
MORE_NORMS = ("vllm", "speculators")
"""Those that honour `norm_before_fc` (vLLM pull request 36545), and EAGLE-3.1's `fc_norm` and `norm_output` (42764)."""
NORMED_QUERIES = ("speculators",)
"""Those that build heads of Qwen3's layers."""
OWN_EMBEDDING = ("vllm", "speculators")
"""Those that read with an embedding of the head's own where it is as wide as the target's."""
OTHER_WIDTH = ("eagle", "sglang", "vllm")
"""Those that read `target_hidden_size`."""
SKIPS_FC = ("eagle", "sglang")
"""Those that leave out `fc` where what it reads is as wide as what it puts out."""
DEFAULT_LAYERS = ("eagle", "sglang-jax", "tpu-inference")
"""Those that read the default three layers, whatever the file says."""


def served_as(family: str, config: Any) -> str:
    """The family that a drafter is written as: FSPAD without its two parts is an EAGLE head."""
    plain = family == "fspad" and not config.feature_sampling and not config.partial_alignment
    return "eagle" if plain else family


def unserved(
    server: str,
    family: str,
    config: Any,
    weights: Callable[[], Params],
    draft_vocab: tuple[int, ...] | None = None,
) -> str | None:
    """Why a program does not serve a drafter, whatever its target is; None where it does. `weights` are read where it
    depends on them."""
    about, family = SERVERS[server], served_as(family, config)
    if family not in about.forms:
        return f"{server} cannot serve {family}: {about.refusals.get(family, 'it has no layout for such a drafter')}"
    if family != "medusa" and not _reads_biases(server, family, config):
        return f"{server} is not known to read biases of the attention such as this head has"
    if family != "medusa" and config.qk_norm and server not in NORMED_QUERIES:
        return f"{server} is not known to norm a head's queries and keys, as Qwen3's layers do"
    match family:
        case "eagle" | "fspad":
            return _unserved_eagle(server, config, weights)
        case "eagle3" | "peagle":
            return _unserved_eagle3(server, config)
    if draft_vocab is not None:
        return f"{server} reads a truncated vocabulary of Medusa heads from a token_map, which is not written here"
    return None


def _reads_biases(server: str, family: str, config: Any) -> bool:
    """Those of queries, keys and values EAGLE's own code does; those and the output's, all or none, go by the name
    `attention_bias`."""
    if config.qkv_bias and config.out_bias:
        return server in ("vllm", "speculators") and family in ("eagle3", "peagle")
    return not config.out_bias and (not config.qkv_bias or server == "eagle")


def _unserved_eagle(server: str, config: Any, weights: Callable[[], Params]) -> str | None:
    if config.embedding_norm or config.head_norm:
        return f"{server} cannot serve a head with norms around its layer: it would draft without them"
    if server == "vllm" and config.bias and np.any(np.asarray(weights()["fc_bias"])):
        return "vllm builds fc without a bias, and this head has one: train it with head.bias=false"
    return None


def _unserved_eagle3(server: str, c: Eagle3Config) -> str | None:
    if c.input_norm or c.tap_norms or c.normed_feature:
        if server not in (MORE_NORMS if not isinstance(c, PEagleConfig) else ("speculators",)):
            return (
                f"{server} is not known to honour norms of EAGLE-3.1 or before fc, and this head was trained with them"
            )
        if c.input_norm and c.tap_norms:
            return f"{server} norms what fc reads as a whole or each layer's part, and this head does both"
    if c.norm_before_residual and server not in NORM_FIRST:
        return f"{server} is not known to honour norm_before_residual, and this head was trained with it"
    if len(c.taps) != 3 and server != "speculators":
        return f"{server} reads three layers of the target, and this head {len(c.taps)}"
    if server in DEFAULT_LAYERS and not _are_default(c.taps):
        return (
            f"{server} always reads the inputs of layers 2, L / 2 and L - 3 of L, and the head was trained on {c.taps}"
        )
    if server == "sglang" and c.taps[0] == 0:
        return f"the head reads the input of layer 0 (taps {c.taps}), and sglang names layers by their outputs"
    if c.feature_width != c.width:
        if server not in OTHER_WIDTH or isinstance(c, PEagleConfig):
            return f"{server} is not known to serve such heads of another width than their target's"
        if server in SKIPS_FC and len(c.taps) * c.feature_width == c.width:
            return f"{server} skips fc where it does not change the width, as in this head"
    elif c.embed_vocab and server not in OWN_EMBEDDING:
        return f"{server} reads with the target's embedding, and this head was trained with its own"
    return None


def _are_default(taps: tuple[int, ...]) -> bool:
    """Whether they are the default layers of a target of some depth."""
    try:
        return taps == default_taps(taps[-1] + 3)
    except ValueError:
        return False


def render(server: str, draft: Draft) -> tuple[Tensors, Fields]:
    """The tensors and the config.json of a drafter for a program.

    Raises ValueError with the reason where the program cannot serve it, or a tensor is missing or extra.
    """
    if reason := unserved(server, draft.family, draft.config, lambda: draft.params, draft.draft_vocab):
        raise ValueError(reason)
    about, family = SERVERS[server], served_as(draft.family, draft.config)
    form = about.forms[family]
    _check_tokens(draft)
    tensors, fields = form.tensors(draft), form.fields(draft)
    form.keys(draft).check(tensors, server)
    stamp: Fields = {"version": __version__, "written_for": server, "assumes": about.version, "family": family}
    if family == "eagle":
        stamp["fc_bias"] = draft.config.bias
    return tensors, {**fields, "jaxspec": stamp}


def _check_tokens(draft: Draft) -> None:
    """ValueError where a head with tables of its own has them for another number of tokens than the target's."""
    c, vocab = draft.config, draft.target.vocab
    scores = c.vocab if draft.family in ("eagle3", "peagle", "medusa") and draft.draft_vocab is None else 0
    embeds = c.embed_vocab if isinstance(c, Eagle3Config) else 0
    for verb, tokens in (("scores", scores), ("embeds", embeds)):
        if tokens not in (0, vocab):
            raise ValueError(f"the head {verb} {tokens:,} tokens and the target has {vocab:,}: it is another's")


def write_rendered(folder: Path, tensors: Tensors, fields: Fields) -> None:
    """Write `model.safetensors` and `config.json` into a folder that is there."""
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields, indent=2, allow_nan=False) + "\n", encoding="utf-8")
