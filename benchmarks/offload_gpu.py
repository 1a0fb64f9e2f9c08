"""Experts in host memory behind a GPU: ours beside accelerate's CPU offload, in turns.

The shape's first layers, random weights, the same forced routing. accelerate keeps every layer's
experts on the host in bfloat16 and brings all of a layer's at its turn; ours keeps some on the
device, at each precision asked for. bfloat16 tells what the engine does, the others what its
precision adds.

    python benchmarks/offload_gpu.py --out benchmarks/results/offload_gpu.json
"""

from __future__ import annotations

import json
import platform
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from moepolicy import find_policy
from moerun.bench.decoding import MeasuredTimings, decode_forced
from moerun.bench.fit import BenchMemory, refuse_too_big
from moerun.bench.forced_gates import ForcedGates
from moerun.bench.generated import GeneratedModel
from moerun.bench.models import find_config
from moerun.bench.report import hardware
from moerun.bench.routing import ForcedRouting, load_routing
from moerun.bench.run import Bench
from moerun.bench.schedule import BenchSchedule
from moerun.bench.shapes import shape_name
from moerun.checkpoint.families import find_experts
from moerun.commands.prepare import quiet_libraries
from moerun.devices import find_device
from moerun.settings import Settings
from moerun.versions import run_packages
from offload_engines import stock_model
from torch import nn

ACCELERATE = "accelerate bf16"


def main(
    shape: Annotated[str, typer.Option(help="As for moerun bench.")] = "mixtral-8x7b",
    layers: Annotated[int, typer.Option(help="Only the first ones.")] = 8,
    precision: Annotated[list[str] | None, typer.Option(help="Ours; default all of them.")] = None,
    policy: Annotated[str, typer.Option(help="Ours.")] = "lru",
    slots: Annotated[int, typer.Option(help="Experts cached per layer.")] = 4,
    routing: Annotated[str, typer.Option(help="As for moerun bench.")] = "mixtral-like",
    tokens: Annotated[int, typer.Option(help="Measured tokens of each run.")] = 8,
    warm_up: Annotated[int, typer.Option(help="Tokens before them.")] = 8,
    rounds: Annotated[int, typer.Option(help="Runs of each engine, in turns.")] = 3,
    device: Annotated[str, typer.Option(help="As for moerun.")] = "cuda",
    out: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Print tokens/s of each and how many times accelerate's."""
    quiet_libraries()
    on, spec = find_device(device), find_policy(policy)
    schedule = BenchSchedule((spec,), tokens, warm_up, rounds, released=False)
    config = find_config(shape, layers)
    config.dtype = torch.bfloat16
    name = shape_name(shape)
    rates: dict[str, list[float]] = {ACCELERATE: []}
    with ExitStack() as stack:
        plain = GeneratedModel(config, name=name, precision="bf16", seed=0)
        index = plain.index
        forced = load_routing(
            routing,
            layers=index.n_layers,
            experts=index.n_experts,
            top_k=index.top_k,
            tokens=schedule.forced_tokens,
        )
        benches = {}
        for each in precision or ("bf16", "4bit", "2bit"):
            generated = GeneratedModel(config, name=name, precision=each, seed=0)
            settings = Settings(policy=spec, slots=slots, device=on)
            bench = stack.enter_context(Bench(generated, forced, settings, schedule))
            benches[f"{policy} {each}"] = bench
            rates[f"{policy} {each}"] = []
        baseline = Accelerate(plain, shape, layers, forced, on, schedule)
        for number in range(rounds + 1):
            rates[ACCELERATE].append(baseline.run())
            for label, bench in benches.items():
                rates[label].append(tokens / bench.run_policy(spec).decode_s)
            if number == 0:  # the first warms up
                rates = {label: [] for label in rates}
    rows = [row(label, found, rates[ACCELERATE]) for label, found in rates.items()]
    for each_row in rows:
        typer.echo(
            f"{each_row['engine']:16}{each_row['tokens_per_s']:9.3f} tokens/s (spread "
            f"{100 * each_row['spread']:.0f} %), {each_row['times_accelerate']:.1f} x accelerate"
        )
    if out is not None:
        found = {
            "kind": "measured, random weights, forced routing",
            "rows": rows,
            "shape": name,
            "layers": layers,
            "slots": slots,
            "tokens": tokens,
            "warm_up": warm_up,
            "rounds": rounds,
            "routing": routing,
            "routing_sha256": forced.sha256,
            "seed": 0,
            "hardware": hardware(on),
            "python": platform.python_version(),
            "packages": run_packages(),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


class Accelerate:
    """The stock model dispatched by accelerate: experts on the host, all else on the device."""

    def __init__(
        self,
        generated: GeneratedModel,
        shape: str,
        layers: int,
        routing: ForcedRouting,
        device: torch.device,
        schedule: BenchSchedule,
    ) -> None:
        room = BenchMemory(
            generated.expert_bytes, generated.expert_bytes // 8, generated.index.dense_bytes
        )
        refuse_too_big(room, device, on_disk=False)
        self._schedule = schedule
        # Of a fresh configuration: the generated model's says where its experts come from.
        self._model: Any = stock_model(generated, find_config(shape, layers))
        self._model = _dispatch(self._model, generated, device)
        self._gates = ForcedGates(self._model, routing)

    def run(self) -> float:
        """tokens/s of the measured tokens."""
        self._gates.start(None)
        timings = MeasuredTimings(self._schedule.warm_up)
        decode_forced(self._model, timings, self._schedule.forced_tokens)
        return self._schedule.tokens / timings.measured_s


def _dispatch(model: Any, generated: GeneratedModel, device: torch.device) -> Any:
    from accelerate import dispatch_model

    experts = find_experts(model)
    for layer, (_, module) in enumerate(experts):
        for name, tensor in _fused(generated, layer).items():
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    offloaded = {path for path, _ in experts}
    device_map: dict[str, Any] = dict.fromkeys(offloaded, "cpu")
    place = device.index if device.type == "cuda" else "cpu"
    for path, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if path not in offloaded and own:
            device_map[path] = place
    return dispatch_model(model, device_map, main_device=place, force_hooks=True)


def _fused(generated: GeneratedModel, layer: int) -> dict[str, torch.Tensor]:
    """A layer's fused parameters, [experts, ...], of the same records as ours."""
    record = torch.zeros(generated.records.record_bytes, dtype=torch.uint8)
    fused = {
        param.name: torch.empty((generated.n_experts, *param.shape), dtype=torch.bfloat16)
        for param in generated.shape.params
    }
    for expert in range(generated.n_experts):
        generated.records.write(layer * generated.n_experts + expert, record)
        for name, part in generated.records.layout.views(record).items():
            fused[name][expert] = part
    return fused


def row(label: str, found: list[float], accelerate: list[float]) -> dict[str, Any]:
    return {
        "engine": label,
        "tokens_per_s": median(found),
        "spread": (max(found) - min(found)) / median(found),
        "rounds": found,
        "times_accelerate": median(found) / median(accelerate),
    }


if __name__ == "__main__":
    typer.run(main)
