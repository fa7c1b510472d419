"""Draft logits of heads as the package `speculators` computes them: a program for an environment that has it.

Arguments: folders of heads in its layout. Into each, for the arrays of its `inputs.npz`, it writes `logits.npz`: of an
EAGLE-3 head those of its draft steps, of a P-EAGLE head those of its slots, with each slot's anchor and depth.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speculators import SpeculatorModel, SpeculatorModelConfig  # pyright: ignore[reportMissingImports]
from speculators.models.peagle import core  # pyright: ignore[reportMissingImports]

STEPS = 3


class Enough(Exception):
    """The logits are there; what would follow is the loss."""


def draft(folder: Path) -> dict[str, Any]:
    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"  # theirs is made for accelerators
    model = SpeculatorModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    given = {name: torch.from_numpy(array)[None] for name, array in np.load(folder / "inputs.npz").items()}
    given["document_ids"] = torch.zeros_like(given["input_ids"])
    logits: list[np.ndarray] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output[0].numpy()))
    if type(model).__name__ != "PEagleDraftModel":
        model(**given, ttt_steps=STEPS)
        return {"logits": np.stack(logits)}
    slots: list[Any] = []
    sample = core.generate_cod_sample_indices

    def sample_and_tell(**how: Any) -> Any:
        slots.extend(sample(**how))
        return slots

    def stop(*_: Any) -> None:
        raise Enough

    core.generate_cod_sample_indices = sample_and_tell
    model.verifier_norm.register_forward_pre_hook(stop)
    try:
        model(**given, verifier_last_hidden_states=given["hidden_states"], num_depths=STEPS)
    except Enough:
        pass
    core.generate_cod_sample_indices = sample
    return {"logits": logits[0], "anchor": slots[0].numpy(), "depth": slots[1].numpy()}


with torch.no_grad():
    for name in sys.argv[1:]:
        np.savez(Path(name) / "logits.npz", **draft(Path(name)))
