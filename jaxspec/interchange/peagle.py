"""P-EAGLE heads as speculators and SpecForge publish them and vLLM loads them.

Tensors are named as EAGLE-3's, with numbered layers. Mask tokens read `mask_hidden` in place of the target's auxiliary
hidden states. The id of their token is called `mask_token_id` (speculators), `ptd_token_id` or `pard_token` (vLLM).
"""

from __future__ import annotations

from jaxspec.drafters.peagle import PEagleConfig
from jaxspec.interchange.eagle3 import LayerIds, eagle3_table, fuses_taps, head_fields
from jaxspec.interchange.layout import Folder, Shapes, Table, TensorEntry, layer_table, vector
from jaxspec.targets.stored import whole

MASK_IDS = ("mask_token_id", "pard_token", "ptd_token_id")
TOKENS = "num_lookahead_tokens"
"""vLLM's name for the number of tokens drafted in a pass, in a config.json that is not speculators'."""


def is_peagle(shapes: Shapes) -> bool:
    """Returns whether a head of EAGLE-3's layout has the feature of mask tokens."""
    return fuses_taps(shapes) and "mask_hidden" in shapes


def peagle_config(
    folder: Folder, target_layers: int | None = None, layer_ids: LayerIds | None = None, tokens: int | None = None
) -> PEagleConfig:
    """Returns the shape of the head, which drafts `tokens` in a pass; the default is in its config.json.

    Raises ValueError as `eagle3.head_fields`, if layers are missing, and if config.json lacks the number of tokens or
    the id of the mask token.
    """
    raw, path = folder.config, folder.path / "config.json"
    said = tokens or _speculative_tokens(raw) or raw.get(TOKENS)
    if type(said) is not int:
        raise ValueError(
            f"{path} does not say how many tokens the head drafts in a pass: say it to `jaxspec import drafter` by "
            "--tokens"
        )
    mask, vocab = next((raw[name] for name in MASK_IDS if raw.get(name) is not None), None), raw.get("vocab_size")
    if type(mask) is not int or type(vocab) is not int or not 0 <= mask < vocab:
        raise ValueError(
            f"{path}: {MASK_IDS[0]}={mask!r} must be the id, below vocab_size={vocab!r}, of the mask token"
        )
    layers = 1 + sum(f"layers.{i}.mlp.down_proj.weight" in folder.tensors for i in range(1, len(folder.tensors)))
    if raw.get("num_hidden_layers", layers) != layers:
        raise ValueError(
            f"{path}: num_hidden_layers={raw['num_hidden_layers']!r}, and the weights are of {layers} layers"
        )
    fields = head_fields(folder, target_layers, layer_ids, embeds=True)
    fields["normed_feature"] = False  # it drafts in one pass, and never reads a feature of its own
    return PEagleConfig(**fields, tokens=said, layers=layers, mask_token=mask)


def _speculative_tokens(raw: dict) -> object:
    """Returns the number of tokens that the head proposes by speculators' config; None if it does not say."""
    try:
        return raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    except (KeyError, IndexError, TypeError):
        return None


def peagle_tables(
    c: PEagleConfig, prefix: str = "layers.0.", mask_shape: tuple[int, ...] | None = None
) -> tuple[Table, list[Table]]:
    """Returns the tensors of the head without its upper layers, and those of each upper layer.

    `mask_hidden` is stored as `[1, 1, E]`, and by some writers as `[1, E]`.
    """
    size = c.shapes()["mask_feature"][0]
    mask = TensorEntry("mask_feature", whole, mask_shape if mask_shape in ((1, size), (size,)) else (1, 1, size))
    return {**eagle3_table(c, prefix), "mask_hidden": mask}, [_upper_table(c, i) for i in range(1, c.layers)]


def _upper_table(c: PEagleConfig, layer: int) -> Table:
    prefix, shapes = f"layers.{layer}.", c.upper_shapes()
    norm = {f"{prefix}input_layernorm.weight": vector("attention_norm", shapes)}
    return norm | layer_table(prefix, c, shapes)
