"""How fast the simulator's engines are, and how their cost grows with the trace.

    python benchmarks/simulator_speed.py [--out results.json]

First comes the time to the first answer of `moesim compare lru lfu belady`, in wall time and with
the load of the machine: with nothing compiled, with what serves every policy compiled but no
policy, with everything compiled, and with a policy more. Then rates: CPU time of one thread,
medians of interleaved rounds in one process, of each form of compiled code: a policy called by
address, and in one piece with the replay. The traces are synthetic: Mixtral's routing,
repeated to the length asked for, and those of models of 128 and 256 experts.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from hardware import hardware
from moepolicy import find_policy
from moeroute import open_trace
from moesim import Machine, Workload, load_machine, load_workload
from moesim.engines import choose as engines
from moesim.engines.compilations import Compilations
from moesim.engines.names import Engine
from moesim.machine.costs import costs_of
from moesim.sizes import sizes_of

DEMAND_ONLY = ("lru", "lfu", "fifo", "random", "static", "belady", "belady-bypass")
POLICIES = (*DEMAND_ONLY, "lru-spec")
COMPILATIONS = Compilations(worth_compiling=0)
FORMS = ("by address", "one piece")
COMPARE = (sys.executable, "-c", "from moesim.cli import main; main()", "compare")


def everything_on(machine: Machine) -> Machine:
    """The machine with pieces, three streams, write-back and a disk behind the link."""
    from moesim.machine.profile import Disk

    link = replace(machine.link, streams=3, chunk_bytes=8_000_000, write_back=True)
    return replace(machine, name="everything on", link=link, disk=Disk(2e9, 100e-6, 4 * 10**9))


def slots(workload: Workload) -> int:
    """A layer's cache: half of 8 experts, a quarter of 128."""
    return max(2 * workload.meta.top_k, workload.meta.n_experts // 4)


def timed(
    workload: Workload, policy: str, machine: Machine, engine: Engine, form: str = "by address"
) -> float:
    """Seconds of one run."""
    spec = find_policy(policy)
    costs = costs_of(
        workload,
        machine,
        sizes_of(workload.meta, workload.meta.expert_bytes["2bit"]),
        predicting="predictions" in spec.requires,
    )
    context = workload.context(slots(workload), "layer")
    began = time.process_time()
    if form == "by address":
        engines.run(workload, spec, context, costs, compilations=COMPILATIONS, engine=engine)
    else:  # to which `run` comes only after many steps
        job = engines._Replay(workload.shown_to(spec), spec, context, costs, in_one_piece=True)
        job.run(compile=True)
    return time.process_time() - began


def rates(workload: Workload, policies: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Steps/s of every policy on a plain link and with everything on, in the forms there are."""
    machines = [load_machine("rtx3060"), everything_on(load_machine("rtx3060"))]
    points = [(p, m, form) for m in machines for p in policies for form in FORMS]
    seconds: dict[tuple[str, str, str], list[float]] = {(p, m.name, f): [] for p, m, f in points}
    for _ in range(rounds + 1):
        for policy, machine, form in points:
            took = timed(workload, policy, machine, Engine.replay, form)
            seconds[policy, machine.name, form].append(took)
    return [
        row(form, policy, machine, workload, took[1:]) | {"compile_s": took[0]}
        for (policy, machine, form), took in seconds.items()
    ]


def first_answers() -> list[dict[str, Any]]:
    """Seconds of wall time to a comparison's table, by what an earlier command has compiled."""
    policies = ["lru", "lfu", "belady"]
    with tempfile.TemporaryDirectory() as folder:
        where = os.environ | {"NUMBA_CACHE_DIR": folder}

        def answer(what: str, names: Sequence[str]) -> dict[str, Any]:
            load, began = os.getloadavg()[0], time.perf_counter()
            subprocess.run([*COMPARE, *names], env=where, check=True, capture_output=True)
            return {"first_answer": what, "wall_s": time.perf_counter() - began, "load": load}

        found = [answer("nothing compiled", policies)]
        for file in Path(folder).glob("hooks-*"):
            file.unlink()
        found.append(answer("the policies not compiled", policies))
        found.append(answer("everything compiled", policies))
        found.append(answer("one policy more, not compiled", [*policies, "arc"]))
    return found


def row(
    engine: str, policy: str, machine: str, workload: Workload, took: list[float]
) -> dict[str, Any]:
    return {
        "engine": engine,
        "policy": policy,
        "machine": machine,
        "experts": workload.meta.n_experts,
        "steps_per_s": workload.n_steps / statistics.median(took),
        "spread": max(took) / min(took),
    }


def simpy_rates(workload: Workload) -> list[dict[str, Any]]:
    plain = load_machine("rtx3060")
    points = (("lru", plain), ("lru-spec", everything_on(plain)))
    seconds: list[list[float]] = [[], []]
    for _ in range(4):
        for took, (policy, machine) in zip(seconds, points, strict=True):
            took.append(timed(workload, policy, machine, Engine.simpy))
    return [
        row("simpy", policy, machine.name, workload, took[1:])
        for took, (policy, machine) in zip(seconds, points, strict=True)
    ]


def wide_workload(tokens: int, layers: int = 48, n_experts: int = 128) -> Workload:
    """Synthetic routing of the shape of Qwen3-30B-A3B: 48 layers, 128 experts, top-8 (or of
    DeepSeek-V3's: 58 layers of 256); each expert is used again by the next token with a chance of
    0.38, as measured on the former."""
    rng = np.random.default_rng(0)
    top_k = 8
    experts = np.argsort(rng.random((layers, n_experts)), axis=1)[:, :top_k]
    steps = np.empty((tokens, layers, top_k), np.int32)
    for token in range(tokens):
        kept = rng.random((layers, top_k)) < 0.38
        wish = np.where(kept, 2.0, 0.0)
        score = rng.random((layers, n_experts))
        np.put_along_axis(score, experts, np.take_along_axis(score, experts, 1) + wish, axis=1)
        experts = np.argsort(-score, axis=1)[:, :top_k]
        steps[token] = experts
    like = load_workload(open_trace("mixtral-like")).head(1)
    n = tokens * layers
    keys = (
        steps.reshape(-1, top_k)
        + np.tile(np.arange(layers, dtype=np.int32), tokens)[:, None] * n_experts
    )
    rows = np.repeat(np.arange(tokens) * layers, layers)
    return replace(
        like,
        meta=replace(like.meta, n_layers=layers, n_experts=n_experts, top_k=top_k),
        keys=keys.reshape(-1).astype(np.int32),
        weights=np.full(n * top_k, 1 / top_k, np.float32),
        routed=np.ones(n * top_k, np.int32),
        offsets=np.arange(n + 1, dtype=np.int64) * top_k,
        layer=np.tile(np.arange(layers, dtype=np.int32), tokens),
        tokens=np.ones(n, np.int32),
        decode=np.ones(n, np.bool_),
        rows=np.stack([rows, rows + layers], axis=1),
    )


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
    policies: Annotated[str, typer.Option(help="Those to measure.")] = ",".join(POLICIES),
) -> None:
    """Measure, print, and write the results with the machine's description."""
    workload = load_workload(open_trace("mixtral-like"), predictions=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NUMBA_CACHE_DIR"] = folder
        chosen = policies.split(",")
        demand_only = [name for name in chosen if name in DEMAND_ONLY]
        few = [name for name in ("lru", "lfu") if name in chosen]
        for measured in (
            first_answers,
            lambda: rates(workload, chosen, rounds),
            lambda: rates(wide_workload(512), demand_only, rounds),
            lambda: rates(wide_workload(256, 58, 256), few, rounds),
            lambda: simpy_rates(workload.head(512)),
            lambda: [grown(workload, times) for times in (1, 10, 100)],
        ):
            for each in measured():
                rows.append(each)
                print(line(each), flush=True)
    if out is not None:
        about = {"hardware": hardware(), "rows": rows}
        out.write_text(json.dumps(about, indent=1) + "\n")


def grown(workload: Workload, times: int) -> dict[str, Any]:
    """LRU on the trace ``times`` over: the rate, and the most memory held until then."""
    longer = repeated(workload, times)
    took = [timed(longer, "lru", load_machine("rtx3060"), Engine.replay) for _ in range(3)]
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return row("replay", "lru", f"rtx3060, trace x{times}", longer, took) | {"peak_gib": peak_gib}


def line(row: dict[str, Any]) -> str:
    if "first_answer" in row:
        about = f"first answer, {row['first_answer']}"
        return f"{about:48}{row['wall_s']:7.1f} s of wall time at load {row['load']:.1f}"
    extra = f"compile {row['compile_s']:.1f} s" if "compile_s" in row else ""
    if "peak_gib" in row:
        extra = f"peak {row['peak_gib']:.2f} GiB"
    return (
        f"{row['engine']:11}{row['policy']:15}{row['machine']:22}{row['experts']:4} experts"
        f"{row['steps_per_s'] / 1e6:9.3f} M steps/s  {extra}"
    )


if __name__ == "__main__":
    typer.run(main)
