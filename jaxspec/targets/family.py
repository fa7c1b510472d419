"""What a family of targets is to the readers of HuggingFace folders: a name, a config, and the tensors of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxspec.layers import PLAIN, Options
from jaxspec.targets.fields import Fields
from jaxspec.targets.llama import DecoderConfig, LlamaConfig
from jaxspec.targets.stored import Tensors, llama_layer


class Family(NamedTuple):
    """A family as its `config.json` names it."""

    model_type: str
    architecture: str
    config: Callable[[Fields], LlamaConfig]
    """ValueError where a field says what is not supported."""
    layer: Callable[[LlamaConfig], Tensors] = llama_layer
    """The tensors of one layer."""
    defaults: Mapping[str, Any] = MappingProxyType({})
    """What transformers takes for absent fields; config.json may leave out whatever equals its default."""


# What most families take for absent fields.
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def read_shape(fields: Fields, rope_of: str | None = None) -> dict[str, Any]:
    """What every family has, as arguments of `LlamaConfig`.

    `rope_of` is the kind of layers whose rotary positions count, in a family where each kind has its own.
    """
    layer = fields.layer_shape()
    rope, positions = fields.rope(layers=rope_of), fields.integer("max_position_embeddings")
    scaling = rope.scaling(int(layer["head_dim"] * rope.part), positions)
    if scaling is not None and scaling.kind == "longrope":
        positions = min(positions, scaling.original_positions)
    return {
        **layer,
        "vocab": fields.integer("vocab_size"),
        "layers": fields.integer("num_hidden_layers"),
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "tied": fields.flag("tie_word_embeddings"),
        "max_positions": positions,
        "bos_id": fields.token("bos_token_id"),
        "eos_ids": fields.stop_ids(),
        "pad_id": fields.pad_id(),
    }


def decoder(fields: Fields, family: str, options: Options = PLAIN, rope_of: str | None = None) -> DecoderConfig:
    """The config of a model of this family."""
    return DecoderConfig(**read_shape(fields, rope_of), family=family, options=options)


def window_everywhere(fields: Fields) -> tuple[int | None, ...]:
    """The windows of a family whose layers all have `sliding_window`, where it is set."""
    window = fields.optional_integer("sliding_window")
    return () if window is None else (window,) * fields.integer("num_hidden_layers")


def window_above(fields: Fields) -> tuple[int | None, ...]:
    """Qwen's windows: with `use_sliding_window`, of the layers from `max_window_layers` on."""
    if not fields.flag("use_sliding_window"):
        return ()
    first = fields.find("max_window_layers")
    local = [i >= first for i in range(fields.integer("num_hidden_layers"))]
    return fields.windows(fields.optional_integer("sliding_window"), local)


def _llama(fields: Fields) -> LlamaConfig:
    for name in ("attention_bias", "mlp_bias"):
        if fields.flag(name):
            raise ValueError(
                f"{fields.path}: {name}={fields.find(name)!r} is not supported; only projections without bias are"
            )
    if fields.activation() != "silu":
        raise ValueError(f"{fields.path}: hidden_act={fields.find('hidden_act')!r} is not supported; only 'silu' is")
    return LlamaConfig(**read_shape(fields))


LLAMA = Family("llama", "LlamaForCausalLM", _llama, defaults={**DEFAULTS, "bos_token_id": 1, "eos_token_id": 2})
