"""Sweeps: every point of a grid simulated on many workers, kept as it is finished, one result."""

from moesim.sweep.grid import Grid, load_grid, make_grid
from moesim.sweep.run import Report, Settings, run_sweep

__all__ = ["Grid", "Report", "Settings", "load_grid", "make_grid", "run_sweep"]
