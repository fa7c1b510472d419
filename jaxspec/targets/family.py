"""A family of targets, as readers and writers of HuggingFace folders know it: its name, traits and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxspec.nn.options import Options
from jaxspec.targets.decoder import DecoderConfig, LlamaConfig
from jaxspec.targets.fields import Fields, rope_fields
from jaxspec.targets.stored import Tensors, llama_layer
from jaxspec.targets.traits import Trait


class Family(NamedTuple):
    """A family of targets. Its traits and tensors serve reading and writing alike."""

    model_type: str
    architecture: str
    traits: tuple[Trait, ...]
    """The departures from Llama that its `config.json` describes, as `Options`."""
    layer: Callable[[LlamaConfig], Tensors] = llama_layer
    """Returns the tensors of one layer."""
    defaults: Mapping[str, Any] = MappingProxyType({})
    """Values of absent fields in transformers; config.json may leave out a field that equals its default."""
    rope_of: str | None = None
    """The kind of layers whose rotary positions are the model's, in a family where each kind has its own."""

    def config(self, fields: Fields) -> LlamaConfig:
        """Returns the config that a `config.json` of this family describes; ValueError for unsupported values."""
        shape = read_shape(fields, self.rope_of)
        options = Options(**{name: value for trait in self.traits for name, value in trait.read(fields).items()})
        if self.model_type == "llama":
            return LlamaConfig(**shape)
        return DecoderConfig(**shape, family=self.model_type, options=options)

    def fields(self, config: LlamaConfig) -> dict[str, Any]:
        """Returns the fields that `config` reads, in the spellings of transformers 5 and of older readers."""
        fields = {"architectures": [self.architecture], "model_type": self.model_type, **write_shape(config)}
        for trait in self.traits:
            fields |= trait.write(config)
        return fields


DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
"""Values of absent fields in most families."""


def read_shape(fields: Fields, rope_of: str | None = None) -> dict[str, Any]:
    """Returns the fields that every family has, as arguments of `LlamaConfig`.

    `rope_of` is the kind of layers whose rotary positions are the model's, in a family where each kind has its own.
    """
    layer = fields.layer_shape()
    rope, positions = fields.rope(layers=rope_of), fields.integer("max_position_embeddings")
    scaling = rope.scaling(int(layer["head_dim"] * rope.part), positions)
    if scaling is not None and scaling.kind == "dynamic":
        positions = int(positions * scaling.factor)  # the field is the length before it is stretched
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


def write_shape(config: LlamaConfig) -> dict[str, Any]:
    """Returns the fields that `read_shape` reads; the rotary ones have their older names too."""
    scaling, stop = rope_fields(config.rope_scaling), list(config.eos_ids) or None
    positions = config.max_positions
    if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
        positions = config.rope_scaling.original_positions
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": positions,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": stop[0] if stop and len(stop) == 1 else stop,
        "pad_token_id": config.pad_id,
        # transformers 5 reads rope_parameters; version 4, and most others, the two older fields.
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }
