"""Our compiled replay against libCacheSim's C caches, on the same traces of single keys.

    pip install libcachesim==0.3.5 --no-deps
    python benchmarks/libcachesim.py [--out benchmarks/results/libcachesim.json]

A speed is only compared where both count the same misses. Both sides are timed in CPU seconds in
interleaved rounds: ours with everything from the policy's making to its counters, theirs with
`process_trace` alone, over a memory-mapped file in their own binary format. libCacheSim lives in
a process of its own, since it aborts or hangs on some small caches; that is reported where it
happens.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

# Our policy by theirs. Their LFU forgets the uses of what it evicts: it is not `lfu`.
POLICIES = {
    "LRU": "lru",
    "LFU": "lfu-aging:aging=0",
    "ARC": "arc",
    "Sieve": "sieve",
    "FIFO": "fifo",
    "Clock": "clock",
    "Belady": "belady",
}
PLUGIN = "LRU, Python hooks"
SIZES = {8: (2, 4), 64: (16,), 256: (64,)}  # slots by keys
SEED = 0
PATIENCE_S = 60


def zipf(n: int, n_keys: int, seed: int) -> NDArray[np.int64]:
    """``n`` independent draws, the i-th likeliest key with weight 1 / i^0.8."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, n_keys + 1) ** -0.8
    return rng.choice(n_keys, size=n, p=weights / weights.sum())


def shifting(n: int, n_keys: int, seed: int) -> NDArray[np.int64]:
    """Loops over some of the keys, and skewed draws whose favourites change each time."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, n_keys + 1)
    parts, total = [], 0
    while total < n:
        if rng.random() < 0.5:
            loop = (rng.integers(n_keys) + np.arange(rng.integers(2, n_keys + 1))) % n_keys
            part = np.tile(loop, rng.integers(1, 4))
        else:
            part = rng.permutation(n_keys)[rng.choice(n_keys, 60, p=weights / weights.sum())]
        parts.append(part)
        total += len(part)
    return np.concatenate(parts)[:n]


TRACES: dict[str, Callable[[int, int, int], NDArray[np.int64]]] = {
    "zipf": zipf,
    "shifting": shifting,
}


@dataclass
class Cell:
    """One cache on one trace: misses and CPU seconds of both sides."""

    policy: str
    trace: str
    keys: int
    slots: int
    requests: int
    our_misses: int = -1
    their_misses: int = -1
    failure: str = ""
    our_s: list[float] = field(default_factory=list)
    their_s: list[float] = field(default_factory=list)

    @property
    def comparable(self) -> bool:
        return not self.failure and self.our_misses == self.their_misses

    def ratio(self) -> float:
        """How many times as fast ours is."""
        return statistics.median(self.their_s) / statistics.median(self.our_s)

    def row(self) -> dict[str, Any]:
        kept = asdict(self)
        if self.comparable:
            kept["ratio"] = self.ratio()
        return kept


def workload_of(keys: NDArray[np.int64], n_keys: int) -> Any:
    """One layer, top-1: a step a key."""
    from moeroute.schema import TraceMeta
    from moesim import Workload

    n = len(keys)
    ones = np.ones(n, np.int32)
    return Workload(
        meta=TraceMeta(
            source="synthetic",
            model="keys",
            n_layers=1,
            n_experts=n_keys,
            top_k=1,
            expert_bytes={"fp16": 1},
        ),
        title="keys",
        digest="",
        keys=keys.astype(np.int32),
        weights=ones.astype(np.float32),
        routed=ones,
        offsets=np.arange(n + 1),
        layer=np.zeros(n, np.int32),
        tokens=ones,
        decode=np.ones(n, np.bool_),
        rows=np.stack([np.arange(n), np.arange(n) + 1], axis=1),
        row_layer=np.zeros(n, np.int32),
        logits=None,
        predicted=(),
    )


def write_trace(path: Path, workload: Any) -> None:
    """The keys in libCacheSim's oracleGeneral format, whose requests count from 1."""
    record = [("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")]
    rows = np.zeros(workload.n_steps, record)
    rows["id"] = workload.keys.astype(np.int64) + 1
    rows["size"] = 1
    never = workload.next_use >= workload.n_steps
    rows["next"] = np.where(never, -1, workload.next_use + 1)
    rows.tofile(path)


class TheirProcess:
    """libCacheSim in a process of its own, made again when it dies."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, path: Path, cell: Cell) -> tuple[int, float]:
        """Misses and CPU seconds of one run. RuntimeError says how it died."""
        if self.process is None:
            # -P: this file's own folder must not hide the package of the same name.
            self.process = subprocess.Popen(
                [sys.executable, "-P", __file__, "--serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = threading.Timer(PATIENCE_S, process.kill)
        watchdog.start()
        try:
            process.stdin.write(f"{json.dumps([cell.policy, str(path), cell.slots])}\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            while answer and not answer.startswith("{"):  # it prints remarks of its own
                answer = process.stdout.readline()
        finally:
            watchdog.cancel()
        if not answer:
            self.process = None
            code = process.wait()
            how = f"no end in {PATIENCE_S} s" if code == -9 else f"it died with status {code}"
            raise RuntimeError(how)
        told = json.loads(answer)
        return round(told["miss_ratio"] * cell.requests), told["cpu_s"]

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def serve() -> None:
    """The other process: run each line [cache, trace, slots], print its miss ratio and time."""
    libcachesim = importlib.import_module("libcachesim")  # by name: this file is called the same
    for line in sys.stdin:
        name, path, slots = json.loads(line)
        reader = libcachesim.TraceReader(
            trace=path,
            trace_type=libcachesim.TraceType.ORACLE_GENERAL_TRACE,
            reader_init_params=libcachesim.ReaderInitParam(ignore_obj_size=True),
        )
        # Few objects: a small hash table is the quickest.
        options = {"cache_size": slots, "hashpower": 12}
        if name == PLUGIN:
            cache = libcachesim.PluginCache(**options, **lru_hooks())
        else:
            cache = getattr(libcachesim, name)(**options)
        began = time.process_time()
        ratio, _ = cache.process_trace(reader)
        cpu_s = time.process_time() - began
        print(json.dumps({"miss_ratio": ratio, "cpu_s": cpu_s}), flush=True)


def lru_hooks() -> dict[str, Callable[..., Any]]:
    """LRU as a plug-in of theirs in Python."""
    return {
        "cache_init_hook": lambda _: OrderedDict(),
        "cache_hit_hook": lambda used, request: used.move_to_end(request.obj_id),
        "cache_miss_hook": lambda used, request: used.__setitem__(request.obj_id, None),
        "cache_eviction_hook": lambda used, _: used.popitem(last=False)[0],
        "cache_remove_hook": lambda used, key: used.pop(key, None),
        "cache_free_hook": lambda used: used.clear(),
    }


def our_run(workload: Any, cell: Cell) -> tuple[int, float]:
    """Misses and CPU seconds of one compiled run, its policy's making included."""
    from moepolicy import Kind, find_policy
    from moesim.engines.timeless import decisions

    spec = find_policy(POLICIES.get(cell.policy, "lru"))
    context = workload.context(cell.slots, "layer")
    began = time.process_time()
    cache = decisions(workload, spec, context)
    return int(cache.counters[Kind.MISS]), time.process_time() - began


def measure(cells: list[Cell], folder: Path, rounds: int) -> None:
    """Fill the cells in, all of them in each round; the first compiles and is not counted."""
    made: dict[tuple[str, int, int], tuple[Any, Path]] = {}
    for cell in cells:
        key = (cell.trace, cell.keys, cell.requests)
        if key not in made:
            workload = workload_of(TRACES[cell.trace](cell.requests, cell.keys, SEED), cell.keys)
            path = folder / "-".join(map(str, key))
            write_trace(path, workload)
            made[key] = workload, path
    theirs = TheirProcess()
    try:
        for turn in range(rounds + 1):
            print(f"round {turn} of {rounds}", file=sys.stderr)
            for cell in cells:
                workload, path = made[cell.trace, cell.keys, cell.requests]
                cell.our_misses, our_s = our_run(workload, cell)
                if cell.failure:
                    continue
                try:
                    cell.their_misses, their_s = theirs.run(path, cell)
                except (RuntimeError, OSError) as error:
                    cell.failure = str(error)
                    continue
                if turn:
                    cell.our_s.append(our_s)
                    cell.their_s.append(their_s)
    finally:
        theirs.close()


def print_table(cells: list[Cell]) -> None:
    def rate(cell: Cell, seconds: list[float]) -> str:
        spread = max(seconds) / min(seconds)
        return f"{cell.requests / statistics.median(seconds) / 1e6:8.2f} (x{spread:.2f})"

    print(f"{'cache':19}{'trace':10}{'keys':>5}{'slots':>6}{'misses':>9}", end="")
    print(f"{'ours M/s':>16}{'theirs M/s':>17}{'ratio':>8}")
    for cell in cells:
        where = f"{cell.policy:19}{cell.trace:10}{cell.keys:5}{cell.slots:6}{cell.our_misses:9}"
        if cell.failure:
            print(f"{where}  libCacheSim: {cell.failure}")
        elif not cell.comparable:
            print(f"{where}  not compared: libCacheSim counts {cell.their_misses}")
        else:
            rates = f"{rate(cell, cell.our_s):>17}{rate(cell, cell.their_s):>17}"
            print(f"{where}{rates}{cell.ratio():8.2f}")


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    requests: Annotated[int, typer.Option(help="Length of each trace.")] = 1_000_000,
    serves: Annotated[bool, typer.Option("--serve", hidden=True)] = False,
) -> None:
    """Measure, print, and write the results with what produced them."""
    if serves:
        serve()
        return
    cells = [
        Cell(policy, trace, n_keys, slots, requests)
        for n_keys, sizes in SIZES.items()
        for slots in sizes
        for trace in TRACES
        for policy in POLICIES
    ]
    cells += [
        Cell(PLUGIN, trace, n_keys, sizes[-1], requests // 10)
        for n_keys, sizes in SIZES.items()
        for trace in TRACES
    ]
    with tempfile.TemporaryDirectory() as folder:
        measure(cells, Path(folder), rounds)
    print_table(cells)
    if out is not None:
        from hardware import hardware  # not beside the import of the child, which has no such path

        about = {
            "libcachesim": importlib.metadata.version("libcachesim"),
            "hardware": hardware(),
            "seed": SEED,
            "rounds": rounds,
            "cells": [cell.row() for cell in cells],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
