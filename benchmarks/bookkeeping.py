"""What policy and bookkeeping take of a layer in the live runtime: Session.serve without compute.

CPU seconds of the whole process, over a link that copies nothing and at once, so that only our
own work is left. Goals: 15 us a layer with 8 experts, 60 us with 128 and more.

    python benchmarks/bookkeeping.py --out benchmarks/results/bookkeeping.json
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from moepolicy import Context, find_policy
from moerun.bench.report import hardware
from moerun.bench.routing import UNIFORM, ForcedRouting, load_routing
from moerun.links import Done, LinkStatistics, Variant
from moerun.live.gates import SessionExperts
from moerun.live.session import Session
from moerun.memory.compiling import Compiling
from moerun.offload.gate import GateOutput
from moerun.versions import run_packages

GOAL_US = {8: 15.0, 128: 60.0, 256: 60.0}
SHAPES = ((8, 2, "mixtral-like"), (128, 8, UNIFORM), (256, 8, UNIFORM))
POLICIES = ("lru", "lru-spec", "foresight", "foresight-bypass", "foresight-spec")
LAYERS = 16


class InstantLink:
    """Copies nothing, and is done before ``submit`` returns."""

    def __init__(self, n_slots: int) -> None:
        self.streams = 1
        self.chunked = False
        self.slots: Sequence[Any] = [None] * n_slots
        self.statistics = LinkStatistics()

    def start(self, done: Done) -> None:
        self._done = done

    def submit(
        self,
        key: int,
        slot: int,
        variant: Variant = Variant.FULL,
        *,
        demand: bool = True,
        begin_s: float | None = None,
    ) -> None:
        self._done(key, None, time.perf_counter())

    def want(self, key: int) -> None: ...

    def acquire(self, slot: int) -> None: ...

    def release(self, slot: int) -> None: ...

    def resize(self, withdrawn: Sequence[int], granted: Sequence[int]) -> None: ...

    def close(self) -> None: ...


def main(
    tokens: Annotated[int, typer.Option(help="Measured tokens of each run.")] = 100,
    rounds: Annotated[int, typer.Option(help="Runs of each case, in turns.")] = 5,
    compile: Annotated[bool, typer.Option(help="Use compiled calls of the policies.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Print microseconds a layer, all experts there and half of them."""
    torch.set_num_threads(1)
    cases = [
        (experts, top_k, source, policy, hits)
        for experts, top_k, source in SHAPES
        for policy in POLICIES
        for hits in (True, False)
    ]
    found: dict[Any, list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            found[case].append(measure(*case, tokens=tokens, compile=compile))
    rows = [row(case, times, compile) for case, times in found.items()]
    for each in rows:
        typer.echo(
            f"{each['experts']:4} experts, top-{each['top_k']}, {each['policy']:16}"
            f"{each['what']:12}{each['us_per_layer']:7.1f} us a layer "
            f"({each['least_us']:.1f} to {each['most_us']:.1f}), goal {each['goal_us']:.0f}"
        )
    if out is not None:
        made_by = {
            "kind": "measured, CPU time",
            "tokens": tokens,
            "layers": LAYERS,
            "hardware": hardware(torch.device("cpu")),
            "python": platform.python_version(),
            "packages": run_packages(),
        }
        out.write_text(json.dumps({"rows": rows, **made_by}, indent=1) + "\n", encoding="utf-8")


def measure(
    experts: int, top_k: int, source: str, policy: str, hits: bool, *, tokens: int, compile: bool
) -> float:
    """CPU microseconds a layer, with every expert there or with slots for half of them."""
    routing = load_routing(source, layers=LAYERS, experts=experts, top_k=top_k, tokens=2 * tokens)
    context = Context(LAYERS, experts, top_k, experts if hits else experts // 2)
    spec = find_policy(policy)
    compiling = Compiling.ALWAYS if compile else Compiling.NEVER
    session = Session(context, spec, InstantLink, record_bytes=1, compiling=compiling)
    with session:
        if hits:
            serve_all(session, experts, spec.horizon)
        passes = gates(routing, spec.horizon)
        session.wait_compiled()
        serve(session, passes[:tokens])
        began_s = time.process_time()
        serve(session, passes[tokens:])
        return (time.process_time() - began_s) / (tokens * LAYERS) * 1e6


def serve_all(session: Session, experts: int, horizon: int) -> None:
    """Bring every expert of every layer in."""
    nothing = torch.full((horizon, 1, experts), torch.nan, dtype=torch.float16)
    for layer in range(LAYERS):
        for expert in range(experts):
            ids, weights = torch.tensor([[expert]]), torch.ones(1, 1)
            for _ in session.serve(layer, ids, weights, GateOutput(predicted=nothing)):
                pass


def gates(routing: ForcedRouting, horizon: int) -> list[list[tuple[Any, ...]]]:
    """By token and layer: ids, weights, logits and predictions as a model's gates give them."""
    ids, weights = torch.from_numpy(routing.ids), torch.from_numpy(routing.weights)
    logits = torch.from_numpy(routing.logits).float()
    said = torch.from_numpy(routing.predicted)
    # Of the layers after each: a recording has the predictions of it.
    ahead = torch.stack([said[min(i, len(said) - 1)].roll(-1 - i, 1) for i in range(horizon or 1)])
    return [
        [
            (
                ids[t : t + 1, layer],
                weights[t : t + 1, layer],
                logits[t : t + 1, layer],
                ahead[:, t : t + 1, layer] if horizon else None,
            )
            for layer in range(LAYERS)
        ]
        for t in range(len(ids))
    ]


def serve(session: Session, passes: list[list[tuple[Any, ...]]]) -> None:
    experts = SessionExperts(session)
    for layers in passes:
        for layer, (ids, weights, logits, predicted) in enumerate(layers):
            experts.gate_ran(layer, GateOutput(logits, predicted))
            for _ in experts.serve(layer, ids, weights):
                pass


def row(case: Any, times: list[float], compile: bool) -> dict[str, Any]:
    experts, top_k, source, policy, hits = case
    return {
        "experts": experts,
        "top_k": top_k,
        "routing": source,
        "policy": policy,
        "what": "hits only" if hits else "half there",
        "compiled": compile,
        "us_per_layer": median(times),
        "least_us": min(times),
        "most_us": max(times),
        "goal_us": GOAL_US[experts],
    }


if __name__ == "__main__":
    typer.run(main)
