"""Which drafted tokens are kept: lossless acceptance rules, each for how its candidates were drawn."""

from jaxspec.verify.path import Accepted, follow

__all__ = ["Accepted", "follow"]
