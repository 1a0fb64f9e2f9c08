"""Checkpoints as people download them: found, recognised, read a tensor at a time."""
