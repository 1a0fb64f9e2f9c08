"""The policies of docs/research.md live, on the bundled model: tokens/s in turns, with spread.

    python benchmarks/research_live.py --gbps 0.2 --gbps 0.5 --gbps 2 --out live.md

Policies run compiled, as they do in a run of more than some seconds. Nothing else should keep the
machine busy: the load is printed with the results.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import moerun
import torch
import typer

POLICIES = ("lru", "lru-spec", "class-lru", "foresight-bypass", "foresight-ahead", "foresight-spec")
PROMPT = "It was the best of times, it was the worst of times, it was the age of wisdom, and"


def main(
    gbps: Annotated[list[float], typer.Option(help="The link's rate, 10^9 bytes/s.")],
    out: Annotated[Path, typer.Option(help="A Markdown file to write.")],
    tokens: Annotated[int, typer.Option(help="Tokens of each run.")] = 200,
    rounds: Annotated[int, typer.Option(help="Runs of each policy, in turns.")] = 5,
    slots: Annotated[int, typer.Option(help="Experts of a layer that are kept.")] = 4,
) -> None:
    """Measure every policy at every rate."""
    torch.set_num_threads(1)
    lines = [
        "| GB/s | policy | tokens/s | least | most | hit % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for rate in gbps:
        models = {
            policy: moerun.load("tiny", policy=policy, slots=slots, link_gbps=rate, device="cpu")
            for policy in POLICIES
        }
        runs: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        try:
            for model in models.values():
                model.runner.session.wait_compiled()
            for _ in range(rounds):
                for policy, model in models.items():
                    runs[policy].append(speed(model, tokens))
            for policy, model in models.items():
                told = [median(runs[policy]), min(runs[policy]), max(runs[policy])]
                told.append(100 * model.totals.hit_ratio)
                lines.append(f"| {rate} | {policy} | {' | '.join(f'{x:.1f}' for x in told)} |")
        finally:
            for model in models.values():
                model.close()
    load = " ".join(f"{one:.1f}" for one in os.getloadavg())
    lines.append(f"\nLoad of the machine's {os.cpu_count()} cores at the end: {load}.")
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def speed(model: Any, tokens: int) -> float:
    """Tokens/s of a continuation; the time of the prompt counts, too."""
    model.runner.session.settle()
    ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    began_s = time.perf_counter()
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return tokens / (time.perf_counter() - began_s)


if __name__ == "__main__":
    typer.run(main)
