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
SHARED = ("lru", "lfu", "class-lru", "foresight-bypass", "foresight-ahead")  # by all layers
RUNS = [(policy, "layer") for policy in POLICIES] + [(policy, "global") for policy in SHARED]
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
            (policy, scope): moerun.load(
                "tiny", policy=policy, slots=slots, scope=scope, link_gbps=rate, device="cpu"
            )
            for policy, scope in RUNS
        }
        runs: dict[tuple[str, str], list[float]] = {each: [] for each in RUNS}
        try:
            for model in models.values():
                model.runner.session.wait_compiled()
            for _ in range(rounds):
                for each, model in models.items():
                    runs[each].append(speed(model, tokens))
            for each, model in models.items():
                told = [median(runs[each]), min(runs[each]), max(runs[each])]
                told.append(100 * model.totals.hit_ratio)
                name = each[0] + (", shared" if each[1] == "global" else "")
                lines.append(f"| {rate} | {name} | {' | '.join(f'{x:.1f}' for x in told)} |")
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
