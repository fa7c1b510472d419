"""Marks of the fields of flags, for `cli.parse`."""

import tyro

Positional = tyro.conf.Positional
"""Marks a field of flags that is given without its name: `Positional[str]`."""
Inline = tyro.conf.OmitArgPrefixes
"""Marks a field that holds flags of its own, which are given as if they were the outer ones."""
