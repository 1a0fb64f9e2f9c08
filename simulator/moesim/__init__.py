"""The simulator: recorded routing replayed under a policy on a modelled machine."""

from moesim.errors import SimulationError
from moesim.machine.profile import Machine, load_machine, machine_names
from moesim.simulate import Result, simulate, workload_for
from moesim.workload.loading import load_workload
from moesim.workload.steps import Workload

__version__ = "0.1.0"

__all__ = [
    "Machine",
    "Result",
    "SimulationError",
    "Workload",
    "load_machine",
    "load_workload",
    "machine_names",
    "simulate",
    "workload_for",
]
