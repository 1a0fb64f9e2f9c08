"""The simulated machine, in SimPy and as a compiled loop: one timeline, two engines."""
