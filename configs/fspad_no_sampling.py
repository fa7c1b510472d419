"""FSPAD's ablation without feature sampling: partial alignment alone."""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective
from jaxspec.drafters import FspadOptions

config = DistillConfig(
    name="fspad_no_sampling",
    target="tiny",
    drafter="fspad",
    head=FspadOptions(feature_sampling=False),
    data=DataConfig(
        train="runs/answers.jsonl", eval="runs/answers_eval.jsonl", length=512, batch=2, loss_on="assistant"
    ),
    optimizer=OptimizerConfig(
        peak_lr=5e-3, warmup_steps=100, epochs=3, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(),
    checkpoint=CheckpointConfig("runs/fspad_no_sampling", save_every=100),
    export_folder="runs/fspad_no_sampling/drafter",
)
