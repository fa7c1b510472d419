"""Direct alignment: a draft LM of 115M parameters fine-tuned on Llama-2-7B-Chat by TVD++ (per position), on 64 chips.

Its shape is the paper's (4 layers, width 1,024, 8 heads, MLP of 2,816, untied), nine parts of the target's answers at
temperatures 0, 0.3, 0.7 and 1 to one of pretraining text. Optimizer, batch and length were not found; these are ours.
Pretrain it first: `jaxspec pretrain draft_lm_pretrained` shows how, with this shape and the target's tokenizer.
"""

from jaxspec.config import CheckpointConfig, DataConfig, DistillConfig, MeshConfig, OptimizerConfig
from jaxspec.distillation.objective import Objective
from jaxspec.drafters import DraftLMOptions

config = DistillConfig(
    name="tvdpp_llama2_7b",
    target="models/llama2-7b",
    drafter="draft_lm",
    head=DraftLMOptions(width=1024, layers=4, heads=8, kv_heads=8, head_dim=128, mlp=2816, tied=False),
    data=DataConfig(
        train="data/answers",
        eval="data/answers_eval.jsonl",
        length=2048,
        batch=128,
        loss_on="assistant",
        mix="data/pretraining",
        mix_share=0.1,
    ),
    optimizer=OptimizerConfig(
        peak_lr=1e-4, warmup_steps=250, steps=10_000, weight_decay=0.01, clip_norm=1.0, schedule="linear"
    ),
    objective=Objective(weights=(("tvdpp_exact_pos", 1.0),), noise=0.0),
    mesh=MeshConfig(fsdp=64),
    checkpoint=CheckpointConfig("runs/tvdpp_llama2_7b", save_every=None, save_minutes=15),
    export_folder="runs/tvdpp_llama2_7b/drafter",
    dtype="bfloat16",
    query_block=512,
    scan_layers=True,
)
