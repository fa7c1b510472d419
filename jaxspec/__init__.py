"""Speculative decoding in JAX: train a drafter for a frozen target, then decode losslessly with it."""

import importlib.util
from pathlib import Path

__version__ = "0.1.0"

# In a checkout that is not installed, the programs and experiments beside this folder belong to the package too.
if importlib.util.find_spec(f"{__name__}.configs") is None:
    __path__.append(str(Path(__file__).resolve().parents[1]))
