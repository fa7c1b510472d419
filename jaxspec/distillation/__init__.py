"""One training step of a drafter, as pure functions: objective, chunks, metrics, gradients, compilers."""
