"""The memory budget: what a run will need, how many slots that leaves, and changes of it."""
