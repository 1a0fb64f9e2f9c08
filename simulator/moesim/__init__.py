"""The simulator: recorded routing replayed under a policy on a modelled machine.

    moesim.compare("trace.parquet", ["lru", "lru-spec", Mine], slots=[2, 4], machine="t4")

gives a polars frame with a row for each policy and cache size; `draw` makes a picture of the frame.
`recommendation("qwen3-30b-a3b", machine="rtx4070", memory="10GiB")` gives the policy and options to
run a model with. `simulate` is one such run:

    workload = moesim.load_workload(moeroute.open_trace("tiny"))
    result = moesim.simulate(workload, find_policy("lru"), moesim.load_machine("t4"), slots=4)
    print(result.hit_ratio, result.tokens_per_s)      # a share of 1, and simulated tokens/s

Sizes are bytes, times seconds (of a timeline: ns), rates bytes/s; slots are experts cached a layer.
SimulationError says why something cannot be simulated, and UsageError, which is one, that a value
is wrong for every trace and machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesim.comparison import compare
from moesim.curves.hit_ratios import hit_curve
from moesim.engines.clock import Segment
from moesim.engines.compilations import Compilations, Engine
from moesim.errors import SimulationError, UsageError
from moesim.machine.profile import (
    Compute,
    Cpu,
    Disk,
    LinkProfile,
    Machine,
    load_machine,
    machine_names,
)
from moesim.result import Result
from moesim.simulate import simulate, workload_for
from moesim.workload.loading import load_workload
from moesim.workload.steps import Workload

if TYPE_CHECKING:
    from moesim.pictures.picture import Picture as Picture
    from moesim.pictures.picture import draw as draw
    from moesim.recommend.ask import recommendation as recommendation
    from moesim.recommend.report import Recommendation as Recommendation

__version__ = "0.1.0"

# Where the names lie that are imported when they are first asked for.
_LAZY = {
    "Picture": "moesim.pictures.picture",
    "Recommendation": "moesim.recommend.report",
    "draw": "moesim.pictures.picture",
    "recommendation": "moesim.recommend.ask",
}

__all__ = [
    "Compilations",
    "Compute",
    "Cpu",
    "Disk",
    "Engine",
    "LinkProfile",
    "Machine",
    "Picture",
    "Recommendation",
    "Result",
    "Segment",
    "SimulationError",
    "UsageError",
    "Workload",
    "compare",
    "draw",
    "hit_curve",
    "load_machine",
    "load_workload",
    "machine_names",
    "recommendation",
    "simulate",
    "workload_for",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
