"""Finding and recognising published checkpoints, and reading them a tensor at a time."""
