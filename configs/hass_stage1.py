"""HASS as its script has it, first stage: three steps, no top-k loss; then `hass_stage2`."""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective

config = DistillConfig(
    name="hass_stage1",
    target="tiny",
    data=DataConfig(
        train="runs/answers.jsonl", eval="runs/answers_eval.jsonl", length=512, batch=2, loss_on="assistant"
    ),
    optimizer=OptimizerConfig(
        peak_lr=5e-3, warmup_steps=100, epochs=3, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(steps=3),
    checkpoint=CheckpointConfig("runs/hass_stage1", save_every=100),
    export_folder="runs/hass_stage1/drafter",
)
