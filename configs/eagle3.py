"""EAGLE-3: three fused layers of the target, trained over five of its own steps, its own LM head, no feature loss.

The reference unrolls seven steps; five are what two CPU cores have time for. Step `j` counts `0.8^j`.
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective

config = DistillConfig(
    name="eagle3",
    target="tiny",
    drafter="eagle3",
    data=DataConfig(
        train="runs/answers.jsonl", eval="runs/answers_eval.jsonl", length=512, batch=2, loss_on="assistant"
    ),
    optimizer=OptimizerConfig(
        peak_lr=3e-3, warmup_steps=100, epochs=3, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(steps=5, weights=(("soft_cross_entropy", 1.0),), step_decay=0.8, noise=0.0),
    checkpoint=CheckpointConfig("runs/eagle3", save_every=100),
    export_folder="runs/eagle3/drafter",
)
