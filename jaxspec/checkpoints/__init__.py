"""Runs and models on disk: Orbax folders with a manifest, records and metrics."""
