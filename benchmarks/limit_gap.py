"""How near the clairvoyant schedule comes to the least time, beside demand loading.

    python benchmarks/limit_gap.py --trace mixtral-like --expert-bytes 88000000 --gbps 6,12,25,50

Prints, for every scope, number of slots and link, each policy's time over the limit, and at the
end the worst and the median. Everything is simulated, on a machine profile with another link.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

from moepolicy import find_policy
from moeroute import open_trace
from moesim import load_machine, load_workload, simulate
from moesim.limits import min_time_ns
from moesim.sizes import expert_size, quarters, sizes_of

POLICIES = ("clairvoyant", "clairvoyant:margin=0", "belady-bypass", "belady", "lru")


def main() -> None:
    asked = _arguments()
    trace = open_trace(asked.trace)
    workload = load_workload(trace)
    if asked.tokens:
        workload = workload.head(asked.tokens)
    size = expert_size(trace.meta, precision=None, expert_bytes=asked.expert_bytes)
    if size is None:
        raise SystemExit(f"{asked.trace} does not say how big an expert is: give --expert-bytes")
    sizes = sizes_of(trace.meta, size)
    profile = load_machine(asked.machine)
    # What a policy foresees without speculative gates must not be charged for them.
    profile = replace(profile, compute=replace(profile.compute, prefetch_s=0.0))
    slots_asked = asked.slots or quarters(trace.meta.n_experts)
    ratios: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    print(f"{trace.title}, {workload.n_steps:,} steps, experts of {size:,} bytes, {profile.name}")
    print("scope  slots  GB/s  limit s ", *POLICIES, sep="  ")
    for scope in ("layer", "global"):
        for slots in slots_asked:
            for gbps in asked.gbps:
                machine = replace(profile, link=replace(profile.link, bytes_per_s=gbps * 1e9))
                limit_s = min_time_ns(workload, machine, sizes, slots, scope) / 1e9
                row = []
                for policy in POLICIES:
                    result = simulate(
                        workload,
                        find_policy(policy),
                        machine,
                        slots=slots,
                        scope=scope,
                        expert_bytes=size,
                    )
                    assert result.time_s is not None
                    ratios[policy].append(result.time_s / limit_s)
                    row.append(f"{result.time_s / limit_s:{len(policy)}.3f}")
                print(f"{scope:6} {slots:5}  {gbps:4g}  {limit_s:8.2f}", *row, sep="  ", flush=True)
    for policy, found in ratios.items():
        print(f"{policy}: median {median(found):.3f}, from {min(found):.3f} to {max(found):.3f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", default="mixtral-like")
    parser.add_argument("--tokens", type=int, help="only the trace's first tokens")
    parser.add_argument("--expert-bytes", type=int)
    parser.add_argument("--machine", default="rtx3060")
    parser.add_argument("--slots", type=_numbers(int))
    parser.add_argument("--gbps", type=_numbers(float), default=[6.0, 12.0, 25.0, 50.0])
    return parser.parse_args()


def _numbers(kind: type) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
