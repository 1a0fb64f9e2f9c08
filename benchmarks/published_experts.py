"""How long an expert takes on the CPU in the bits in which it was published, and otherwise.

CPU seconds of one thread, for both matrices of one expert with random weights: FP8, MXFP4 or a GGUF
file's blocks as published, dequantised in bfloat16, and 4 bits (HQQ).

    python benchmarks/published_experts.py --out benchmarks/results/published_experts.json
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from measured import write_measured
from moerun.bench.random_weights import RandomRecords
from moerun.format.block_scheme import BLOCK_SCHEMES, BlockScheme
from moerun.format.coding import Coding, Kept
from moerun.format.expert import ExpertParam, ExpertShape
from moerun.kernels.slots import ExpertSlot, SlotForm

CPU = torch.device("cpu")
FP8 = Coding("e4m3", "float32", (128, 128))
MXFP4 = Coding("e2m1", "e8m0", (32, 1))
# Hidden size, width of an expert, codings of its matrices, and whether the model has them turned.
MODELS: dict[str, tuple[int, int, tuple[Kept, Kept], bool]] = {
    "gpt-oss-20b": (2880, 2880, (MXFP4, MXFP4), True),
    "qwen3-30b-a3b-fp8": (2048, 768, (FP8, FP8), False),
    "deepseek-v3": (7168, 2048, (FP8, FP8), False),
    "qwen3-30b-a3b-q4_k_m": (2048, 768, (BLOCK_SCHEMES["q4_k"], BLOCK_SCHEMES["q6_k"]), False),
    "qwen3-30b-a3b-q6_k": (2048, 768, (BLOCK_SCHEMES["q6_k"], BLOCK_SCHEMES["q6_k"]), False),
}


def main(
    models: Annotated[str, typer.Option(help="Of the models that are known here.")] = ",".join(
        MODELS
    ),
    tokens: Annotated[str, typer.Option(help="Tokens at once.")] = "1,16,64",
    rounds: Annotated[int, typer.Option(help="Measurements of each case, in turns.")] = 5,
    seed: Annotated[int, typer.Option(help="Of weights and activations.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Print milliseconds an expert, and bytes of its record, by precision."""
    torch.set_num_threads(1)
    rows = []
    for name in models.split(","):
        for row in measure(name, [int(count) for count in tokens.split(",")], rounds, seed):
            rows.append(row)
            ms = "  ".join(f"{precision} {took:7.1f}" for precision, took in row["ms"].items())
            typer.echo(f"{row['model']:>20} {row['tokens']:4} tokens  {ms} ms")
    if out is not None:
        write_measured(out, rows, rounds=rounds, seed=seed)


@torch.inference_mode()
def measure(name: str, tokens: list[int], rounds: int, seed: int) -> list[dict[str, Any]]:
    """A row for each number of tokens."""
    hidden, inner, codings, _ = MODELS[name]
    random = torch.Generator().manual_seed(seed)
    published = "+".join(dict.fromkeys(coding.name for coding in codings))
    slots = {
        published: coded_slot(name, random),
        **{precision: plain_slot(name, precision, seed) for precision in ("bf16", "4bit")},
    }
    rows = []
    for count in tokens:
        x = torch.randn(count, hidden, generator=random).to(torch.bfloat16)
        h = torch.randn(count, inner, generator=random).to(torch.bfloat16)
        took: dict[str, list[float]] = {precision: [] for precision in slots}
        for measured in range(rounds + 1):
            for precision, (slot, _) in slots.items():
                began_s = time.process_time()
                slot.up(x)
                slot.down(h)
                if measured:  # the first warms up
                    took[precision].append(1e3 * (time.process_time() - began_s))
        rows.append(
            {
                "model": name,
                "tokens": count,
                "ms": {precision: median(times) for precision, times in took.items()},
                "spread": {p: (max(t) - min(t)) / median(t) for p, t in took.items()},
                "record_bytes": {precision: size for precision, (_, size) in slots.items()},
            }
        )
    return rows


def shape_of(name: str) -> ExpertShape:
    """The two matrices of an expert, unquantised."""
    hidden, inner, _, turned = MODELS[name]
    sides = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    return ExpertShape(
        tuple(
            ExpertParam(
                param, (columns, rows) if turned else (rows, columns), torch.bfloat16, turned
            )
            for param, (rows, columns) in sides.items()
        )
    )


def plain_slot(name: str, precision: str, seed: int) -> tuple[ExpertSlot, int]:
    """An expert of random weights in its slot, and the bytes of its record."""
    shape = shape_of(name)
    form = SlotForm(shape, precision, CPU)
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    RandomRecords(shape, precision, seed).write(0, record)
    return arrived(form, record)


def coded_slot(name: str, random: torch.Generator) -> tuple[ExpertSlot, int]:
    """The same of random codes."""
    codings = MODELS[name][2]
    params = zip(shape_of(name).params, codings, strict=True)
    shape = ExpertShape(tuple(replace(param, coding=coding) for param, coding in params))
    form = SlotForm(shape, "native", CPU)
    parts: dict[str, torch.Tensor] = {}
    for param, coding in zip(shape.params, codings, strict=True):
        rows, columns = param.shape
        for part, dtype, size in coding.parts(rows, columns):
            least, most = (0, 126) if part == "codes" else (115, 125)
            if part == "scales" and isinstance(coding, BlockScheme):
                least, most = 0, 48  # so that no float16 of these bytes is infinite
            values = torch.randint(least, most, size, generator=random)
            scaled = values / 1e4 if dtype is torch.float32 else values
            parts[f"{param.name}.{part}"] = scaled.to(dtype)
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    form.layout.write(parts, record)
    return arrived(form, record)


def arrived(form: SlotForm, record: torch.Tensor) -> tuple[ExpertSlot, int]:
    """The slot with the expert in it."""
    slot = form.bind(torch.empty(form.slot_bytes, dtype=torch.uint8))
    slot.arrive(record)
    return slot, form.record_bytes


if __name__ == "__main__":
    typer.run(main)
