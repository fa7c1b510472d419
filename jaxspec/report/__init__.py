"""Evaluations told: one page about runs of `jaxspec evaluate`, and tables in documents."""
