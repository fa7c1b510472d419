"""The models that the package ships with: a tiny target, and an EAGLE head for SmolLM2."""

from importlib import resources
from pathlib import Path

FOLDERS = {"tiny": "tiny", "smollm2-head": "smollm2_head"}
"""Name of a bundled model -> its folder here."""


def bundled_path(name: str | Path) -> Path | None:
    """Returns the folder of the bundled model of this name; None for every other name, which is then a path.

    `tiny` is a target in HuggingFace layout, `smollm2-head` a drafter for the target `smollm2`.
    """
    folder = FOLDERS.get(str(name))
    return None if folder is None else Path(str(resources.files(__name__) / folder))
