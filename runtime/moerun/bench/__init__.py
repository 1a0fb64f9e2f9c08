"""Runs without a model's weights: random experts of the true size, routing from a trace."""
