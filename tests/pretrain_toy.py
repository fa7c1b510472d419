"""A pretraining run that takes a blink: two hundred short conversations, and the config of a tiny decoder."""

import json
import random
from pathlib import Path

STEPS = 80
EXPERIMENT = """
from jaxspec.config import CheckpointConfig, DataConfig, OptimizerConfig, PretrainConfig
from jaxspec.targets.decoder import LlamaConfig

config = PretrainConfig(
    name="toy",
    model=LlamaConfig(vocab=270, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=32, tied=True),
    data=DataConfig("train.jsonl", "train.jsonl", length=64, batch=4, eval_limit=20),
    optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=10, steps={steps}, weight_decay=0.1, clip_norm=1.0),
    checkpoint=CheckpointConfig("run", save_every=10),
    export_folder="export",
    eval_every=50,
)
"""


def prepare(folder: Path) -> None:
    folder.mkdir()
    draw = random.Random(0)
    words = "red green blue one two three cat dog bird sees hears likes".split()
    with (folder / "train.jsonl").open("w") as file:
        for i in range(200):
            user, answer = (" ".join(draw.choices(words, k=draw.randint(2, 5))) for _ in range(2))
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"id": str(i), "source": "ab"[i % 2], "messages": messages}) + "\n")
    (folder / "toy.py").write_text(EXPERIMENT.format(steps=STEPS))
