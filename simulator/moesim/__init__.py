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

from moesim.errors import SimulationError, UsageError

if TYPE_CHECKING:
    from moesim.comparison import compare as compare
    from moesim.curves.hit_ratios import hit_curve as hit_curve
    from moesim.engines.clock import Segment as Segment
    from moesim.engines.compilations import Compilations as Compilations
    from moesim.engines.names import Engine as Engine
    from moesim.machine.profile import Compute as Compute
    from moesim.machine.profile import Cpu as Cpu
    from moesim.machine.profile import Disk as Disk
    from moesim.machine.profile import LinkProfile as LinkProfile
    from moesim.machine.profile import Machine as Machine
    from moesim.machine.profile import load_machine as load_machine
    from moesim.machine.profile import machine_names as machine_names
    from moesim.pictures.picture import Picture as Picture
    from moesim.pictures.picture import draw as draw
    from moesim.recommend.ask import recommendation as recommendation
    from moesim.recommend.report import Recommendation as Recommendation
    from moesim.result import Result as Result
    from moesim.simulation import simulate as simulate
    from moesim.simulation import workload_for as workload_for
    from moesim.workload.loading import load_workload as load_workload
    from moesim.workload.steps import Workload as Workload

__version__ = "0.1.0"

# Where the names lie. Each is imported when it is first asked for, so that programs start at once.
_LAZY = {
    "Compilations": "moesim.engines.compilations",
    "Compute": "moesim.machine.profile",
    "Cpu": "moesim.machine.profile",
    "Disk": "moesim.machine.profile",
    "Engine": "moesim.engines.names",
    "LinkProfile": "moesim.machine.profile",
    "Machine": "moesim.machine.profile",
    "Picture": "moesim.pictures.picture",
    "Recommendation": "moesim.recommend.report",
    "Result": "moesim.result",
    "Segment": "moesim.engines.clock",
    "Workload": "moesim.workload.steps",
    "compare": "moesim.comparison",
    "draw": "moesim.pictures.picture",
    "hit_curve": "moesim.curves.hit_ratios",
    "load_machine": "moesim.machine.profile",
    "load_workload": "moesim.workload.loading",
    "machine_names": "moesim.machine.profile",
    "recommendation": "moesim.recommend.ask",
    "simulate": "moesim.simulation",
    "workload_for": "moesim.simulation",
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

    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
