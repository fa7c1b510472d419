"""Other libraries on the same folder, prompts and budgets, to be timed beside this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxspec.console import results
from jaxspec.decoding.requests import Requests
from jaxspec.interchange import target_folders
from jaxspec.serving.loading import Models


def load_transformers(target: str, models: Models) -> Callable[[Requests], list[np.ndarray]]:
    """Returns the greedy `generate` of transformers as a function of a batch: same folder, fp32, a thread a core.

    Raises ValueError naming a package that is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(
            f"--peer transformers needs {error.name}, which is not installed: install jaxspec-decoding[parity]"
        ) from error
    torch.set_num_threads(results.machine_facts()["cores"] or 1)
    folder = target_folders.target_folder(target)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    # `generate` fills what its settings leave open from the model's own, such as penalties.
    model.generation_config = transformers.GenerationConfig()
    pad = models.tokenizer.pad_id
    stops = list(models.stop_ids)

    def generate(requests: Requests) -> list[np.ndarray]:
        lengths, budgets = np.asarray(requests.length_B), np.asarray(requests.budget_B)
        width = int(lengths.max())
        tokens, mask = np.full((len(lengths), width), pad), np.zeros((len(lengths), width), np.int64)
        for row, seen, prompt, length in zip(tokens, mask, np.asarray(requests.tokens_BL), lengths, strict=True):
            row[width - length :], seen[width - length :] = prompt[:length], 1
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.from_numpy(tokens),
                attention_mask=torch.from_numpy(mask),
                do_sample=False,
                max_new_tokens=int(budgets.max()),
                eos_token_id=stops,
                pad_token_id=pad,
            )
        rows = out[:, width:].numpy()
        return [cut(row[:budget], stops) for row, budget in zip(rows, budgets, strict=True)]

    return generate


def cut(row: np.ndarray, stops: Sequence[int]) -> np.ndarray:
    """Returns `row` up to its first stop id, which is kept."""
    found = np.flatnonzero(np.isin(row, stops))
    return row[: found[0] + 1] if found.size else row
