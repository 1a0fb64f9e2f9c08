"""Checkpoints whose weights are published quantised, and how each format is read."""
