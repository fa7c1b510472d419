"""Hidden states dumped and read with the packages `speculators`, `datasets` and `torch`: a program for an environment
that has them.

Argument: a folder with `texts.npz`, arrays `tokens_N`, `mask_N`, `states_N` and `features_N` of documents. It writes
`dump`, files `hs_N` and the set beside them, and `files`, SpecForge's files, one of them through gzip. speculators'
own loader then reads `dump`, and what it gives to its trainer goes to `read.npz`.
"""

import gzip
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file
from speculators.data_generation.offline import check_hidden_states  # pyright: ignore[reportMissingImports]
from speculators.train.data import ArrowDataset  # pyright: ignore[reportMissingImports]

folder = Path(sys.argv[1])
given = np.load(folder / "texts.npz")
count = len([name for name in given if name.startswith("tokens_")])
texts: list[dict[str, Any]] = [
    {name: torch.from_numpy(given[f"{name}_{i}"]) for name in ("tokens", "mask", "states", "features")}
    for i in range(count)
]

rows = {
    "input_ids": [text["tokens"].tolist() for text in texts],
    "loss_mask": [text["mask"].long().tolist() for text in texts],
    "seq_len": [len(text["tokens"]) for text in texts],
    "messages": [[{"role": "user", "content": str(i)}] for i in range(count)],
}
dataset = Dataset.from_dict(rows).with_format("torch", columns=["input_ids", "loss_mask", "seq_len"])
dataset.save_to_disk(folder / "dump")
(folder / "dump" / "hidden_states").mkdir()
(folder / "files" / "rows_0-5000").mkdir(parents=True)
for i, text in enumerate(texts):
    tensors = {"hidden_states": text["states"].bfloat16(), "token_ids": text["tokens"].long()}
    check_hidden_states(tensors, text["tokens"].tolist())
    save_file(tensors, folder / "dump" / "hidden_states" / f"hs_{i}.safetensors")
    point = {"input_ids": text["tokens"].long(), "loss_mask": text["mask"].long()}
    point["hidden_state"] = text["features"].bfloat16().clone().unsqueeze(0)
    point["aux_hidden_state"] = text["states"][:, :-1].flatten(1).bfloat16().clone().unsqueeze(0)
    packed = io.BytesIO()
    torch.save(point, packed)
    path, data = folder / "files" / "rows_0-5000" / f"data_{i}.ckpt", packed.getvalue()
    if i == 0:
        path, data = path.with_suffix(".ckpt.gz"), gzip.compress(data)
    path.write_bytes(data)

loader = ArrowDataset(4096, folder / "dump", on_missing="raise")
read: dict[str, np.ndarray] = {}
for i in range(count):
    for name, tensor in loader[i].items():
        if isinstance(tensor, torch.Tensor):
            read[f"{name}_{i}"] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
np.savez(folder / "read.npz", **read)  # pyright: ignore[reportArgumentType]
