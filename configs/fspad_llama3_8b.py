"""FSPAD for Llama-3-8B-Instruct on 64 chips: EAGLE's losses on the halves of its output, 5e-5 instead of 3e-5."""

import dataclasses

from jaxspec.config import CheckpointConfig, load

base = load("eagle2_llama3_8b")
config = dataclasses.replace(
    base,
    name="fspad_llama3_8b",
    drafter="fspad",
    optimizer=dataclasses.replace(base.optimizer, peak_lr=1.4e-4),
    checkpoint=CheckpointConfig("runs/fspad_llama3_8b", save_every=None, save_minutes=15),
    export_folder="runs/fspad_llama3_8b/drafter",
)
