"""The fields of a HuggingFace folder's `config.json`. Every error names file, field and value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxspec.nn.mlp import ACTIVATIONS
from jaxspec.nn.rope import RopeScaling
from jaxspec.targets.rope_places import ORIGINAL, Sources, find_rope

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
"""Kinds of rotary scaling that are read."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """`config.json` as it stands, and the family's defaults for fields that it leaves out.

    The readers raise ValueError for a value that is not supported.
    """

    path: Path
    raw: Mapping[str, Any]
    generation: Mapping[str, Any]
    """`generation_config.json`; empty where there is none."""
    defaults: Mapping[str, Any]

    def find(self, name: str) -> Any:
        """Returns the value of a field; the family's default where it is absent."""
        return self.raw.get(name, self.defaults.get(name))

    def integer(self, name: str, default: Any = None) -> int:
        """Reads a positive whole number; where the field is absent or null, the family's default, then `default`."""
        value = self.defaults.get(name) if self.raw.get(name) is None else self.raw[name]
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.path} has no field {name}, which the model's shape needs")
        whole = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not whole or value != int(value) or value < 1:
            raise ValueError(f"{self.path}: {name}={value!r} must be a positive whole number")
        return int(value)

    def optional_integer(self, name: str) -> int | None:
        """Reads a positive whole number; None where the field is null."""
        return None if self.find(name) is None else self.integer(name)

    def number(self, name: str) -> float:
        """Reads a positive number."""
        return self.positive(name, self.find(name))

    def optional_number(self, name: str) -> float | None:
        """Reads a positive number; None where the field is null."""
        return None if self.find(name) is None else self.number(name)

    def positive(self, name: str, value: Any) -> float:
        """Returns `value`, of the field called `name`, if it is a positive number; raises ValueError if not."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            raise ValueError(f"{self.path}: {name}={value!r} must be a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        """Returns whether a field is set."""
        return bool(self.find(name))

    def token(self, name: str) -> int | None:
        """Reads a token id; None where it is absent, or -1, as in early Llama files."""
        value = self.find(name)
        return value if isinstance(value, int) and value >= 0 else None

    def stop_ids(self) -> tuple[int, ...]:
        """Returns the ids that end a text: those of `generation_config.json`, else those of `config.json`."""
        generation = _ids(self.path.with_name("generation_config.json"), self.generation.get("eos_token_id"))
        return generation or _ids(self.path, self.find("eos_token_id"))

    def pad_id(self) -> int | None:
        """Returns the padding token of either file; None where neither has one."""
        value = self.generation.get("pad_token_id") if self.find("pad_token_id") is None else self.find("pad_token_id")
        return value if isinstance(value, int) and value >= 0 else None

    def activation(self, name: str = "hidden_act") -> str:
        """Reads the MLP's activation, one of `ACTIVATIONS`."""
        value = self.find(name)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"{self.path}: {name}={value!r} is not supported; supported: {known}")
        return value

    def windows(self, window: int | None, default: list[bool]) -> tuple[int | None, ...]:
        """Returns each layer's window: those that `layer_types` calls sliding have one, else those of `default`."""
        kinds = self.raw.get("layer_types")
        if kinds is None:
            local = default
        elif isinstance(kinds, list) and len(kinds) == len(default):
            local = [kind == "sliding_attention" for kind in kinds]
            if unknown := next((k for k in kinds if k not in ("sliding_attention", "full_attention")), None):
                raise ValueError(
                    f"{self.path}: {unknown!r} in layer_types is not supported; supported: 'full_attention' and "
                    "'sliding_attention'"
                )
        else:
            raise ValueError(f"{self.path}: layer_types={kinds!r} must list a kind for each of {len(default)} layers")
        return tuple(window if here else None for here in local) if window is not None and any(local) else ()

    def layer_shape(self) -> dict[str, Any]:
        """Returns width, heads, MLP and norm of a decoder layer, as fields of `LlamaConfig` and drafters' configs."""
        heads, width = self.integer("num_attention_heads"), self.integer("hidden_size")
        if self.find("head_dim") is None and width % heads:
            raise ValueError(
                f"{self.path}: hidden_size={width} is not a multiple of num_attention_heads={heads}: set head_dim"
            )
        return {
            "width": width,
            "heads": heads,
            "kv_heads": self.integer("num_key_value_heads", heads),
            "head_dim": self.integer("head_dim", width // heads),
            "mlp": self.integer("intermediate_size"),
            "norm_eps": self.number("rms_norm_eps"),
        }

    def rope(self, *, layers: str | None = None, theta: str = "rope_theta") -> Rope:
        """Returns the rotary fields; those of the kind of layers `layers` where each kind has its own.

        See `rope_places.find_rope`. Raises ValueError as it does, and where only a part of each head is rotated in a
        family without such a part.
        """
        found = find_rope(Sources(self.path, self.raw, self.defaults), layers, theta=theta)
        part = 1 if found.part is None else found.part
        if part != 1 and "partial_rotary_factor" not in self.defaults:
            raise ValueError(f"{self.path}: partial_rotary_factor={part!r} is not supported; only 1 is")
        base, part = self.positive("rope_theta", found.theta), self.positive("partial_rotary_factor", part)
        return Rope(self, found.field, found.values, base, part, found.original)


def _ids(path: Path, value: Any) -> tuple[int, ...]:
    """Reads a token id, a list of them, or null."""
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in listed):
        raise ValueError(f"{path}: eos_token_id={value!r} must be a token id or a list of them")
    return tuple(dict.fromkeys(listed))


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary fields of a `config.json`, read from `field` of `fields`."""

    fields: Fields
    field: str
    """Name of the field that they stand in."""
    values: Mapping[str, Any]
    theta: float
    part: float
    """Share of a head's channels that is rotated."""

    original: Any = None
    """The length before it is stretched, where the file gives it."""

    @property
    def kind(self) -> str:
        """The kind of scaling."""
        return self.values.get("rope_type", "default")

    def number(self, name: str) -> float:
        """Reads a positive number that this kind of scaling needs; raises ValueError where it is absent."""
        value = self.values.get(name)
        if value is None:
            raise ValueError(
                f"{self.fields.path}: {self.field} has no field {name}, which rope_type {self.kind!r} needs"
            )
        return self.fields.positive(f"{self.field}.{name}", value)

    def original_length(self, positions: int) -> float:
        """Returns the length before it is stretched: the model's positions where the file gives none."""
        return positions if self.original is None else self.fields.positive(ORIGINAL, self.original)

    def stretched_length(self, positions: int) -> float:
        """Returns `original_length`, of which a logarithm is taken; raises ValueError for a length of one token."""
        original = self.original_length(positions)
        if original <= 1:
            raise ValueError(f"{self.fields.path}: {ORIGINAL}={original:g} must be above 1 for rope_type {self.kind!r}")
        return original

    def optional(self, name: str) -> float | None:
        """Reads a positive number; None where it is absent."""
        return None if self.values.get(name) is None else self.number(name)

    def scaling(self, channels: int, positions: int) -> RopeScaling | None:
        """Returns the scaling of `channels` rotated channels in a model of so many positions; None: no scaling."""
        kind = self.kind
        if kind == "default":
            return None
        if kind == "linear":
            return RopeScaling("linear", self.number("factor"))
        if kind == "dynamic":
            return RopeScaling(kind, self.number("factor"), original_positions=positions)
        if kind == "llama3":
            original = int(self.original_length(positions))
            low, high = self.number("low_freq_factor"), self.number("high_freq_factor")
            return RopeScaling(kind, self.number("factor"), low, high, original)
        if kind == "yarn":
            return self._yarn(channels, positions)
        if kind == "longrope":
            return self._longrope(channels, positions)
        known = ", ".join(map(repr, ROPE_KINDS))
        raise ValueError(f"{self.fields.path}: rope_type={kind!r} in {self.field} is not supported; supported: {known}")

    def _yarn(self, channels: int, positions: int) -> RopeScaling:
        """Reads the fields of YaRN (arXiv 2309.00071, section 3.2)."""
        original = self.stretched_length(positions)
        if self.theta <= 1:
            raise ValueError(f"{self.fields.path}: rope_theta={self.theta:g} must be above 1 for rope_type 'yarn'")
        # A factor that is null is the ratio of the two lengths; one that is absent is forgotten.
        null = "factor" in self.values and self.values["factor"] is None
        factor = positions / original if null else self.number("factor")
        turns = self.optional("beta_fast") or 32.0, self.optional("beta_slow") or 1.0
        # The channel pairs that turn so often within the original length.
        low, high = (channels * math.log(original / (t * 2 * math.pi)) / (2 * math.log(self.theta)) for t in turns)
        truncate = bool(self.values.get("truncate", True))
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, channels - 1)
        over, under = self.optional("mscale"), self.optional("mscale_all_dim")
        usual = _yarn_amplitude(factor, 1.0)
        if over and under:
            usual = _yarn_amplitude(factor, over) / _yarn_amplitude(factor, under)
        return RopeScaling(
            "yarn", factor, original_positions=int(original), low=low, high=high + 0.001 * (low == high),
            turns=turns, truncate=truncate, amplitude=self.optional("attention_factor") or usual,
        )  # fmt: skip

    def _longrope(self, channels: int, positions: int) -> RopeScaling:
        """Reads the fields of LongRoPE (arXiv 2402.13753)."""
        # Short factors count up to the original length, long ones beyond, as in transformers.
        original = self.stretched_length(positions)
        factor = self.optional("factor") or positions / original
        return RopeScaling(
            "longrope", factor, original_positions=int(original), factors=self._each("short_factor", channels // 2),
            long_factors=self._each("long_factor", channels // 2),
            amplitude=self.optional("attention_factor") or longrope_amplitude(factor, original),
        )  # fmt: skip

    def _each(self, name: str, pairs: int) -> tuple[float, ...]:
        """Reads one number for each rotated pair of channels."""
        factors = self.values.get(name)
        if not isinstance(factors, list) or len(factors) != pairs:
            raise ValueError(
                f"{self.fields.path}: {self.field}.{name} must list {pairs} numbers, one a rotated pair of channels, "
                "for rope_type 'longrope'"
            )
        return tuple(self.fields.positive(f"{self.field}.{name}", f) for f in factors)


def _yarn_amplitude(factor: float, scale: float) -> float:
    """Returns the factor of queries and keys in texts stretched by `factor` (YaRN, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def longrope_amplitude(factor: float, original: float) -> float:
    """Returns the factor of queries and keys in texts `factor` times the original length, where no field gives it."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def rope_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Returns the fields that `Rope.scaling` reads as this scaling; None for None."""
    if scaling is None:
        return None
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind not in ("linear", "dynamic"):
        fields[ORIGINAL] = scaling.original_positions
    if scaling.kind == "llama3":
        fields |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        fast, slow = scaling.turns
        fields |= {"beta_fast": fast, "beta_slow": slow, "truncate": scaling.truncate}
    if scaling.kind == "longrope":
        fields |= {"short_factor": list(scaling.factors), "long_factor": list(scaling.long_factors)}
    if scaling.kind in ("yarn", "longrope"):
        fields["attention_factor"] = scaling.amplitude
    return fields
