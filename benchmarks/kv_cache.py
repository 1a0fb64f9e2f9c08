"""How long decoding takes with transformers' caches of keys and values, and with moerun's.

CPU seconds of one thread for a token, experts and all, of a random Mixtral with attention of
Mixtral-8x7B's shape (32 heads on 8 of keys, 128 wide) and small matrices around it, in bfloat16.
The static cache has room for the text and the tokens decoded, no more.

    python benchmarks/kv_cache.py --out benchmarks/results/kv_cache.json
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from moerun.bench.report import hardware
from moerun.live.kvcache import new_cache
from moerun.versions import run_packages
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

CONTEXTS = "128,512,2048,8192"
CACHES = ("dynamic", "static", "moerun")


def main(
    contexts: Annotated[str, typer.Option(help="Tokens already there.")] = CONTEXTS,
    layers: Annotated[int, typer.Option(help="Of the model.")] = 4,
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Decoded in each measurement.")] = 8,
    rounds: Annotated[int, typer.Option(help="Measurements of each case, in turns.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Print milliseconds a token by cache and context."""
    torch.set_num_threads(1)
    model = random_mixtral(layers, hidden)
    rows = []
    for context in map(int, contexts.split(",")):
        took: dict[str, list[float]] = {name: [] for name in CACHES}
        for measured in range(rounds + 1):
            for name, times in took.items():
                ms = decode(model, filled(name, model, context, tokens), tokens)
                if measured:  # the first warms up
                    times.append(ms)
        row = {"context": context, "ms_per_token": {n: median(t) for n, t in took.items()}}
        rows.append(row | {"spread": {n: (max(t) - min(t)) / median(t) for n, t in took.items()}})
        found = "  ".join(f"{name} {median(times):7.1f}" for name, times in took.items())
        typer.echo(f"{context:6} tokens of context  {found} ms a token")
    if out is not None:
        made_by = {
            "kind": "measured, CPU time",
            "layers": layers,
            "hidden": hidden,
            "tokens": tokens,
            "rounds": rounds,
            "hardware": hardware(torch.device("cpu")),
            "python": platform.python_version(),
            "packages": run_packages(),
        }
        out.write_text(json.dumps({"rows": rows, **made_by}, indent=1) + "\n", encoding="utf-8")


def random_mixtral(layers: int, hidden: int) -> Any:
    config = AutoConfig.for_model(
        "mixtral",
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=hidden,
        head_dim=128,
        vocab_size=1000,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def filled(name: str, model: Any, context: int, tokens: int) -> Any:
    """A cache that holds random states of ``context`` tokens."""
    config = model.config
    if name == "static":
        cache: Any = StaticCache(config=config, max_cache_len=context + tokens)
    elif name == "dynamic":
        cache = DynamicCache(config=config)
    else:
        cache = new_cache(model, context + tokens)
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    generator = torch.Generator().manual_seed(0)
    for layer in range(config.num_hidden_layers):
        states = torch.randn(2, *shape, generator=generator).to(model.dtype)
        cache.update(*states, layer)
    return cache


@torch.inference_mode()
def decode(model: Any, cache: Any, tokens: int) -> float:
    """CPU milliseconds a token."""
    token = torch.tensor([[1]])
    began_s = time.process_time()
    for _ in range(tokens):
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
    return 1e3 * (time.process_time() - began_s) / tokens


if __name__ == "__main__":
    typer.run(main)
