"""ParallelSpec in Medusa's place: one layer and mask tokens predict five tokens in a pass, losses on tokens alone.

Distilled from the target's distribution; later tokens count as Medusa's heads do. The layer norms what its attention
reads, as the target's own layers do, and a mask slot starts from its anchor's feature. See the drafter's docstring for
what is reconstruction; so is the optimizer, of which nothing is known.
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective
from jaxspec.drafters import ParallelSpecOptions

config = DistillConfig(
    name="parallelspec_medusa",
    target="tiny",
    drafter="parallelspec",
    head=ParallelSpecOptions(
        tokens=5, host="medusa", embedding_norm=True, attention_norm=True, mask_feature="anchor_copy"
    ),
    data=DataConfig(
        train="runs/answers.jsonl", eval="runs/answers_eval.jsonl", length=512, batch=2, loss_on="assistant"
    ),
    optimizer=OptimizerConfig(
        kind="muon", peak_lr=5e-3, warmup_steps=100, epochs=3, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(steps=5, weights=(("kl", 1.0),), step_decay=0.8, noise=0.0),
    checkpoint=CheckpointConfig("runs/parallelspec_medusa", save_every=100),
    export_folder="runs/parallelspec_medusa/drafter",
)
