"""Frozen language models, one family a file."""
