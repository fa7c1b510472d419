"""Speculative decoding in JAX: train a drafter for a frozen target, then decode losslessly with it."""

__version__ = "0.1.0"
