"""The project's own recipe: FSPAD's head with a norm on its embeddings, over three of its own steps as in HASS.

The norm makes a token's embedding weigh as much as the feature it is fused with, whatever scale the target's embeddings
have. The top-10 loss joins in the last fifth of the run, see `hass`.
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective
from jaxspec.drafters import FspadOptions

config = DistillConfig(
    name="best",
    target="tiny",
    drafter="fspad",
    head=FspadOptions(embedding_norm=True),
    data=DataConfig(
        train="runs/answers.jsonl", eval="runs/answers_eval.jsonl", length=512, batch=2, loss_on="assistant"
    ),
    optimizer=OptimizerConfig(
        kind="muon", peak_lr=5e-3, warmup_steps=100, epochs=3, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(
        steps=3,
        weights=(("smooth_l1", 1.0), ("soft_cross_entropy", 0.1), ("top_k:10", 1.0)),
        late=(("top_k:10", 0.8),),
    ),
    checkpoint=CheckpointConfig("runs/best", save_every=100),
    export_folder="runs/best/drafter",
)
