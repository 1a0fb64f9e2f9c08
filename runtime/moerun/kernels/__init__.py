"""Multiplying by experts as they lie in their slots, on the CPU and on a GPU."""
