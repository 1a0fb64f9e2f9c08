"""Every built-in policy on every machine profile asked for: the tables of docs/results.md.

    moetrace record README.md docs --tokens 16384 --out prose.trace.parquet
    moetrace record policies/moepolicy/*.py --tokens 16384 --out code.trace.parquet
    python benchmarks/policy_results.py tiny mixtral-like prose.trace.parquet code.trace.parquet \
        > docs/results.md

All numbers are simulated, and nothing in them is drawn: a second run gives the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numba
import numpy as np
from moepolicy import find_policy
from moepolicy.counts import MASSES
from moepolicy.library import BUILT_IN
from moeroute import open_trace
from moeroute.sizes import GivenSizes
from moesim import __version__
from moesim.comparison import Setting, run
from moesim.engines.compilations import Compilations
from moesim.machine.profile import Cpu, Machine, load_machine
from moesim.report import Compared
from moesim.sizes import quarters

ON_DISK = "cpu-disk"  # whose experts do not lie where a CPU worker could read them
MACHINES = ("t4", "rtx3060", "rtx4090", "a100", ON_DISK)
WITH_WORKER = "lru, with a CPU worker at hand"
# 80 % of what two channels of DDR4-3200 give one stream of reads.
WORKER = Cpu(workers=1, expert_s=50e-6, memory_bytes_per_s=41e9, flops_per_s=500e9)
# Mixtral-8x7B as the base paper runs it: 4-bit attention, experts of 4 bits or 2.
EXPERT_BYTES, LOW_BYTES = 93_671_424, 66_748_416
SIZES = GivenSizes(dense_layer_bytes=22_384_640, dense_token_bytes=262_160_384)

Rows = dict[tuple[str, int], dict[str, Any]]  # by policy and slots; what could not run is absent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="+")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    jobs = [(trace, machine) for trace in asked.traces for machine in MACHINES]
    with ProcessPoolExecutor(asked.processes) as pool:
        rows = list(pool.map(compared, *zip(*jobs, strict=True)))
    found = dict(zip(jobs, rows, strict=True))
    versions = f"moesim {__version__}, numba {numba.__version__}, numpy {np.__version__}"
    print(HEAD.format(versions=versions))
    for trace in asked.traces:
        print("\n".join(section(trace, [found[trace, machine] for machine in MACHINES])))


def compared(trace: str, machine: str) -> Rows:
    """Every built-in policy at a quarter, half and three quarters of the experts.

    Policies that compute on the CPU have a worker there, and lru beside them as `WITH_WORKER`.
    """
    alone = load_machine(machine)
    worked = [name for name in BUILT_IN if "cpu" in find_policy(name).requires]
    found = run_all(trace, alone, [name for name in BUILT_IN if name not in worked])
    if machine != ON_DISK:
        more = run_all(trace, replace(alone, cpu=WORKER), ["lru", *worked])
        found |= {
            (WITH_WORKER if policy == "lru" else policy, slots): row
            for (policy, slots), row in more.items()
        }
    return found


def run_all(trace: str, machine: Machine, policies: list[str]) -> Rows:
    """Those of ``policies`` that can run, at each size."""
    setting = Setting.of(
        trace,
        machine,
        expert_bytes=EXPERT_BYTES,
        low_expert_bytes=LOW_BYTES,
        given=SIZES,
    )
    specs = [find_policy(name) for name in policies]
    found = run(setting, specs, quarters(setting.meta.n_experts), compilations=Compilations())
    return {
        (row.result.policy, row.slots): row.row() for row in found.rows if isinstance(row, Compared)
    }


def section(trace: str, machines: list[Rows]) -> Iterator[str]:
    """The tables of one trace."""
    opened = open_trace(trace)
    meta = opened.meta
    yield f"## {trace}, of {opened.title}" if trace.endswith(".parquet") else f"## {opened.title}"
    yield ""
    yield (
        f"{meta.source} routing of {meta.n_layers} layers of {meta.n_experts} experts, "
        f"top-{meta.top_k}; SHA-256 {opened.digest[:16]}..."
    )
    for slots in quarters(meta.n_experts):
        yield ""
        yield f"### {slots} of {meta.n_experts} experts of a layer"
        yield ""
        yield line(["policy", "hit %", "late %", "GB/token", "changed %", *MACHINES])
        yield line(["---", *["--:"] * (4 + len(MACHINES))])
        for policy in BUILT_IN:
            yield policy_line(policy, [rows.get((policy, slots)) for rows in machines])
        for label, policy in (("*limit*", "lru"), ("*limit with the CPU*", WITH_WORKER)):
            cells = map(limit, (rows.get((policy, slots)) for rows in machines))
            yield line([label, "", "", "", "", *cells])
    yield ""


def policy_line(policy: str, rows: list[dict[str, Any] | None]) -> str:
    """A policy's row of a table: counts on the first machine that it ran on, speed on each."""
    ran = [row for row in rows if row is not None]
    name = f"`{policy}`" + (" \\*" if BUILT_IN[policy].lossy else "")
    if not ran:
        return line([name, *[""] * (4 + len(rows))])
    first = ran[0]
    changed = 100 * sum(first[share] for share in MASSES.values())
    tokens = first["tokens_per_s"] * (first["time_s"] or 1)
    cells = [
        f"{100 * first['hit_ratio']:.1f}",
        f"{100 * first['late'] / first['requests']:.1f}",
        f"{first['bytes_loaded'] / tokens / 1e9:.2f}",
        f"{changed:.1f}" if BUILT_IN[policy].lossy else "",
    ]
    return line([name, *cells, *map(speed, rows)])


def speed(row: dict[str, Any] | None) -> str:
    """Tokens/s and, in parentheses, the share of the gap from LRU to the limit; or a dash."""
    if row is None:
        return "-"
    gap = row["gap_closed_time"]
    return f"{row['tokens_per_s']:.2f}" + ("" if gap is None else f" ({100 * gap:.0f})")


def limit(row: dict[str, Any] | None) -> str:
    """The most tokens/s where a row was run; or a dash."""
    return "-" if row is None else f"{row['limit_tokens_per_s']:.2f}"


def line(cells: list[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


HEAD = """# Every built-in policy, simulated

Made by a command, and made anew by the same:

    moetrace record README.md docs --tokens 16384 --out prose.trace.parquet
    moetrace record policies/moepolicy/*.py --tokens 16384 --out code.trace.parquet
    python benchmarks/policy_results.py tiny mixtral-like prose.trace.parquet code.trace.parquet \\
        > docs/results.md

All numbers are **simulated** ({versions}; seeds: 0). The
routing is recorded (the bundled model on WikiText, on this repository's prose and on its code) or
synthetic (`mixtral-like`), as each section says. The bytes are Mixtral-8x7B's for every trace:
experts of 93.7 MB (4 bits), 66.7 MB at the lower precision (2 bits), 22.4 MB of other weights a
layer and 262 MB a token. Machines are the profiles of `moesim machines`. Policies that compute
misses on the CPU have one worker there that reads 41 GB/s (assumed), and a limit of their own. The
prose and the code are the repository's own as they stood when recorded: at another commit the same
commands record other traces, and the digests below tell.

- **hit, late, GB/token, changed**: on the first machine that the policy ran on (a prefetcher's
  depend on the machine). late: asked for while it was under way. changed: share of the gates'
  weight that was left out, computed at the lower precision, by another expert, or given to
  another expert by routing. On a recorded trace that is open-loop: the hidden states do not
  answer.
- **machines**: tokens/s of decoding and, in parentheses, the share of the gap from `lru` to the
  limit that the policy closes, in %: 0 is `lru`, 100 the limit, negative is slower than `lru`.
- **\\***: lossy: the policy changes what the model computes, and the limit does not bind it.
- **-**: the machine or the trace lacks what the policy needs (see [policies.md](policies.md)):
  `expertflow` needs token ids, which the synthetic trace has not; policies of the CPU need a
  worker.
- **limit**: the most tokens/s that any lossless policy could reach, knowing the future: without
  the CPU worker, and with it.
"""

if __name__ == "__main__":
    main()
