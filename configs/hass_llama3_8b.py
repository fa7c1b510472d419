"""HASS for Llama-3-8B-Instruct: three steps and the top-10 loss, on 64 chips.

The paper's script trains 40 epochs at 3e-5 without the top-k loss and 10 with it at a third of that; this is one run of
the same length, 2.65 + 0.7 million dialogues, whose rate has fallen to a fifth where that loss joins.
"""

import dataclasses

from jaxspec.config import CheckpointConfig, load
from jaxspec.distillation.objective import Objective

base = load("eagle2_llama3_8b")
config = dataclasses.replace(
    base,
    name="hass_llama3_8b",
    optimizer=dataclasses.replace(base.optimizer, steps=26_200),
    objective=Objective(
        steps=3,
        weights=(("smooth_l1", 1.0), ("soft_cross_entropy", 0.1), ("top_k:10", 1.0)),
        late=(("top_k:10", 0.8),),
    ),
    checkpoint=CheckpointConfig("runs/hass_llama3_8b", save_every=None, save_minutes=15),
    export_folder="runs/hass_llama3_8b/drafter",
)
