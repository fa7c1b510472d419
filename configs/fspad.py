"""FSPAD: feature sampling and partial alignment, with EAGLE's losses on the halves of its output.

Its optimizer settings: EAGLE's rate times 5/3 (5e-5 there), betas 0.9 and 0.95, weight decay 0.01, clipping by value.
Twice the drafter parameters of EAGLE-2 at the same width.
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective

config = DistillConfig(
    name="fspad",
    target="tiny",
    drafter="fspad",
    data=DataConfig(
        train="runs/answers.jsonl", eval="runs/answers_eval.jsonl", length=512, batch=2, loss_on="assistant"
    ),
    optimizer=OptimizerConfig(
        peak_lr=5e-3, warmup_steps=100, epochs=3, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(),
    checkpoint=CheckpointConfig("runs/fspad", save_every=100),
    export_folder="runs/fspad/drafter",
)
