"""Training runs as their configs say them: data, loop, checkpoints, results."""
