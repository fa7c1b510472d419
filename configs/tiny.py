"""The bundled tiny target: 5.9M parameters on grade-school maths and country facts, three epochs of 5.4M tokens.

Source: ours; a Llama of seven layers.
Hardware: two CPU cores, 75 to 90 minutes in fp32 at 3,000 to 3,700 tokens a second. Huge pages for the allocator
(`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`) save a quarter.
Expected: held-out losses of 0.879 (facts), 0.909 (facts from a passage) and 1.875 (maths) nats a token
(docs/results.md, "The tiny target").
"""

from jaxspec.config import DataConfig, OptimizerConfig, PretrainConfig
from jaxspec.targets.decoder import LlamaConfig

config = PretrainConfig(
    name="tiny",
    model=LlamaConfig(
        vocab=4096,
        width=256,
        layers=7,
        heads=4,
        kv_heads=2,
        head_dim=64,
        mlp=640,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tied=True,
        max_positions=1024,
    ),
    data=DataConfig(train="data/chat/train.jsonl", eval="data/chat/eval.jsonl", length=512, batch=8),
    optimizer=OptimizerConfig(
        peak_lr=2.5e-3, warmup_steps=150, epochs=3, weight_decay=0.1, clip_norm=1.0, final_lr_fraction=0.05
    ),
)
