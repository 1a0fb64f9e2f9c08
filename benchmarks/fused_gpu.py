"""What a GPU takes for a quantised matrix of an expert: our kernels on its packed bytes.

At the shapes of Mixtral-8x7B's experts with random weights, beside the same matrix in bfloat16 and
beside dequantising it for every product, which is what the kernels save. GB/s are of packed bytes.

    python benchmarks/fused_gpu.py --out benchmarks/results/fused_gpu.json
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from moerun.bench.random_weights import RandomRecords
from moerun.bench.report import hardware
from moerun.devices import find_device
from moerun.format.bitplanes import dequantise
from moerun.format.expert import ExpertShape
from moerun.format.precision import SCHEMES
from moerun.kernels.slots import FusedSlot
from moerun.versions import run_packages

SHAPES = "28672x4096,4096x14336"
TOKENS = "1,2,16,64,512"


def main(
    shapes: Annotated[str, typer.Option(help="Rows x columns of each matrix.")] = SHAPES,
    tokens: Annotated[str, typer.Option(help="Tokens at once.")] = TOKENS,
    rounds: Annotated[int, typer.Option(help="Measurements of each case, in turns.")] = 7,
    products: Annotated[int, typer.Option(help="In one measurement, behind each other.")] = 20,
    device: Annotated[str, typer.Option(help="As for moerun.")] = "cuda",
    out: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Print microseconds a product by precision, tokens and way."""
    on = find_device(device)
    rows = []
    for each in shapes.split(","):
        n, k = map(int, each.split("x"))
        for precision in SCHEMES:
            for count in map(int, tokens.split(",")):
                rows.append(measure(n, k, precision, count, (rounds, products), on))
                typer.echo(line(rows[-1]))
    if out is not None:
        made_by = {
            "kind": "measured",
            "rounds": rounds,
            "hardware": hardware(on),
            "python": platform.python_version(),
            "packages": run_packages(),
        }
        out.write_text(json.dumps({"rows": rows, **made_by}, indent=1) + "\n", encoding="utf-8")


@torch.inference_mode()
def measure(
    n: int, k: int, precision: str, tokens: int, times: tuple[int, int], device: torch.device
) -> dict[str, Any]:
    """One case; ``times`` are the rounds, in which the ways take turns, and products in each."""
    rounds, products = times
    shape, scheme = ExpertShape.matrix(n, k), SCHEMES[precision]
    layout = shape.record(precision)
    record = torch.empty(layout.record_bytes, dtype=torch.uint8)
    RandomRecords(shape, precision, seed=0).write(0, record)
    record = record.to(device)
    views = layout.views(record)
    linear = FusedSlot(shape, scheme, views, record).linears[0]
    parts = {name.removeprefix("weight."): view for name, view in views.items()}
    plain = dequantise(parts, scheme, n, k).to(torch.bfloat16)
    x = torch.randn(tokens, k).to(device, torch.bfloat16)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "fused": lambda: linear(x),
        "bf16": lambda: F.linear(x, plain),
        "dequantised": lambda: F.linear(x, dequantise(parts, scheme, n, k).to(torch.bfloat16)),
    }
    difference = (ways["fused"]().float() - ways["bf16"]().float()).abs().max()
    took: dict[str, list[float]] = {way: [] for way in ways}
    for measured in range(rounds + 1):
        for way, product in ways.items():
            seconds = timed(product, products, device)
            if measured:  # the first warms up
                took[way].append(1e6 * seconds)
    return {
        "shape": f"{n}x{k}",
        "precision": precision,
        "tokens": tokens,
        "packed_bytes": layout.record_bytes,
        "us": {way: median(times) for way, times in took.items()},
        "spread": {way: (max(t) - min(t)) / median(t) for way, t in took.items()},
        "largest_difference": float(difference / ways["bf16"]().float().abs().max()),
    }


def timed(product: Callable[[], torch.Tensor], products: int, device: torch.device) -> float:
    """Seconds of one product, of several that the device works off behind each other."""
    settle(device)
    began_s = time.perf_counter()
    for _ in range(products):
        product()
    settle(device)
    return (time.perf_counter() - began_s) / products


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def line(row: dict[str, Any]) -> str:
    us = "  ".join(f"{way} {took:9.1f}" for way, took in row["us"].items())
    rate = row["packed_bytes"] / row["us"]["fused"] / 1e3
    return (
        f"{row['shape']:>10} {row['precision']} {row['tokens']:4} tokens  {us} us  "
        f"{rate:6.0f} GB/s, off by {100 * row['largest_difference']:.2f} %"
    )


if __name__ == "__main__":
    typer.run(main)
