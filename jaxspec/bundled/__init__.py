"""The tiny target that the package ships with."""

from importlib import resources
from pathlib import Path


def tiny_path() -> Path:
    """Returns the folder of the bundled tiny target, in the layout of a Hugging Face checkpoint."""
    return Path(str(resources.files(__name__) / "tiny"))
