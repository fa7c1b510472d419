"""HASS as its script has it, second stage: on from `hass_stage1` with the top-10 loss at a third of its rate.

The script gives it a quarter of the first stage's epochs.
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective

config = DistillConfig(
    name="hass_stage2",
    target="tiny",
    init_from="runs/hass_stage1/drafter",
    data=DataConfig(
        train="runs/answers.jsonl", eval="runs/answers_eval.jsonl", length=512, batch=2, loss_on="assistant"
    ),
    optimizer=OptimizerConfig(
        peak_lr=1.7e-3, warmup_steps=100, epochs=3, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(steps=3, weights=(("smooth_l1", 1.0), ("soft_cross_entropy", 0.1), ("top_k:10", 1.0))),
    checkpoint=CheckpointConfig("runs/hass_stage2", save_every=100),
    export_folder="runs/hass_stage2/drafter",
)
