"""Trainable drafters, one a file, and the table that names them."""

from __future__ import annotations

from jaxspec.drafters.eagle import Eagle, EagleConfig

DRAFTERS = {"eagle": (Eagle, EagleConfig)}
"""Name -> (module, its configuration). A new drafter is one file and one line here."""

__all__ = ["DRAFTERS", "Eagle", "EagleConfig"]
