"""The project's own recipe (`best`) for Llama-3-8B-Instruct, on 64 chips, as long as `hass_llama3_8b`.

Muon's rate is not searched at this size: it is to that of `fspad_llama3_8b` as the small recipes' rates are, for a step
of either optimizer changes a weight by as much whatever the width.
"""

import dataclasses

from jaxspec.config import CheckpointConfig, load

base, small = load("hass_llama3_8b"), load("best")
rate = small.optimizer.peak_lr / load("fspad").optimizer.peak_lr * load("fspad_llama3_8b").optimizer.peak_lr
config = dataclasses.replace(
    base,
    name="best_llama3_8b",
    drafter=small.drafter,
    head=small.head,
    optimizer=dataclasses.replace(base.optimizer, kind=small.optimizer.kind, peak_lr=rate),
    checkpoint=CheckpointConfig("runs/best_llama3_8b", save_every=None, save_minutes=15),
    export_folder="runs/best_llama3_8b/drafter",
)
