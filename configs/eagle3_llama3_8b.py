"""EAGLE-3 for Llama-3-8B-Instruct on 64 chips: seven of its own steps, 32,000 tokens scored.

Make the draft vocabulary first (`jaxspec draft-vocab`). The released settings: AdamW at 5e-5 without weight decay,
12,000 of 800,000 updates of 16 dialogues for warm-up, the gradient's norm clipped to 0.5.
"""

import dataclasses

from jaxspec.config import CheckpointConfig, OptimizerConfig, load
from jaxspec.distillation.objective import Objective

base = load("eagle2_llama3_8b")
config = dataclasses.replace(
    base,
    name="eagle3_llama3_8b",
    drafter="eagle3",
    draft_vocab="models/llama3-8b/draft_vocab.safetensors",
    optimizer=OptimizerConfig(peak_lr=1.4e-4, warmup_steps=1500, steps=100_000, clip_norm=0.5, schedule="linear"),
    objective=Objective(steps=7, weights=(("soft_cross_entropy", 1.0),), step_decay=0.8, noise=0.0),
    checkpoint=CheckpointConfig("runs/eagle3_llama3_8b", save_every=None, save_minutes=15),
    export_folder="runs/eagle3_llama3_8b/drafter",
)
