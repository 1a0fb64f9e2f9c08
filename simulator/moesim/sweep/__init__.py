"""Sweeps: every point of a grid is simulated on many workers and kept when it is finished; all
points become one result."""

from moesim.sweep.grid import Grid, load_grid, make_grid
from moesim.sweep.run import SweepReport, SweepSettings, run_sweep

__all__ = ["Grid", "SweepReport", "SweepSettings", "load_grid", "make_grid", "run_sweep"]
