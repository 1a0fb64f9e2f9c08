"""How fast the simulator's engines are, and how their cost grows with the trace.

    python benchmarks/simulator_speed.py [--out results.json]

Rates are medians of interleaved rounds in one process; compiling is timed apart, in the first
round. The trace is synthetic Mixtral routing, repeated to the length asked for.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from moepolicy import find_policy
from moeroute import open_trace
from moesim import Machine, Workload, engines, load_machine, load_workload
from moesim.costs import costs_of
from moesim.engines import Engine
from moesim.simulate import sizes_of

POLICIES = ("lru", "lfu", "fifo", "random", "static", "belady", "belady-bypass", "lru-spec")
SLOTS = 4


def everything_on(machine: Machine) -> Machine:
    """The machine with pieces, three streams, write-back and a disk behind the link."""
    from moesim.profile import Disk

    link = replace(machine.link, streams=3, chunk_bytes=8_000_000, write_back=True)
    return replace(machine, name="everything on", link=link, disk=Disk(2e9, 100e-6, 4 * 10**9))


def timed(workload: Workload, policy: str, machine: Machine, engine: Engine) -> float:
    """Seconds of one run."""
    spec = find_policy(policy)
    began = time.perf_counter()
    engines.run(
        workload,
        spec,
        workload.context(SLOTS, "layer"),
        lambda _: costs_of(
            workload,
            machine,
            sizes_of(workload.meta, workload.meta.expert_bytes["2bit"]),
            predicting="predictions" in spec.requires,
        ),
        engine=engine,
    )
    return time.perf_counter() - began


def rates(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    """Steps/s of every policy on a plain link and with everything on, compiled."""
    machines = [load_machine("rtx3060"), everything_on(load_machine("rtx3060"))]
    points = [(policy, machine) for machine in machines for policy in POLICIES]
    seconds: dict[tuple[str, str], list[float]] = {(p, m.name): [] for p, m in points}
    for _ in range(rounds + 1):
        for policy, machine in points:
            seconds[policy, machine.name].append(timed(workload, policy, machine, Engine.replay))
    return [
        {
            "engine": "replay",
            "policy": policy,
            "machine": machine,
            "first_s": took[0],
            "steps_per_s": workload.n_steps / statistics.median(took[1:]),
            "spread": max(took[1:]) / min(took[1:]),
        }
        for (policy, machine), took in seconds.items()
    ]


def simpy_rates(workload: Workload) -> list[dict[str, Any]]:
    plain = load_machine("rtx3060")
    found = []
    for policy, machine in (("lru", plain), ("lru-spec", everything_on(plain))):
        took = [timed(workload, policy, machine, Engine.simpy) for _ in range(3)]
        found.append(
            {
                "engine": "simpy",
                "policy": policy,
                "machine": machine.name,
                "steps_per_s": workload.n_steps / statistics.median(took),
                "spread": max(took) / min(took),
            }
        )
    return found


def repeated(workload: Workload, times: int) -> Workload:
    """The workload's steps ``times`` over: a long trace with the same routing."""
    n = len(workload.keys)
    offsets = [workload.offsets[:-1] + i * n for i in range(times)]
    return replace(
        workload,
        keys=np.tile(workload.keys, times),
        weights=np.tile(workload.weights, times),
        routed=np.tile(workload.routed, times),
        offsets=np.append(np.concatenate(offsets), times * n),
        layer=np.tile(workload.layer, times),
        tokens=np.tile(workload.tokens, times),
        decode=np.tile(workload.decode, times),
        rows=np.tile(workload.rows, (times, 1)),
        starts=(workload.starts + workload.n_steps * np.arange(times)[:, None]).ravel(),
    )


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
) -> None:
    """Measure, print, and write the results with the machine's description."""
    workload = load_workload(open_trace("mixtral-like"), predictions=True)
    engines.WORTH_COMPILING = 0
    rows = rates(workload, rounds) + simpy_rates(workload.head(200))
    plain = load_machine("rtx3060")
    for times in (1, 10, 100):
        longer = repeated(workload, times)
        took = timed(longer, "lru", plain, Engine.replay)
        rows.append(
            {
                "engine": "replay",
                "policy": "lru",
                "machine": f"{plain.name}, trace x{times}",
                "steps_per_s": longer.n_steps / took,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    for row in rows:
        extra = f"first run {row['first_s']:.1f} s" if "first_s" in row else ""
        extra += f"peak {row['peak_gib']:.2f} GiB" if "peak_gib" in row else ""
        print(
            f"{row['engine']:7}{row['policy']:15}{row['machine']:22}"
            f"{row['steps_per_s'] / 1e6:9.3f} M steps/s  {extra}"
        )
    if out is not None:
        about = {"python": sys.version.split()[0], "machine": platform.processor(), "rows": rows}
        out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
