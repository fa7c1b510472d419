"""Other libraries on the same folder, prompts and budgets, to be timed beside this one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxspec.console import results
from jaxspec.data.chat import NO_TEMPLATE, ChatTokenizer
from jaxspec.data.tokenizer_files import TOKENIZERS
from jaxspec.decoding.requests import Requests
from jaxspec.interchange import export
from jaxspec.interchange.published import published_family
from jaxspec.interchange.target_folders import target_folder
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
    with readable_folder(target) as folder:
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


@contextmanager
def readable_folder(name: str, *, target: str | None = None) -> Iterator[Path]:
    """Yields the folder of an LM as transformers reads it: a model of ours is exported to one that is removed after.

    `name` is as for `export.find_model`. A draft LM takes the tokenizer of `target`, and one that has a tokenizer of
    its own is compared with it. Raises ValueError or OSError, in one sentence, where it is no whole LM or another's.
    """
    folder = target_folder(name)
    if (folder / "config.json").is_file():
        # A head's `config.json` may call it a Llama, and transformers would draw the weights that it lacks.
        if _is_head(folder):
            raise ValueError(f"{name}: is a head below its target; transformers drafts with a whole LM: give that")
        _check_tokenizer(folder, name, target)
        yield folder
        return
    model = export.find_model(name)
    if reason := export.refusal(model, "hf"):
        raise ValueError(f"{name}: transformers cannot read it: {reason}")
    with tempfile.TemporaryDirectory(prefix="jaxspec-") as home:
        out = Path(home) / "model"
        export.write("hf", out, model, target)
        _check_tokenizer(out, name, target)
        yield out


def _is_head(folder: Path) -> bool:
    """Returns whether a folder is known as a published head; transformers reads families that are unknown here."""
    try:
        return published_family(folder) != "lm"
    except ValueError:
        return False


def _check_tokenizer(folder: Path, name: str, target: str | None) -> None:
    """Raises ValueError where a folder has another tokenizer than its target, compared by vocabulary."""
    if target is None or not any((folder / file).is_file() for file in TOKENIZERS):
        return
    theirs, ours = (ChatTokenizer.load(f, NO_TEMPLATE).tokenizer.get_vocab() for f in (folder, target_folder(target)))
    if theirs != ours:
        raise ValueError(f"{name}: its tokenizer has another vocabulary than the target's")


def cut(row: np.ndarray, stops: Sequence[int]) -> np.ndarray:
    """Returns `row` up to its first stop id, which is kept."""
    found = np.flatnonzero(np.isin(row, stops))
    return row[: found[0] + 1] if found.size else row
