"""Experts on disk and memory for half of them, without a GPU: ours beside accelerate and mmap.

Random weights in bfloat16 for all, the same forced routing, the same tokens out (checked), each
engine in a process of its own under the same memory limit, in turns. The limit is a control
group's and covers everything: the process, its weights, and the page cache of what it reads.

    python benchmarks/offload_cpu.py --folder SCRATCH --out benchmarks/results/offload_cpu.json
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from memory_group import MemoryGroup
from moerun.bench.report import hardware
from moerun.commands.prepare import quiet_libraries
from moerun.versions import run_packages
from offload_engines import ENGINES, OURS, PRECISION, Case, make_engine, prepare

app = typer.Typer(add_completion=False)


class Child:
    """An engine in a process of its own, and in a memory group of its own."""

    def __init__(self, engine: str, case: Case, limit_bytes: int | None, threads: int) -> None:
        self.engine = engine
        self.rates: list[float] = []
        self.ids: list[int] = []
        self.group = MemoryGroup(f"moe-{engine}", limit_bytes) if limit_bytes else None
        command = [sys.executable, __file__, "child", engine, json.dumps(asdict(case), default=str)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        if self.group:
            self.group.add(self._process.pid)
        self._ask()  # it has loaded

    def run(self) -> None:
        rate, self.ids = self._ask()
        self.rates.append(rate)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self.group:
            self.group.close()

    def _ask(self) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            raise SystemExit(f"error: {self.engine} ended with {code}: see above, or out of memory")
        return json.loads(answer)


@app.command()
def compare(
    folder: Annotated[Path, typer.Option(help="Where the weights are written: on a real disk.")],
    shape: Annotated[str, typer.Option(help="As for moerun bench.")] = "mixtral-8x7b",
    hidden: Annotated[
        int, typer.Option(help="Scale the shape to this hidden size; 0: leave it as it is.")
    ] = 1024,
    layers: Annotated[int | None, typer.Option(help="Only the first ones.")] = 16,
    routing: Annotated[str, typer.Option(help="As for moerun bench.")] = "mixtral-like",
    tokens: Annotated[int, typer.Option(help="Measured tokens of each run.")] = 12,
    warm_up: Annotated[int, typer.Option(help="Tokens before them.")] = 4,
    rounds: Annotated[int, typer.Option(help="Runs of each engine, in turns.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads that compute.")] = 1,
    overhead_gib: Annotated[
        float,
        typer.Option(help="Of the limit: Python, torch, activations, staging, accelerate's layer."),
    ] = 0.6,
    limit: Annotated[bool, typer.Option(help="Limit memory to half of the experts.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Print tokens/s of each engine and how many times accelerate's."""
    case = Case(shape, hidden or None, layers, routing, tokens, warm_up, folder.absolute())
    model = prepare(case)
    half_bytes = model.expert_bytes // 2
    overhead_bytes = model.index.dense_bytes + int(overhead_gib * 2**30)
    limit_bytes = half_bytes + overhead_bytes if limit else None
    children: list[Child] = []
    try:
        for engine in ENGINES:
            typer.echo(f"loading {engine}", err=True)
            children.append(Child(engine, case, limit_bytes, threads))
        for number in range(rounds):
            for child in children:
                child.run()
                typer.echo(f"round {number + 1}: {child.engine} {child.rates[-1]:.3f}", err=True)
        rows = [row(child, children) for child in children]
    finally:
        for child in children:
            child.close()
    for each in rows:
        typer.echo(
            f"{each['engine']:11}{each['tokens_per_s']:8.3f} tokens/s (spread "
            f"{100 * each['spread']:.0f} %), {each['times_accelerate']:.2f} x accelerate, "
            f"{each['times_mmap']:.2f} x mmap"
        )
    found = {
        "kind": "measured, random weights, forced routing",
        "rows": rows,
        "shape": model.index.model,
        "layers": model.index.n_layers,
        "hidden_size": model.config.hidden_size,
        "precision": PRECISION,
        "expert_bytes": model.records.record_bytes,
        "all_experts_bytes": model.expert_bytes,
        "limit_bytes": limit_bytes,
        "limit_covers": "process, weights and page cache (control group)" if limit else "nothing",
        "tokens": tokens,
        "warm_up": warm_up,
        "rounds": rounds,
        "routing": routing,
        "routing_sha256": case.load_routing(model).sha256,
        "seed": model.seed,
        "hardware": hardware(torch.device("cpu")) | {"threads": threads},
        "python": platform.python_version(),
        "packages": run_packages(),
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def row(child: Child, children: list[Child]) -> dict[str, Any]:
    rates = {other.engine: median(other.rates) for other in children}
    mine = rates[child.engine]
    return {
        "engine": child.engine,
        "ours": child.engine in OURS,
        "tokens_per_s": mine,
        "spread": (max(child.rates) - min(child.rates)) / mine,
        "rounds": child.rates,
        "times_accelerate": mine / rates["accelerate"],
        "times_mmap": mine / rates["mmap"],
        "same_tokens_as_mmap": child.ids == children[-1].ids,
        "peak_bytes": child.group.peak_bytes() if child.group else None,
    }


@app.command(hidden=True)
def child(engine: str, case: str) -> None:
    """One engine: loads at the first line on stdin, then runs once for each."""
    sys.stdin.readline()
    settings = json.loads(case)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    quiet_libraries()
    made = make_engine(Case(**settings | {"folder": Path(settings["folder"])}), engine)
    print("true", flush=True)
    while sys.stdin.readline():
        print(json.dumps(made.run()), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] != "child":
        sys.argv.insert(1, "compare")
    app()
