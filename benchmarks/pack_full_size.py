"""Packs a checkpoint of Mixtral-8x7B's true size under a hard memory limit, kills it, resumes it.

Nobody needs 93 GB for that: tensors, names and shards are those of the published checkpoint, but
only the first layers' weights, the gates and the embeddings are random; the others are holes in
sparse files, which read as zeros. Sizes, peak memory, resuming and checksums are thus the true
ones; times are not, since HQQ is soon done with zeros.

    python benchmarks/pack_full_size.py --folder SCRATCH --out benchmarks/results/pack.json
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from memory_group import MemoryGroup
from moerun.bench.models import find_config
from moerun.bench.report import hardware
from moerun.checkpoint.hub import resolve
from moerun.commands.prepare import quiet_libraries
from moerun.format.tensorfile import as_bytes, bytes_of, header_of
from moerun.store.expert_store import ExpertStore
from moerun.versions import run_packages

SHAPE = "mixtral-8x7b"
SHARD_BYTES = 5 * 10**9  # as published: 19 of them
WEIGHT_STD = 0.02
DTYPE = torch.bfloat16
Tensors = dict[str, tuple[int, ...]]


def main(
    folder: Annotated[Path, typer.Option(help="Scratch: about 5 GB and the store.")],
    precision: Annotated[str, typer.Option(help="Of the experts.")] = "2bit",
    attention: Annotated[str, typer.Option(help="Of attention.")] = "4bit",
    layers: Annotated[int | None, typer.Option(help="Only the first ones.")] = None,
    random_layers: Annotated[int, typer.Option(help="With random weights.")] = 1,
    kill_after: Annotated[float, typer.Option(help="Seconds to the first packing's end.")] = 60.0,
    limit_gib: Annotated[float, typer.Option(help="Of memory, page cache included.")] = 6.0,
    limits: Annotated[bool, typer.Option(help="Set it (needs a control group).")] = True,
    keep: Annotated[bool, typer.Option(help="Leave checkpoint and store there.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Print what packing took, and the sizes beside the published ones."""
    quiet_libraries()
    config = find_config(SHAPE, layers)
    source, store = folder / "checkpoint", folder / "store"
    source_bytes = write_checkpoint(config, source, random_layers)
    command = [sys.executable, "-c", "from moerun.cli import main; main()", "pack", str(source)]
    command += ["--out", str(store), "--precision", precision, "--attention", attention]
    command += ["--device", "cpu"]
    limit_bytes = int(limit_gib * 2**30) if limits else None
    runs = [run(command, limit_bytes, kill_after), run(command, limit_bytes, None)]
    assert runs[-1]["exit"] == 0, "packing failed"
    packed = ExpertStore.open(store)
    read_all(packed)
    sizes = {path.name: path.stat().st_size for path in store.iterdir()}
    result: dict[str, Any] = {
        "kind": "measured; weights are zero beyond the first layers",
        "shape": SHAPE,
        "layers": config.num_hidden_layers,
        "random_layers": random_layers,
        "precision": precision,
        "attention": attention,
        "source_bytes": source_bytes,
        "store_bytes": sum(sizes.values()),
        "limit_bytes": limit_bytes,
        "runs": runs,
        "hardware": hardware(torch.device("cpu")),
        "python": platform.python_version(),
        "packages": run_packages(),
    }
    typer.echo(
        f"{source_bytes / 2**30:.2f} GiB became {result['store_bytes'] / 2**30:.2f} GiB: killed "
        f"after {runs[0]['seconds']:.0f} s, then {runs[1]['seconds']:.0f} s; at most "
        f"{max(r['peak_bytes'] for r in runs) / 2**30:.2f} GiB resident; all records read back"
    )
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not keep:
        shutil.rmtree(source)
        shutil.rmtree(store)


def tensors_of(config: Any) -> Tensors:
    """Names and shapes as Mixtral's checkpoints have them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    keys = config.num_key_value_heads * head
    found: Tensors = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            found[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
        found[f"{at}.block_sparse_moe.gate.weight"] = (config.num_local_experts, hidden)
        for expert in range(config.num_local_experts):
            for name, shape in (
                ("w1", (inner, hidden)),
                ("w2", (hidden, inner)),
                ("w3", (inner, hidden)),
            ):
                found[f"{at}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
        found[f"{at}.input_layernorm.weight"] = (hidden,)
        found[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (config.vocab_size, hidden)}


def shards_of(tensors: Tensors) -> Iterator[Tensors]:
    shard: Tensors = {}
    for name, shape in tensors.items():
        if sum(bytes_of(DTYPE, s) for s in [*shard.values(), shape]) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def write_checkpoint(config: Any, folder: Path, random_layers: int) -> int:
    """Returns the bytes of its weights, holes included."""
    folder.mkdir(parents=True)
    config.dtype = DTYPE
    config.save_pretrained(folder)
    for path in resolve("tiny").glob("tokenizer*"):
        shutil.copy(path, folder)
    shards = list(shards_of(tensors_of(config)))
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shard, name)
        total += write_shard(folder / name, shard, random_layers)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def write_shard(path: Path, shard: Tensors, random_layers: int) -> int:
    header, entries = header_of({name: (DTYPE, shape) for name, shape in shard.items()})
    generator = torch.Generator().manual_seed(len(path.name))
    with path.open("wb") as file:
        file.write(header)
        for name, shape in shard.items():
            if name.endswith("norm.weight"):
                values = torch.ones(shape)
            elif has_weights(name, random_layers):
                values = torch.randn(shape, generator=generator) * WEIGHT_STD
            else:
                continue
            file.seek(entries[name].offset)
            file.write(as_bytes(values.to(DTYPE)).numpy().data)
        data_bytes = sum(entry.nbytes for entry in entries.values())
        file.truncate(len(header) + data_bytes)
    return data_bytes


def has_weights(name: str, random_layers: int) -> bool:
    parts = name.split(".")
    return parts[1] != "layers" or "gate" in parts or int(parts[2]) < random_layers


def run(command: list[str], limit_bytes: int | None, kill_after_s: float | None) -> dict[str, Any]:
    """One packing in a process of its own; ``kill_after_s``: killed then, without warning."""
    group = MemoryGroup("moe-pack", limit_bytes) if limit_bytes else None
    began_s = time.perf_counter()
    process = subprocess.Popen(command)
    if group:
        group.add(process.pid)
    killed = False
    while (found := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        time.sleep(0.2)
        if kill_after_s is not None and time.perf_counter() - began_s > kill_after_s and not killed:
            process.send_signal(signal.SIGKILL)
            killed = True
    seconds = time.perf_counter() - began_s
    process.returncode = os.waitstatus_to_exitcode(found[1])
    if group:
        group.close()
    return {
        "killed": killed,
        "exit": process.returncode,
        "seconds": seconds,
        "cpu_s": found[2].ru_utime + found[2].ru_stime,
        "peak_bytes": found[2].ru_maxrss * 1024,
    }


def read_all(store: ExpertStore) -> None:
    """Every record once, which compares its checksum. RunError where one is damaged."""
    record = torch.empty(store.record_bytes, dtype=torch.uint8)
    for key in range(store.n_keys):
        store.read_into(key, record)


if __name__ == "__main__":
    typer.run(main)
