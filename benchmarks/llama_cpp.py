"""moerun beside llama.cpp on the CPU: one GGUF file, the same bits, the same limit of memory.

A Mixtral and a Qwen3 of true widths and few layers, with random weights, are written as GGUF in
Q4_0 and packed from that file by `moerun pack --precision q4_0 --attention q4_0`, which keeps the
blocks' codes and scales. Each engine runs in a process of its own, with the same threads and the
same forced tokens, in turns: with all experts in memory, and in a control group with memory for
half of them, which covers everything: the process, its weights, and the page cache of what it
reads. llama.cpp maps its file there; that is its only way to have experts on disk.

    python benchmarks/llama_cpp.py --folder SCRATCH --llama-python VENV/bin/python

The results go to benchmarks/results/llama_cpp.json and, as tables, to llama_cpp.md beside it.
llama-cpp-python is built from source in an environment of its own: see docs/beside-llama-cpp.md.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from llama_cpp_bandwidth import disk_bytes_per_s, memory_bytes_per_s
from llama_cpp_model import SHAPES, Shape, write_gguf
from llama_cpp_table import as_markdown
from memory_group import MemoryGroup, forget
from moerun.bench.report import hardware
from moerun.versions import run_packages

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "llama_cpp.json"
OVERHEAD_BYTES = 600 << 20  # of a limit: Python, torch, activations, keys and values


class Child:
    """An engine in a process of its own, in a memory group of its own where it is limited."""

    def __init__(self, name: str, command: list[str], case: dict[str, Any]) -> None:
        self.name, self.case = name, case
        self.runs: list[dict[str, Any]] = []
        limit_bytes = case["limit_bytes"]
        self.group = MemoryGroup(f"moe-{name}", limit_bytes) if limit_bytes else None
        case = case | {"group": str(self.group.path) if self.group else None}
        self._process = subprocess.Popen(
            [*command, json.dumps(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(case["threads"])},
        )
        if self.group:
            self.group.add(self._process.pid)
        self.loaded = self.ask("load")

    def run(self) -> None:
        self.runs.append(self.ask("run"))

    def ask(self, line: str) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            raise SystemExit(f"error: {self.name} ended with {code}: see above, or out of memory")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self.group:
            self.group.close()


def main(
    folder: Annotated[Path, typer.Option(help="Where the weights are written: on a real disk.")],
    llama_python: Annotated[
        str, typer.Option(help="Python that has llama-cpp-python; '-': without llama.cpp.")
    ] = sys.executable,
    shapes: Annotated[str, typer.Option(help="Models.")] = "mixtral-8x7b,qwen3-30b-a3b",
    memory: Annotated[str, typer.Option(help="all, half, or both.")] = "all,half",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens decoded after it.")] = 24,
    rounds: Annotated[int, typer.Option(help="Measured runs of each engine, in turns.")] = 5,
    half_rounds: Annotated[int, typer.Option(help="The same with half of the experts.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads that compute.")] = 2,
    policies: Annotated[str, typer.Option(help="Ours.")] = "lru,foresight-bypass",
    seed: Annotated[int, typer.Option(help="Of weights and tokens.")] = 0,
    out: Annotated[Path, typer.Option(help="Results; tables go beside it as .md.")] = RESULTS,
) -> None:
    """Run the comparison and write its results."""
    chosen = [SHAPES[name] for name in shapes.split(",")]
    for shape in chosen:
        prepare(folder, shape, seed)
    # Results are kept and read elsewhere, where these places are others.
    places = {str(folder): "SCRATCH", llama_python: "LLAMA/bin/python"}
    asked = [places.get(each, each) for each in sys.argv[1:]]
    found: dict[str, Any] = {
        "kind": "measured, random weights, synthetic popularity of experts",
        "command": " ".join(["python", "benchmarks/llama_cpp.py", *asked]),
        "hardware": hardware_of(threads),
        "memory_bytes_per_s": memory_bytes_per_s(threads),
        "disk_bytes_per_s": disk_bytes_per_s(next((folder / chosen[0].name).glob("*.gguf"))),
        "cases": [],
    }
    random = np.random.default_rng(seed)
    for shape in chosen:
        common = {
            "threads": threads,
            "context": 64 * -(-(prompt + tokens + 1) // 64),
            "prompt": random.integers(3, shape.vocabulary, prompt).tolist(),
            "tokens": random.integers(3, shape.vocabulary, tokens).tolist(),
        }
        for part in memory.split(","):
            n = rounds if part == "all" else half_rounds
            of_ours = policies.split(",")[: 1 if part == "all" else None]
            found["cases"].append(run_case(folder, shape, part, common, of_ours, llama_python, n))
    found["hardware"]["load_after"] = os.getloadavg()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    tables = as_markdown(found)
    out.with_suffix(".md").write_text(tables, encoding="utf-8")
    typer.echo(tables)


def prepare(folder: Path, shape: Shape, seed: int) -> None:
    """The model as GGUF, and packed from that; what is there already is left as it is."""
    gguf = folder / shape.name / "model.gguf"
    write_gguf(shape, gguf, seed)
    store = folder / shape.name / "store"
    if not (store / "index.json").is_file():
        typer.echo(f"packing {shape.name}", err=True)
        options = ["--precision", "q4_0", "--attention", "q4_0", "--out", str(store)]
        moerun = [sys.executable, "-c", "from moerun.cli import main; main()"]
        subprocess.run([*moerun, "pack", str(gguf), *options], check=True, stdout=sys.stderr)


def run_case(
    folder: Path,
    shape: Shape,
    part: str,
    common: dict[str, Any],
    policies: list[str],
    llama_python: str,
    rounds: int,
) -> dict[str, Any]:
    """All engines on one model with one amount of memory: a warm-up each, then rounds in turns."""
    place = folder / shape.name
    for path in place.rglob("*"):
        if path.is_file():
            forget(path)
    limit_bytes = None
    if part == "half":
        limit_bytes = shape.all_experts_bytes // 2 + shape.dense_bytes + OVERHEAD_BYTES
    common = common | {"limit_bytes": limit_bytes, "store": str(place / "store")}
    children: list[Child] = []
    try:
        for policy in policies:
            command = [sys.executable, str(HERE / "llama_cpp_ours.py")]
            children.append(Child(f"moerun {policy}", command, common | {"policy": policy}))
        if llama_python != "-":
            # Weights that are laid out anew for the processor's instructions are a copy in memory,
            # which half of it has no room for.
            theirs = {"model": str(place / "model.gguf"), "mmap": True, "flash": True}
            theirs |= {"repack": part == "all"}
            command = [llama_python, "-P", str(HERE / "llama_cpp_theirs.py")]
            children.append(Child("llama.cpp", command, common | theirs))
        for number in range(rounds + 1):
            for child in children:
                child.run()
                if number == 0:
                    child.runs.clear()
                    continue
                last = child.runs[-1]
                typer.echo(
                    f"{shape.name}, {part}, round {number}: {child.name} prompt "
                    f"{last['prompt_s']:.2f} s, token {1e3 * median(last['token_s']):.1f} ms",
                    err=True,
                )
        parts = children[0].ask("parts") if part == "all" else None
        return {
            "shape": shape.name,
            "memory": part,
            "limit_bytes": limit_bytes,
            "layers": shape.layers,
            "experts_bytes": shape.all_experts_bytes,
            "token_bytes": shape.token_bytes,
            "prompt_tokens": len(common["prompt"]),
            "tokens": len(common["tokens"]),
            "rounds": rounds,
            "load": os.getloadavg(),
            "engines": [summary(child, children[-1]) for child in children],
            "where_ours_goes": parts,
        }
    finally:
        for child in children:
            child.close()


def summary(child: Child, other: Child) -> dict[str, Any]:
    """Medians of a child's runs, with the spread of the rounds, and how alike the logits are."""
    prompts = [len(child.case["prompt"]) / run["prompt_s"] for run in child.runs]
    decodes = [len(run["token_s"]) / sum(run["token_s"]) for run in child.runs]
    mine, theirs = child.runs[-1], other.runs[-1]
    same = [a == b for a, b in zip(mine["best"], theirs["best"], strict=True)]
    return {
        "engine": child.name,
        "prompt_tokens_per_s": median(prompts),
        "prompt_spread": (max(prompts) - min(prompts)) / median(prompts),
        "decode_tokens_per_s": median(decodes),
        "decode_spread": (max(decodes) - min(decodes)) / median(decodes),
        "cpu_s": [median(run["cpu_s"][phase] for run in child.runs) for phase in range(2)],
        "hit_ratio": mine.get("hit_ratio"),
        "slots": mine.get("slots"),
        "stall_share": mine["stall_s"] / (mine["prompt_s"] + sum(mine["token_s"]))
        if "stall_s" in mine
        else None,
        "peak_bytes": child.group.peak_bytes() if child.group else None,
        "system": child.loaded.get("system"),
        "same_likeliest": sum(same) / len(same),
        "logits_correlation": float(np.corrcoef(mine["logits"], theirs["logits"])[0, 1]),
        "rounds": [{"prompt": p, "decode": d} for p, d in zip(prompts, decodes, strict=True)],
    }


def hardware_of(threads: int) -> dict[str, Any]:
    import torch

    found = hardware(torch.device("cpu")) | {"threads": threads, "load_before": os.getloadavg()}
    found |= {"date": time.strftime("%Y-%m-%d %H:%M"), "python": platform.python_version()}
    return found | {"packages": run_packages()}


if __name__ == "__main__":
    typer.run(main)
