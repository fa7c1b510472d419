"""An independent draft LM for the bundled target, before it is aligned with it: 0.87M parameters, one epoch.

Pretrained on general text and not on what the target was taught, as the direct-alignment paper pretrains its drafter.
Its tokenizer is the target's, its proportions too (two query heads a key-value head, an MLP 2.5 times the
width). That is 14.8 % of the target's 5.87M parameters where the direct-alignment paper's drafter is 1.64 % of its own:
the embedding of 4,096 tokens alone is 0.52M, and without embeddings the two compare as 7.2 %.

One epoch is 6.9M tokens, a quarter of an hour on one CPU core. The learning rate is larger than the target's for the
smaller width, and not searched. Muon learns here what AdamW needs several times the tokens for.
"""

from jaxspec.config import CheckpointConfig, DataConfig, OptimizerConfig, PretrainConfig
from jaxspec.targets.decoder import LlamaConfig

config = PretrainConfig(
    name="draft_lm_pretrained",
    model=LlamaConfig(
        vocab=4096,
        width=128,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=64,
        mlp=320,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tied=True,
        max_positions=1024,
    ),
    tokenizer="tiny",
    data=DataConfig(train="data/prose/books-0[0-5].txt", eval="data/prose/books-06.txt", length=512, batch=8),
    optimizer=OptimizerConfig(
        kind="muon", peak_lr=5e-3, warmup_steps=150, epochs=1, weight_decay=0.1, clip_norm=1.0, final_lr_fraction=0.05
    ),
    checkpoint=CheckpointConfig("runs/draft_lm_pretrained", save_every=100),
    export_folder="runs/draft_lm_pretrained/export",
)
