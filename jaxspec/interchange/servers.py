"""Programs that load drafters: what each can serve, and the tensors and config.json that it reads.

A drafter that a program cannot serve is refused with the reason before anything is written, and so is a tensor that
the program would not read, or that it lacks. `Server.version` is the version whose behaviour is assumed; none of the
programs was run here.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import save_file

from jaxspec import __version__
from jaxspec.drafters.eagle import EagleConfig
from jaxspec.drafters.eagle3 import Eagle3Config, default_taps
from jaxspec.drafters.peagle import PEagleConfig
from jaxspec.interchange import forms
from jaxspec.interchange.forms import ConfigFields, Draft, Eagle3Layout, Form, Tensors


class Server(NamedTuple):
    """A program that loads drafters."""

    version: str
    """The version whose behaviour is assumed."""
    forms: dict[str, Form]
    """By family."""
    refusals: dict[str, str]
    """Family -> why it cannot be served, for families that a user might expect."""


_NO_FSPAD = (
    "no server has FSPAD's network; `--to eagle` writes it as its authors' code reads it, and a head trained with "
    "head.feature_sampling=false head.partial_alignment=false is an EAGLE head, which sglang and vllm serve"
)
_NO_PARALLEL = "no server has ParallelSpec's network, and no code of its authors is public"
_NO_PEAGLE = "it drafts step by step, and this head in one pass; vllm and speculators have P-EAGLE"
_NO_EAGLE = "it has no EAGLE-1/2 model class (HASS heads are of that class too); an EAGLE-3 head can be served"
_NO_MEDUSA = "it serves no Medusa heads; vllm does"
_NOT_PUBLISHED = "only EAGLE, HASS, EAGLE-3 and FSPAD heads are read by that code"
_SPECULATORS = "0.9.0"

_LLAMA, _EAGLE3 = "LlamaForCausalLM", "LlamaForCausalLMEagle3"
_SGLANG_EAGLE = functools.partial(forms.eagle_fields, architecture="LlamaForCausalLMEagle", bias=True)
_SPECULATORS_FORM = Eagle3Layout("layers.0.", maps=True, embedding=True).form(
    functools.partial(forms.speculators_fields, version=_SPECULATORS)
)

SERVERS: dict[str, Server] = {
    "eagle": Server(
        "SafeAILab/EAGLE cb7e084; HArmonizedSS/HASS 38922e4; Luc4Gui/FSPAD 1c2df5e",
        {
            "eagle": Form(
                forms.eagle_keys({"embed_tokens.weight"}, {"fc.bias"}),
                forms.eagle_tensors_with_embedding,
                functools.partial(forms.eagle_fields, architecture=_LLAMA),
            ),
            "eagle3": Eagle3Layout().form(forms.eagle3_fields(_LLAMA, forms.default_ids)),
            "fspad": forms.FSPAD_FORM,
        },
        {"medusa": _NOT_PUBLISHED, "parallelspec": _NO_PARALLEL, "peagle": _NO_PEAGLE, "draft_lm": _NOT_PUBLISHED},
    ),
    "sglang": Server(
        "SGLang, sources of November 2026",
        {
            "eagle": Form(forms.eagle_keys({"fc.bias"}), forms.eagle_tensors_with_zero_bias, _SGLANG_EAGLE),
            "eagle3": Eagle3Layout().form(forms.eagle3_fields(_EAGLE3, forms.ids_by_output)),
        },
        {"fspad": _NO_FSPAD, "parallelspec": _NO_PARALLEL, "peagle": _NO_PEAGLE, "medusa": _NO_MEDUSA},
    ),
    "vllm": Server(
        "vLLM, sources of November 2026",
        {
            "eagle": Form(
                forms.eagle_keys(set(), {"embed_tokens.weight"}),
                forms.eagle_tensors_without_bias,
                functools.partial(forms.llama_fields, architecture=_LLAMA),
            ),
            "eagle3": Eagle3Layout().form(forms.eagle3_fields(_EAGLE3, forms.ids_by_input)),
            "peagle": Eagle3Layout("layers.0.").form(forms.vllm_peagle_fields),
            "medusa": forms.MEDUSA_FORM,
        },
        {"fspad": _NO_FSPAD, "parallelspec": _NO_PARALLEL},
    ),
    "speculators": Server(
        _SPECULATORS,
        dict.fromkeys(("eagle3", "peagle"), _SPECULATORS_FORM),
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
        {"eagle3": Eagle3Layout().form(forms.eagle3_fields(_EAGLE3, forms.default_ids))},
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
        {"eagle3": Eagle3Layout().form(forms.eagle3_fields(_LLAMA, forms.default_ids))},
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
"""Name -> the program of that name, as `jaxspec export --to` takes it."""
LM_SERVERS = ("sglang", "vllm", "sglang-jax")
"""Programs that draft with an ordinary LM's folder (STANDALONE, draft_model)."""

NORM_FIRST = ("vllm", "speculators", "tpu-inference")
"""Programs that apply an EAGLE-3 head's `norm_before_residual`."""
MORE_NORMS = ("vllm", "speculators")
"""Programs that apply `norm_before_fc` (vLLM pull request 36545), and 3.1's `fc_norm` and `norm_output` (42764)."""
NORMED_QUERIES = ("speculators",)
"""Programs that build heads of Qwen3's layers, whose queries and keys are normed."""
OWN_EMBEDDING = ("vllm", "speculators")
"""Programs that read the head's own embedding even if it is as wide as the target's."""
OWN_TABLE = ("vllm", "eagle")
"""Programs that read an EAGLE head's own embedding (vLLM since pull request 28549); SGLang puts the target's in its
place."""
OTHER_WIDTH = ("eagle", "sglang", "vllm")
"""Programs that read `target_hidden_size`."""
SKIPS_FC = ("eagle", "sglang")
"""Programs that leave out `fc` if its input is as wide as its output."""
DEFAULT_LAYERS = ("eagle", "sglang-jax", "tpu-inference")
"""Programs that read the default three layers, whatever the file says."""


def served_as(family: str, config: Any) -> str:
    """Returns the family that a drafter is written as: FSPAD without its two parts is an EAGLE head."""
    plain = family == "fspad" and not config.feature_sampling and not config.partial_alignment
    return "eagle" if plain else family


def unserved(server: str, family: str, config: Any, draft_vocab: tuple[int, ...] | None = None) -> str | None:
    """Returns why a program does not serve a drafter, whatever its target is; None if it does."""
    about, family = SERVERS[server], served_as(family, config)
    if family not in about.forms:
        return f"{server} cannot serve {family}: {about.refusals.get(family, 'it has no layout for such a drafter')}"
    if family != "medusa" and not _reads_biases(server, family, config):
        return f"{server} is not known to read biases of the attention such as this head has"
    if family != "medusa" and config.qk_norm and server not in NORMED_QUERIES:
        return f"{server} is not known to norm a head's queries and keys, as Qwen3's layers do"
    match family:
        case "eagle" | "fspad":
            return _unserved_eagle(server, family, config)
        case "eagle3" | "peagle":
            return _unserved_eagle3(server, config)
    if draft_vocab is not None:
        return f"{server} reads a truncated vocabulary of Medusa heads from a token_map, which is not written here"
    return None


def _reads_biases(server: str, family: str, config: Any) -> bool:
    """Returns whether a program reads the biases of a head's attention."""
    # All four biases together are `attention_bias`; EAGLE's own code alone reads those of queries, keys and values.
    if config.qkv_bias and config.out_bias:
        return server in ("vllm", "speculators") and family in ("eagle3", "peagle")
    return not config.out_bias and (not config.qkv_bias or server == "eagle")


def _unserved_eagle(server: str, family: str, config: Any) -> str | None:
    if config.head_norm:
        return (
            f"{server} has no norm between a head's layer and the LM head, and would draft without this head's: only "
            "orbax holds it; train with head.head_norm=false"
        )
    if (config.embedding_norm or config.embed_vocab) and server not in OWN_TABLE:
        others = " or ".join(name for name in OWN_TABLE if family in SERVERS[name].forms)
        told, setting = "an embedding of its own", "with one that reads the target's"
        if config.embedding_norm:
            told, setting = "normed embeddings", "with head.embedding_norm=false"
        return (
            f"{server} reads with the target's embedding in any case, and this head reads {told}: choose {others}, "
            f"where the table that it reads travels with it, or train {setting}"
        )
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
    """Returns whether `taps` are the default layers of a target of some depth."""
    try:
        return taps == default_taps(taps[-1] + 3)
    except ValueError:
        return False


def render(server: str, draft: Draft) -> tuple[Tensors, ConfigFields]:
    """Returns the tensors and the config.json of a drafter for a program.

    Raises ValueError with the reason if the program cannot serve it, or a tensor is missing or extra.
    """
    if reason := unserved(server, draft.family, draft.config, draft.draft_vocab):
        raise ValueError(reason)
    about, family = SERVERS[server], served_as(draft.family, draft.config)
    form = about.forms[family]
    _check_tokens(draft)
    tensors, fields = form.tensors(draft), form.fields(draft)
    form.keys(draft).check(tensors, server)
    stamp: ConfigFields = {"version": __version__, "written_for": server, "assumes": about.version, "family": family}
    if family == "eagle":
        stamp["fc_bias"] = draft.config.bias and not (server == "vllm" and forms.has_bias(draft))
    if family in ("eagle", "fspad"):
        moved = server == "vllm" and forms.has_bias(draft)
        stamp["own_embedding"] = forms.own_table(draft) or moved
    return tensors, {**fields, "jaxspec": stamp}


def _check_tokens(draft: Draft) -> None:
    """Raises ValueError if the head's own embedding or LM head has another number of tokens than the target."""
    c, vocab = draft.config, draft.target.vocab
    scores = c.vocab if draft.family in ("eagle3", "peagle", "medusa") and draft.draft_vocab is None else 0
    embeds = c.embed_vocab if isinstance(c, EagleConfig) else 0
    for verb, tokens in (("scores", scores), ("embeds", embeds)):
        if tokens not in (0, vocab):
            raise ValueError(
                f"the head {verb} {tokens:,} tokens and the target has {vocab:,}: it is for another target"
            )


def write_rendered(folder: Path, tensors: Tensors, fields: ConfigFields) -> None:
    """Writes `model.safetensors` and `config.json` into an existing folder."""
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields, indent=2, allow_nan=False) + "\n", encoding="utf-8")
