"""The tables of docs/research.md: what the policies that learn are worth, and what they are of.

    moetrace record wikitext.txt --tokens 131072 --out wiki.parquet
    moetrace record war_and_peace_held_out.txt --out prose.parquet
    moetrace record stdlib.txt --out code.parquet
    moetrace import gpt_oss_20b_64seq.npz --like gpt-oss-20b --out gpt-oss-20b.parquet
    moetrace import bigmoe_qwen.route.csv --out qwen3-30b.parquet
    python benchmarks/research.py wikitext=wiki.parquet prose=prose.parquet code=code.parquet \
        gpt-oss-20b=gpt-oss-20b.parquet qwen3-30b=qwen3-30b.parquet --out research/

Any of the traces of `STRETCHES` may be left out; `sample` is bundled, and the default. All numbers
are simulated or counted, and nothing is drawn: a second run gives the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from moepolicy import PolicyError, PolicySpec, find_policy
from moeroute import TraceError, open_trace
from moeroute.sizes import GivenSizes
from moesim import SimulationError, Workload, load_workload, simulate
from moesim.engines.compilations import Compilations
from moesim.machine.profile import load_machine
from moesim.sizes import quarters
from research_files import Row, write
from research_published import OURS, predicts, published, rivals
from research_threshold import FixedThreshold

BLOCKS = 4  # into which the test sequences are split, each learned from nothing: the error bars
GRID_TOKENS = 1024
MACHINES = ("t4", "rtx4090", "a100", "cpu-disk")
# Mixtral-8x7B's bytes, 4 bits, for the traces of the bundled model: see policy_results.py.
MIXTRAL_BYTES = 93_671_424
MIXTRAL = GivenSizes(dense_layer_bytes=22_384_640, dense_token_bytes=262_160_384)
TD = "foresight:pairs=0,habit=0,recent=0"  # the rule as this project first found it
ABLATIONS = {
    "foresight": "foresight",
    "without pairs": "foresight:pairs=0",
    "without the decayed count": "foresight:habit=0",
    "without recency": "foresight:recent=0",
    "without all three": TD,
    "own layer and 2 either side": "foresight:reach=2",
    "discount 0.8": "foresight:discount=0.8",
    "discount 0.93": "foresight:discount=0.93",
    "rate 0.0015": "foresight:rate=0.0015",
    "rate 0.006": "foresight:rate=0.006",
    "nothing learned": "foresight:rate=0",
}
LIMITS = ("belady-bypass", "clairvoyant")
THRESHOLDS = (0.2, 0.3, 0.5, 0.7, 0.9, 0.96)


@dataclass(frozen=True)
class Stretch:
    """Which sequences of a trace constants were chosen on, and which are scored.

    ``own_sizes``: times count with the sizes that the trace has, not with Mixtral's.
    """

    test: slice
    development: str
    own_sizes: bool = False
    path: str = ""


STRETCHES = {
    "sample": Stretch(slice(None), "all of it: thresholds, BUSY"),
    "wikitext": Stretch(slice(128, 144), "sequences 0-23 and 39"),
    "prose": Stretch(slice(0, 16), "none"),
    "code": Stretch(slice(96, 112), "sequences 0-23"),
    "gpt-oss-20b": Stretch(slice(32, 48), "sequences 0-14", own_sizes=True),
    "qwen3-30b": Stretch(slice(None), "all of it", own_sizes=True),
    "gemma-4-26b": Stretch(slice(None), "none", own_sizes=True),
    "gpt-oss-120b": Stretch(slice(None), "all of it", own_sizes=True),
}


def main() -> None:
    """Make the tables asked for, as Markdown and CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="*", help="NAME=FILE of " + ", ".join(STRETCHES))
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    given = dict(each.split("=", 1) for each in asked.traces) or {"sample": "tiny"}
    if unknown := given.keys() - STRETCHES:
        parser.error(f"no stretches are known of {', '.join(sorted(unknown))}")
    asked.out.mkdir(parents=True, exist_ok=True)
    # Forked, a process would wait for locks that polars' threads held.
    with ProcessPoolExecutor(asked.processes, get_context("spawn")) as pool:
        for name in asked.tables.split(","):
            began_s = time.monotonic()
            job, columns = TABLES[name]
            points = list(points_of(name, given))
            rows = []
            for found in pool.map(job, *zip(*points, strict=True)):
                rows += found
                print(f"{name}: {len(rows)} rows", file=sys.stderr)
            write(asked.out / name, rows, columns)
            print(f"{name}: took {time.monotonic() - began_s:.0f} s", file=sys.stderr)


def points_of(table: str, given: dict[str, str]) -> Iterator[tuple[Any, ...]]:
    """The arguments of a table's jobs."""
    for name, path in given.items():
        for slots in quarters(open_trace(path).meta.n_experts):
            if table in ("time", "thresholds", "shared"):
                yield from ((name, path, slots, machine) for machine in MACHINES)
            else:
                yield name, path, slots


@cache
def test_of(name: str, path: str) -> Workload:
    """The test sequences of a trace, with all that policies read, of the sizes that count."""
    trace = open_trace(path)
    found = load_workload(
        trace,
        logits=trace.has("router_logits"),
        predictions=trace.meta.horizon > 0,
        token_ids=trace.has("token_id"),
    )
    sequences = range(len(found.starts))[STRETCHES[name].test]
    found = found.only(sequences) if len(sequences) < len(found.starts) else found
    return found if STRETCHES[name].own_sizes else found.sized(MIXTRAL.on(found.meta))


def run(
    name: str,
    workload: Workload,
    policy: PolicySpec,
    slots: int,
    machine: str,
    scope: str = "layer",
) -> Any:
    """One simulation; None where the policy cannot run on the trace."""
    sizes = workload.meta.expert_bytes
    try:
        return simulate(
            workload,
            policy,
            load_machine(machine),
            slots=slots,
            scope=scope,
            expert_bytes=next(iter(sizes.values())) if own(name) and sizes else MIXTRAL_BYTES,
            limits=False,
            compilations=_COMPILATIONS,
        )
    except (PolicyError, SimulationError, TraceError) as error:
        print(f"{name}: {policy.label} did not run: {error}", file=sys.stderr)
        return None


_COMPILATIONS = Compilations(worth_compiling=0, prefix=512)


def own(name: str) -> bool:
    """Whether the sizes of the trace itself count."""
    return STRETCHES[name].own_sizes


def hits(name: str, workload: Workload, policy: str, slots: int) -> float:
    """The hit ratio of a policy that does not prefetch, on any machine."""
    found = run(name, workload, find_policy(policy), slots, "t4")
    return float("nan") if found is None else float(found.hits / found.requests)


def share(of: float, least: float, most: float) -> float:
    """The share of the gap from ``least`` to ``most``, in %."""
    return 100 * (of - least) / (most - least) if most > least else float("nan")


def told(values: list[float]) -> str:
    """Mean and standard error."""
    values = [value for value in values if np.isfinite(value)]
    if not values:
        return "-"
    error = f" ± {stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{error}"


def blocks(workload: Workload) -> list[Workload]:
    """The sequences in up to `BLOCKS` parts."""
    parts = np.array_split(np.arange(len(workload.starts)), min(BLOCKS, len(workload.starts)))
    return [workload.only(part.tolist()) for part in parts] if len(parts) > 1 else [workload]


def hit_table(name: str, path: str, slots: int) -> list[Row]:
    """Hit ratios of the test stretch, and shares of the gap by blocks and on its first tokens.

    The best published policy is run, or is that of the row of ``earlier``."""
    whole = test_of(name, path)
    rows = []
    lengths = [n for n in (64, 300) if n < whole.n_decoded]
    for tokens, parts in [*((n, [whole.head(n)]) for n in lengths), (None, blocks(whole))]:
        lru, kept, free = (
            [hits(name, part, policy, slots) for part in parts]
            for policy in ("lru", "belady", "belady-bypass")
        )
        scored = {p: [hits(name, part, p, slots) for part in parts] for p in (*OURS[:2], TD)}
        others = {p: mean(hits(name, part, p, slots) for part in parts) for p in rivals()}
        best = max(others, key=lambda policy: (others[policy], policy))
        bounds = list(zip(lru, kept, free, strict=True))
        gaps = {
            p: told([share(v, a, b) for v, (a, b, _) in zip(scored[p], bounds, strict=True)])
            for p in scored
        }
        passing = scored["foresight-bypass"]
        rows.append(
            {
                "trace": name,
                "slots": slots,
                "tokens": tokens or whole.n_decoded,
                "lru": 100 * mean(lru),
                "best published": 100 * others[best],
                "which": best,
                "foresight": 100 * mean(scored["foresight"]),
                "foresight-bypass": 100 * mean(passing),
                "belady": 100 * mean(kept),
                "belady-bypass": 100 * mean(free),
                "published gap %": share(others[best], mean(lru), mean(kept)),
                "TD gap %": gaps[TD],
                "foresight gap %": gaps["foresight"],
                "bypass gap %": gaps["foresight-bypass"],
                "bypass of bypass gap %": told(
                    [share(v, a, c) for v, (a, _, c) in zip(passing, bounds, strict=True)]
                ),
            }
        )
    return rows


def race(name: str, path: str, slots: int, machine: str, scope: str = "layer") -> dict[str, Any]:
    """The runs of all that is published, of ours, and of the limits, by policy."""
    whole = test_of(name, path)
    part = whole.head(min(GRID_TOKENS, whole.n_decoded))
    found = {}
    for policy in (*published(prefetching=True), *OURS, *LIMITS):
        if whole.predicted or not predicts(policy):
            ran = run(name, part, find_policy(policy), slots, machine, scope)
            if ran is not None and ran.tokens_per_s is not None:
                found[policy] = ran
    return found


def fetching(name: str, path: str) -> str:
    """Ours that fetches ahead: by predictions where there are some."""
    return "foresight-spec" if test_of(name, path).predicted else "foresight-ahead"


def time_table(name: str, path: str, slots: int, machine: str) -> list[Row]:
    """Tokens/s of ours, and of the best published policy with hindsight."""
    speeds = {p: ran.tokens_per_s for p, ran in race(name, path, slots, machine).items()}
    online = {p: v for p, v in speeds.items() if p not in LIMITS}
    others = {p: v for p, v in online.items() if p not in OURS}
    best = max(others, key=lambda policy: (others[policy], policy))
    chosen = fetching(name, path)
    return [
        {
            "trace": name,
            "slots": slots,
            "machine": machine,
            "lru": speeds["lru"],
            "best published": others[best],
            "which": best,
            **{policy: speeds.get(policy) for policy in OURS},
            "clairvoyant": speeds.get("clairvoyant"),
            "ours over published %": 100 * (speeds[chosen] / others[best] - 1),
            "fetching over bypass %": 100 * (speeds[chosen] / speeds["foresight-bypass"] - 1),
            "fastest": max(online, key=lambda policy: online[policy]),
        }
    ]


def shared_table(name: str, path: str, slots: int, machine: str) -> list[Row]:
    """One cache for all layers beside a cache for each, with as many experts: the best published
    policy of either with hindsight, ours of each, and the hits of foresight-bypass."""
    own, shared = (race(name, path, slots, machine, scope) for scope in ("layer", "global"))
    others = {
        policy + said: ran[policy].tokens_per_s
        for ran, said in ((own, ""), (shared, ", shared"))
        for policy in ran.keys() - {*OURS, *LIMITS}
    }
    best = max(others, key=lambda policy: (others[policy], policy))
    chosen = fetching(name, path)
    of_own, of_shared = own[chosen].tokens_per_s, shared[chosen].tokens_per_s
    return [
        {
            "trace": name,
            "slots": slots,
            "machine": machine,
            "lru": own["lru"].tokens_per_s,
            "lru, shared": shared["lru"].tokens_per_s,
            "best published": others[best],
            "which": best,
            "ours": of_own,
            "ours, shared": of_shared,
            "clairvoyant, shared": shared["clairvoyant"].tokens_per_s,
            "shared over own %": 100 * (of_shared / of_own - 1),
            "shared over published %": 100 * (of_shared / others[best] - 1),
            "bypass hit %": 100 * own["foresight-bypass"].hit_ratio,
            "bypass hit %, shared": 100 * shared["foresight-bypass"].hit_ratio,
        }
    ]


def threshold_table(name: str, path: str, slots: int, machine: str) -> list[Row]:
    """foresight-spec beside fixed chances from which on a guess is fetched."""
    whole = test_of(name, path)
    if not whole.predicted:
        return []
    part = whole.head(min(GRID_TOKENS, whole.n_decoded))
    fixed = {
        p: run(name, part, PolicySpec("fixed", FixedThreshold, {"p": p}), slots, machine)
        for p in THRESHOLDS
    }
    speeds = {p: found.tokens_per_s for p, found in fixed.items()}
    ours = run(name, part, find_policy("foresight-spec"), slots, machine).tokens_per_s
    best = max(speeds, key=lambda p: speeds[p])
    return [
        {
            "trace": name,
            "slots": slots,
            "machine": machine,
            **{f"p {p}": speed for p, speed in speeds.items()},
            "foresight-spec": ours,
            "best p": best,
            "over best p %": 100 * (ours / speeds[best] - 1),
        }
    ]


def ablation_table(name: str, path: str, slots: int) -> list[Row]:
    """Shares of the gap from LRU to Belady with parts left out or constants changed."""
    part = test_of(name, path)
    part = part.head(min(8 * GRID_TOKENS, part.n_decoded))
    lru, belady = (hits(name, part, policy, slots) for policy in ("lru", "belady"))
    found = {said: hits(name, part, policy, slots) for said, policy in ABLATIONS.items()}
    gaps = {said: share(value, lru, belady) for said, value in found.items()}
    return [{"trace": name, "slots": slots, **gaps}]


TABLES: dict[str, tuple[Any, int]] = {
    "hits": (hit_table, 1),
    "ablations": (ablation_table, 1),
    "thresholds": (threshold_table, 2),
    "time": (time_table, 2),
    "shared": (shared_table, 2),
}

if __name__ == "__main__":
    main()
