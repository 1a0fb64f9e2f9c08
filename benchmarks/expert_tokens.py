"""How long a quantised matrix of an expert takes on the CPU for one token and for a prompt's many.

CPU seconds of one thread, at the shapes of Mixtral-8x7B's experts with random weights: torch's
int4 kernel, moerun's block-wise dequantisation, and the same matrix unquantised in bfloat16.

    python benchmarks/expert_tokens.py --out benchmarks/results/expert_tokens.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from measured import write_measured
from moerun.bench.random_weights import RandomRecords
from moerun.format.expert import ExpertShape
from moerun.format.precision import SCHEMES
from moerun.kernels.slots import SlotForm

CPU = torch.device("cpu")
SHAPES = "14336x4096,4096x14336"
TOKENS = "1,4,8,16,24,32,48,64,96,128,256,512"
WAYS = ("kernel", "blockwise", "bf16")


def main(
    shapes: Annotated[str, typer.Option(help="Rows x columns of each matrix.")] = SHAPES,
    tokens: Annotated[str, typer.Option(help="Tokens at once.")] = TOKENS,
    rounds: Annotated[int, typer.Option(help="Measurements of each case, in turns.")] = 5,
    seed: Annotated[int, typer.Option(help="Of weights and activations.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Print milliseconds a matrix by precision and tokens, and which way moerun takes."""
    torch.set_num_threads(1)
    rows = []
    counts = [int(count) for count in tokens.split(",")]
    for each in shapes.split(","):
        n, k = map(int, each.split("x"))
        for precision in SCHEMES:
            for row in measure(n, k, precision, counts, rounds, seed):
                rows.append(row)
                typer.echo(line(row))
    if out is not None:
        write_measured(out, rows, rounds=rounds, seed=seed)


@torch.inference_mode()
def measure(
    n: int, k: int, precision: str, tokens: list[int], rounds: int, seed: int
) -> list[dict[str, Any]]:
    """A row for each number of tokens."""
    linear = linear_of(n, k, precision, seed)
    threshold = linear.blockwise_from
    plain = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)

    def one_way(blockwise_from: int | None, x: torch.Tensor) -> torch.Tensor:
        linear.blockwise_from = blockwise_from
        y: torch.Tensor = linear(x)
        return y

    rows = []
    for count in tokens:
        x = torch.randn(count, k, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        calls: dict[str, Callable[[], object]] = {
            "kernel": partial(one_way, None, x),
            "blockwise": partial(one_way, 1, x),
            "bf16": partial(F.linear, x, plain),
        }
        took: dict[str, list[float]] = {way: [] for way in WAYS}
        for measured in range(rounds + 1):
            for way, call in calls.items():
                began_s = time.process_time()
                call()
                if measured:  # the first warms up
                    took[way].append(1e3 * (time.process_time() - began_s))
        rows.append(row(f"{n}x{k}", precision, count, threshold, took))
    return rows


def linear_of(n: int, k: int, precision: str, seed: int) -> Any:
    """A matrix of random weights as it lies in a slot."""
    shape = ExpertShape.matrix(n, k)
    form = SlotForm(shape, precision, CPU)
    slot = form.bind(torch.empty(form.slot_bytes, dtype=torch.uint8))
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    RandomRecords(shape, precision, seed).write(0, record)
    slot.arrive(record)
    return slot.linears[0]


def row(
    shape: str, precision: str, tokens: int, threshold: int | None, took: dict[str, list[float]]
) -> dict[str, Any]:
    return {
        "shape": shape,
        "precision": precision,
        "tokens": tokens,
        "takes": "kernel" if threshold is None or tokens < threshold else "blockwise",
        "ms": {way: median(times) for way, times in took.items()},
        "spread": {way: (max(t) - min(t)) / median(t) for way, t in took.items()},
    }


def line(row: dict[str, Any]) -> str:
    ms = "  ".join(f"{way} {row['ms'][way]:7.1f}" for way in WAYS)
    return (
        f"{row['shape']:>10} {row['precision']} {row['tokens']:4} tokens  {ms} ms  "
        f"moerun takes {row['takes']}"
    )


if __name__ == "__main__":
    typer.run(main)
