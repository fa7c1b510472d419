"""What runs and models are on disk: Orbax folders with a manifest, records, metrics."""
