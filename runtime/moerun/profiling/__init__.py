"""Measuring this machine for the simulator, and predictions beside live runs."""
