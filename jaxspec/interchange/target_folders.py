"""Folders of targets by name, and what a manifest says of their tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jaxspec import bundled
from jaxspec.data.chat import NO_TEMPLATE, TOKENIZERS, ChatTokenizer


def target_folder(name: str) -> Path:
    """The folder that `name` stands for: `tiny` is the bundled target, anything else a path.

    It holds a target in HuggingFace layout, or one that jaxspec exported or imported.
    """
    if name != "tiny":
        return Path(name)
    folder = bundled.tiny_path()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: the bundled tiny target is not there; reinstall, or give --target a folder")
    return folder


def tokenizer_manifest(folder: Path) -> dict[str, Any] | None:
    """What the manifest of a model says of the tokenizer in a HuggingFace folder; None where there is none."""
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
