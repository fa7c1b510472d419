"""Folders of targets by name, and the description of their tokenizers in manifests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jaxspec import bundled
from jaxspec.data.chat import NO_TEMPLATE, TOKENIZERS, ChatTokenizer


def target_folder(name: str) -> Path:
    """Returns the folder that `name` stands for: `tiny` is the bundled target, and any other name a path.

    It holds a target in HuggingFace layout, or one that jaxspec exported or imported.
    """
    if name != "tiny":
        return Path(name)
    folder = bundled.tiny_path()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: the bundled tiny target is missing; reinstall, or give --target a folder")
    return folder


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
