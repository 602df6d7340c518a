"""Finding checkpoints, and reading their configs and weights."""
