"""Frozen language models; each family has one file."""
