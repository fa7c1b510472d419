"""HASS: EAGLE-2's head trained over three of its own steps, with the top-10 loss in the last fifth of the run.

The paper's script trains 40 epochs without the top-k loss and then 10 with it, at a lower rate (`hass_stage1` and
`hass_stage2` are these two runs); here both are one run, whose falling rate is a fifth of the peak where they meet.
With the top-k loss from the beginning the features are learned later.
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective

config = DistillConfig(
    name="hass",
    target="tiny",
    data=DataConfig(
        train="runs/answers.jsonl", eval="runs/answers_eval.jsonl", length=512, batch=2, loss_on="assistant"
    ),
    optimizer=OptimizerConfig(
        peak_lr=5e-3, warmup_steps=100, epochs=3, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(
        steps=3,
        weights=(("smooth_l1", 1.0), ("soft_cross_entropy", 0.1), ("top_k:10", 1.0)),
        late=(("top_k:10", 0.8),),
    ),
    checkpoint=CheckpointConfig("runs/hass", save_every=100),
    export_folder="runs/hass/drafter",
)
