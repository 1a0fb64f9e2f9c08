"""Which policy, precision and options to run a model with, in a budget of memory on a machine."""
