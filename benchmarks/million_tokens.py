"""What a sweep over a long trace costs: time, and memory over all its processes.

    python benchmarks/million_tokens.py --tokens 1000000 --out results.json
    python benchmarks/million_tokens.py --tokens 20000      # a quick look

Generates synthetic Mixtral routing of so many tokens (kept under --folder for the next run), then
runs `moesim sweep` on it: 10 policies x 8 cache sizes x 3 bandwidths. Memory is the sum over the
command's processes of their proportional set sizes, pages that they share counted once, looked at
twice a second. Last comes `moesim compare lru` on the first hundredth, tenth and all of the tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from hardware import hardware
from moeroute.synthetic import write_synthetic

POLICIES = (
    *("lru", "lfu", "fifo", "random", "static", "belady", "belady-bypass"),
    *("random:seed=1", "lru-spec:n=1", "lru-spec"),
)
SLOTS = "1,2,3,4,5,6,7,8"
GBPS = (6, 12, 25)
MOESIM = (sys.executable, "-c", "from moesim.cli import main; main()")
LOOK_S = 0.5
PROFILE = """
name = "{gbps} GB/s"
source = "published"
[link]
bytes_per_s = {gbps}e9
latency_s = 10e-6
[compute]
token_s = 500e-6
layer_s = 100e-6
gate_sync_s = 15e-6
prefetch_s = 20e-6
expert_s = 25e-6
memory_bytes_per_s = 360e9
"""


@dataclass(frozen=True)
class Cost:
    """Of one command, all of its processes together."""

    wall_s: float
    cpu_s: float
    peak_gib: float


def cost_of(*arguments: str) -> Cost:
    """Run `moesim` with these arguments; raises CalledProcessError if it fails."""
    before, began, peak = os.times(), time.monotonic(), 0
    process = subprocess.Popen([*MOESIM, *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_bytes, family(process.pid))))
        time.sleep(LOOK_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments[0])
    after = os.times()
    cpu_s = (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
    return Cost(time.monotonic() - began, cpu_s, peak / 2**30)


def family(pid: int) -> list[int]:
    """A process and all that it started, as /proc has them."""
    found, at = [pid], 0
    while at < len(found):
        for task in Path(f"/proc/{found[at]}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue  # it has ended meanwhile
        at += 1
    return found


def proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main(
    tokens: Annotated[int, typer.Option(min=100)] = 1_000_000,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    folder: Annotated[Path | None, typer.Option(help="Where the trace is kept.")] = None,
    grid: Annotated[bool, typer.Option(help="Run the sweep.")] = True,
    growth: Annotated[bool, typer.Option(help="Run a growing trace.")] = True,
    limits: Annotated[bool, typer.Option(help="The sweep's columns of limits.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Measure, print, and write the results with the machine's description."""
    rows: list[dict[str, Any]] = []

    def report(what: str, n: int, cost: Cost) -> None:
        rows.append({"what": what, "tokens": n} | vars(cost))
        print(
            f"{what:28} {n:>9,} tokens {cost.wall_s:8.1f} s {cost.cpu_s:8.1f} s of CPU "
            f"{cost.peak_gib:6.2f} GiB",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as scratch:
        where = folder or Path(scratch)
        trace = where / f"mixtral-{tokens}.parquet"
        if not trace.exists():
            began = time.monotonic()
            write_synthetic(trace, tokens=tokens, seed=0)
            print(f"generated {trace.name} in {time.monotonic() - began:.0f} s", flush=True)
        machines = []
        for gbps in GBPS:
            machines.append(Path(scratch, f"{gbps}.toml"))
            machines[-1].write_text(PROFILE.format(gbps=gbps), encoding="utf-8")
        common = ["--trace", str(trace), "--precision", "2bit"]
        if grid:
            points = [*POLICIES, "--slots", SLOTS, "--machine", ",".join(map(str, machines))]
            more = ["--workers", str(workers), "--limits" if limits else "--no-limits"]
            result = str(Path(scratch, "sweep.parquet"))
            cost = cost_of("sweep", *points, *common, *more, "--out", result, "--force")
            report(f"{len(POLICIES) * 8 * len(GBPS)} points, {workers} workers", tokens, cost)
        for part in (100, 10, 1) if growth else ():
            n = max(1, tokens // part)
            few = Path(scratch, f"{n}.parquet")
            write_synthetic(few, tokens=n, seed=0) if part > 1 else few.symlink_to(trace.absolute())
            one = ["--slots", "4", "--machine", str(machines[0]), "--no-limits"]
            cost = cost_of("compare", "lru", "--trace", str(few), *common[2:], *one)
            report("lru, 4 slots", n, cost)
    if out is not None:
        about = {"hardware": hardware(), "rows": rows}
        out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
