"""Which policy, precision and options to run a model with, in a budget of memory on a machine."""

DISK = "nvme-gen3"  # the machine whose disk is taken
LEAST_BITS = 4  # of a weight
