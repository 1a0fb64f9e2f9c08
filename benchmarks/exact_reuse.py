"""What it costs to read prompts in chunks, so that a text may go on exactly from what is kept.

A random Qwen3-MoE model in float32, packed for the measurement. Its prompts are read in one pass
and in chunks of several lengths, with all experts in memory and with half of them: CPU seconds of
one thread, and experts that were loaded.

    python benchmarks/exact_reuse.py --out benchmarks/results/exact_reuse.json
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from measured import write_measured
from moepolicy import find_policy
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from transformers import AutoConfig, AutoModelForCausalLM

N_EXPERTS = 32
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": N_EXPERTS,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 384,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main(
    tokens: Annotated[int, typer.Option(help="Of a prompt.")] = 1024,
    chunks: Annotated[str, typer.Option(help="Tokens of a chunk; 0: one pass.")] = "0,64,128,256",
    rounds: Annotated[int, typer.Option(help="Measurements of each case, in turns.")] = 3,
    seed: Annotated[int, typer.Option(help="Of weights and prompts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Print CPU seconds and loads of reading a prompt, by length of chunks."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = made(Path(folder), seed)
        rows = [
            row
            for slots in (N_EXPERTS, N_EXPERTS // 2)
            for row in measure(store, slots, tokens, [int(n) for n in chunks.split(",")], rounds)
        ]
    for row in rows:
        chunk = f"chunks of {row['chunk_tokens']}" if row["chunk_tokens"] else "one pass"
        typer.echo(
            f"{row['slots']:3} of {N_EXPERTS} slots, {chunk:14} {row['cpu_s']:7.2f} s  "
            f"{row['loads']:6,} loads"
        )
    if out is not None:
        write_measured(out, rows, rounds=rounds, seed=seed)


def made(folder: Path, seed: int) -> ExpertStore:
    """The store of the random model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SIZES))
    model.save_pretrained(folder / "model")
    return pack(folder / "model", folder / "store")


def measure(
    store: ExpertStore, slots: int, tokens: int, chunks: list[int], rounds: int
) -> list[dict[str, Any]]:
    """A row for each length of chunks."""
    random = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, SIZES["vocab_size"], (rounds + 1, 1, tokens), generator=random)
    took: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    loads: dict[int, list[int]] = {chunk: [] for chunk in chunks}
    settings = Settings(find_policy("lru"), slots=slots, exact_reuse=True)
    with Runner(store, settings) as runner:
        for measured, prompt in enumerate(prompts):
            for chunk in chunks:
                runner.kept.chunk_tokens = chunk
                began_s, before = time.process_time(), runner.session.totals
                sampling = Sampling(max_new_tokens=1, reuse=False)
                runner.generation(reuse=True).run(prompt, sampling)
                if measured:  # the first warms up
                    took[chunk].append(time.process_time() - began_s)
                    loads[chunk].append(runner.session.totals.since(before).loads)
    return [
        {
            "slots": slots,
            "tokens": tokens,
            "chunk_tokens": chunk,
            "cpu_s": median(took[chunk]),
            "spread": (max(took[chunk]) - min(took[chunk])) / median(took[chunk]),
            "loads": median(loads[chunk]),
        }
        for chunk in chunks
    ]


if __name__ == "__main__":
    typer.run(main)
