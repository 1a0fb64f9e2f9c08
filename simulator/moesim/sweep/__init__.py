"""Sweeps: every point of a grid simulated on many workers, kept as it is finished, one result."""

from moesim.sweep.drive import Report, Settings, run_sweep
from moesim.sweep.grid import Grid, load_grid, make_grid

__all__ = ["Grid", "Report", "Settings", "load_grid", "make_grid", "run_sweep"]
