"""Finding checkpoints and reading their weights."""
