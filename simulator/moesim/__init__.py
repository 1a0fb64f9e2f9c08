"""The simulator: recorded routing replayed under a policy on a modelled machine.

    moesim.compare("trace.parquet", ["lru", "lru-spec", Mine], slots=[2, 4], machine="t4")

gives a polars frame with a row a policy and cache size; `simulate` is one such run.
"""

from moesim.comparison import compare
from moesim.errors import SimulationError, UsageError
from moesim.machine.profile import Machine, load_machine, machine_names
from moesim.result import Result
from moesim.simulate import simulate, workload_for
from moesim.workload.loading import load_workload
from moesim.workload.steps import Workload

__version__ = "0.1.0"

__all__ = [
    "Machine",
    "Result",
    "SimulationError",
    "UsageError",
    "Workload",
    "compare",
    "load_machine",
    "load_workload",
    "machine_names",
    "simulate",
    "workload_for",
]
