r"""What a server gains by decoding several answers together (`moerun serve --max-batch`).

A random Qwen3-MoE in bfloat16 is packed for the measurement and served twice, in processes of
their own: an answer at a time, and up to eight together. Threads of one client each ask over HTTP,
with prompts of their own. Each case runs against both servers in turns.

    python benchmarks/served_together.py --folder SCRATCH \
        --out benchmarks/results/served_together.json

Tokens/s are those of all clients together, from the first request sent to the last answer.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx2 as httpx
import numpy as np
import torch
import typer
from measured import write_measured
from moepolicy.tables import Table
from moerun.checkpoint.hub import resolve
from moerun.store.pack import pack
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

N_EXPERTS = 64
SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": N_EXPERTS,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "max_position_embeddings": 1024,
}
TOGETHER = 8
PROMPT_TOKENS = 16
PATIENCE_S = 600


def main(
    folder: Annotated[Path, typer.Option(help="Scratch for the model, 3.5 GB.")],
    tokens: Annotated[int, typer.Option(help="Of each answer.")] = 32,
    clients: Annotated[str, typer.Option(help="How many ask at once.")] = "1,2,4,8",
    slots: Annotated[int, typer.Option(help="Experts cached per layer.")] = N_EXPERTS // 2,
    link_gbps: Annotated[float, typer.Option(help="The link between memory and slots.")] = 4.0,
    threads: Annotated[int, typer.Option(help="Threads that compute.")] = 1,
    rounds: Annotated[int, typer.Option(help="Measurements of each case, in turns.")] = 3,
    seed: Annotated[int, typer.Option(help="Of weights and prompts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Print tokens/s by how many clients ask and how many answers are decoded together."""
    store = made(folder, seed)
    numbers = [int(n) for n in clients.split(",")]
    taken: dict[tuple[int, int], list[dict[str, float]]] = {}
    options = ("--slots", slots, "--link-gbps", link_gbps, "--threads", threads)
    with ExitStack() as stack:
        urls = {
            together: stack.enter_context(served(store, together, *options))
            for together in (1, TOGETHER)
        }
        for measured in range(rounds + 1):
            for number in numbers:
                for together, url in urls.items():
                    case = load(url, number, tokens, seed=seed + measured)
                    if measured:  # the first warms up
                        taken.setdefault((number, together), []).append(case)
    rows = [
        {"clients": number, "together": together, "tokens": tokens, "slots": slots}
        | {"link_gbps": link_gbps, "threads": threads}
        | {name: median(case[name] for case in cases) for name in cases[0]}
        | {"spread": spread([case["tokens_per_s"] for case in cases])}
        for (number, together), cases in taken.items()
    ]
    print_rows(rows)
    if out is not None:
        write_measured(out, rows, rounds=rounds, seed=seed)


def made(folder: Path, seed: int) -> Path:
    """The packed random model, with the bundled model's tokenizer."""
    store = folder / "store"
    if not store.exists():
        tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"))
        torch.manual_seed(seed)
        config = AutoConfig.for_model("qwen3_moe", vocab_size=len(tokenizer), **SIZES)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        pack(folder / "model", store).close()
    return store


@contextmanager
def served(store: Path, together: int, *options: Any) -> Iterator[str]:
    """The address of a server of the store."""
    command = [sys.executable, "-c", "from moerun.cli import main; main()", "serve"]
    asked: list[Any] = ["--model", store, "--port", 0, "--max-batch", together, *options]
    asked += ["--model-name", "random"]
    with subprocess.Popen(
        [*command, *map(str, asked)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MOERUN_API_KEY": ""},
    ) as process:
        assert process.stderr is not None
        said = ""
        try:
            while not (found := re.search(r"serving .* on (http://\S+)\n", said)):
                line = process.stderr.readline()
                if not line:
                    raise SystemExit(f"the server did not start:\n{said}")
                said += line
            yield found[1]
        finally:
            process.kill()


def load(url: str, clients: int, tokens: int, *, seed: int) -> dict[str, float]:
    """Let ``clients`` ask at once, two answers each."""
    drawn = np.random.default_rng([seed, clients])
    prompts = drawn.integers(3, 500, (clients, 2, PROMPT_TOKENS)).tolist()
    before = counted(url)
    began_s = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        took_s = list(chain.from_iterable(pool.map(lambda own: ask(url, own, tokens), prompts)))
    wall_s = time.perf_counter() - began_s
    after = counted(url)
    answered = 2 * clients * tokens
    requests = after["requests"] - before["requests"]
    return {
        "tokens_per_s": answered / wall_s,
        "answer_s": median(took_s),
        "loads_a_token": (after["loads"] - before["loads"]) / answered,
        "hit_ratio": (after["hits"] - before["hits"]) / requests,
    }


def ask(url: str, prompts: list[list[int]], tokens: int) -> list[float]:
    """One client's requests, one after the other: the seconds of each."""
    took_s = []
    with httpx.Client(timeout=PATIENCE_S) as client:
        for prompt in prompts:
            fields = {"model": "random", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            began_s = time.perf_counter()
            answer = client.post(f"{url}/v1/completions", json=fields | {"ignore_eos": True})
            answer.raise_for_status()
            took_s.append(time.perf_counter() - began_s)
            if answer.json()["usage"]["completion_tokens"] != tokens:
                raise SystemExit(f"an answer of another length: {answer.text}")
    return took_s


def counted(url: str) -> dict[str, float]:
    """The server's counters of experts."""
    samples = {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
        for sample in family.samples
    }
    wanted = {
        outcome: samples[f"moerun_expert_requests_total {outcome}"]
        for outcome in ("hit", "late", "miss")
    }
    return {
        "loads": samples["moerun_expert_loads_total demand"]
        + samples["moerun_expert_loads_total prefetch"],
        "requests": sum(wanted.values()),
        "hits": wanted["hit"],
    }


def spread(values: list[float]) -> float:
    """The range of the values over their median."""
    return (max(values) - min(values)) / median(values)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print the table of the rows."""
    headings = ["tokens/s", "+- %", "s an answer", "loads a token", "hit %"]
    table = Table(["clients", "together"], headings, right=["clients", "together"])
    for row in rows:
        table.add_row(
            str(row["clients"]),
            str(row["together"]),
            f"{row['tokens_per_s']:.1f}",
            f"{50 * row['spread']:.0f}",
            f"{row['answer_s']:.2f}",
            f"{row['loads_a_token']:.1f}",
            f"{100 * row['hit_ratio']:.1f}",
        )
    typer.echo(table.render())


if __name__ == "__main__":
    typer.run(main)
