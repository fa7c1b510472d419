"""Direct alignment: the pretrained draft LM (`draft_lm_pretrained`) fine-tuned on the target by total variation.

Nine parts of what the target wrote, at temperatures 0, 0.3, 0.7 and 1, and one part of the pretraining text.
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective

config = DistillConfig(
    name="draft_lm_tvd",
    target="tiny",
    drafter="draft_lm",
    init_from="runs/draft_lm_pretrained/export",
    data=DataConfig(
        train="runs/answers.jsonl",
        eval="runs/answers_eval.jsonl",
        length=512,
        batch=2,
        loss_on="assistant",
        mix="data/prose/books-0[0-5].txt",
        mix_share=0.1,
    ),
    optimizer=OptimizerConfig(
        kind="muon", peak_lr=3e-3, warmup_steps=100, epochs=3, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(weights=(("tvd", 1.0),), noise=0.0),
    checkpoint=CheckpointConfig("runs/draft_lm_tvd", save_every=100),
    export_folder="runs/draft_lm_tvd/drafter",
)
