"""An EAGLE-2 head for Llama-3-8B-Instruct on 64 chips of v5e or v6e; the other jobs are changes of this one.

Data: the target's own answers to ShareGPT's 68,000 dialogues and the like (`jaxspec regenerate`). EAGLE's settings are
AdamW at 3e-5, 2,000 steps of warm-up, values clipped to 0.5, rows of up to 2,048 tokens, 16 of them an update for 20
epochs: 85,000 updates, 1.36 million dialogues. Here an update is eight times as large, the rate sqrt(8) times, and the
steps are those dialogues at one a row; packed, they are seen more often.
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, MeshConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective

config = DistillConfig(
    name="eagle2_llama3_8b",
    target="models/llama3-8b",
    data=DataConfig(train="data/answers", eval="data/answers_eval.jsonl", length=2048, batch=128, loss_on="assistant"),
    optimizer=OptimizerConfig(
        peak_lr=8.5e-5, warmup_steps=250, steps=10_600, weight_decay=0.01, clip_value=0.5, schedule="linear"
    ),
    objective=Objective(),
    mesh=MeshConfig(fsdp=64),
    checkpoint=CheckpointConfig("runs/eagle2_llama3_8b", save_every=None, save_minutes=15),
    export_folder="runs/eagle2_llama3_8b/drafter",
    dtype="bfloat16",
    query_block=512,
    scan_layers=True,
)
