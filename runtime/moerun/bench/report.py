"""What a bench found: a row a policy, and what it was found with."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from moepolicy.amounts import cache_of, counted
from moepolicy.lossy import CHANGES, OPEN_LOOP, changed, marked
from moepolicy.outputs import Output
from moepolicy.refusals import refusal_notes, with_refused
from moepolicy.tables import Table, wrapped

from moerun.bench.run import RELEASED, Bench, Timed
from moerun.versions import run_packages

if TYPE_CHECKING:
    import torch

    from moerun.live.totals import Totals

RELEASED_LABEL = f"{RELEASED} (model of mixtral-offloading)"


@dataclass(frozen=True)
class Row:
    """One policy. Medians over the rounds; spread is (largest - smallest) / median.

    cpu_ratio          of the experts wanted, those computed on the CPU
    *_share            of the gates' weight, what was left out, computed by another expert or at
                       the lower precision, or routed elsewhere; all 0 but for ``lossy`` policies
    compute_s_per_token  of the device alone, with every expert there; without those that the policy
                       has computed elsewhere or nowhere
    bound_s_per_token  max(bytes / link rate, compute): no engine that moves these bytes is faster
    over_bound         how far the run is from that: 0.05 is 5 % slower
    simulated_tokens_per_s  moesim's prediction, where a machine profile was given
    """

    policy: str
    lossy: bool
    tokens_per_s: float
    spread: float
    hit_ratio: float
    late_ratio: float
    miss_ratio: float
    cpu_ratio: float
    skipped_share: float
    substituted_share: float
    low_share: float
    rerouted_share: float
    useless_prefetches: int
    gb_per_token: float
    link_gb_per_s: float
    compute_s_per_token: float
    link_s_per_token: float | None
    bound_s_per_token: float
    over_bound: float
    simulated_tokens_per_s: float | None
    rounds: tuple[float, ...]
    """tokens/s of each round."""

    @property
    def shares(self) -> dict[str, float]:
        """What the policy changed, by the names of the columns."""
        return {name: getattr(self, name) for name in CHANGES}


def rows_of(bench: Bench, simulated: dict[str, float]) -> list[Row]:
    """Rows of the report, one a policy; ``simulated`` has moesim's tokens/s of some of them."""
    lossy = {policy.label for policy in bench.schedule.policies if policy.policy.lossy}
    return [
        _row(name, name in lossy, runs, bench, simulated.get(name))
        for name, runs in bench.results.runs.items()
    ]


def _row(name: str, lossy: bool, runs: list[Timed], bench: Bench, simulated: float | None) -> Row:
    tokens = bench.schedule.tokens
    middle = sorted(runs, key=lambda run: run.decode_s)[len(runs) // 2]
    totals = middle.totals
    rates = tuple(tokens / run.decode_s for run in runs)
    token_s = 1 / median(rates)
    moved = median(run.bytes_moved for run in runs) / tokens
    link_s = moved / median(bench.results.link_rates) if bench.link_has_one_rate else None
    compute_s = _compute_s(bench, totals) / tokens
    bound_s = max(link_s or 0.0, compute_s)
    return Row(
        policy=RELEASED_LABEL if name == RELEASED else name,
        lossy=lossy,
        tokens_per_s=median(rates),
        spread=(max(rates) - min(rates)) / median(rates),
        hit_ratio=totals.hit_ratio,
        late_ratio=totals.late_ratio,
        miss_ratio=totals.miss_ratio,
        cpu_ratio=totals.cpu_ratio,
        **totals.shares,
        useless_prefetches=totals.useless_prefetches,
        gb_per_token=moved / 1e9,
        link_gb_per_s=moved / token_s / 1e9,
        compute_s_per_token=compute_s,
        link_s_per_token=link_s,
        bound_s_per_token=bound_s,
        over_bound=token_s / bound_s - 1,
        simulated_tokens_per_s=simulated,
        rounds=rates,
    )


def _compute_s(bench: Bench, totals: Totals) -> float:
    """The device's own compute of the measured tokens: of the experts, those it computed."""
    all_s = median(run.decode_s for run in bench.results.compute)
    spared = totals.ratio(totals.cpu_experts + totals.skipped)
    if not spared:
        return all_s
    rest_s = min(median(run.decode_s for run in bench.results.without_experts), all_s)
    return all_s - spared * (all_s - rest_s)


def provenance(bench: Bench) -> dict[str, Any]:
    """Options, versions and hardware that produced the rows."""
    index, settings, schedule = bench.generated.index, bench.settings, bench.schedule
    compute_s = median(run.decode_s for run in bench.results.compute)
    return {
        "kind": "measured, random weights, forced routing",
        "shape": index.model,
        "layers": index.n_layers,
        "experts": index.n_experts,
        "top_k": index.top_k,
        "precision": index.precision,
        "expert_bytes": bench.store.record_bytes,
        "attention": index.attention_precision,
        "low": bench.low.index.precision if bench.low else None,
        "slots": bench.slots,
        "scope": settings.scope,
        "device": str(settings.device),
        "experts_in": "memory" if bench.on_disk is None else "files",
        "cold": settings.cold,
        "streams": settings.streams,
        "chunk_bytes": settings.chunk_bytes,
        "host_bytes": settings.host_bytes,
        "memory": bench.memory.to_json(),
        "memory_peak_bytes": bench.peak_bytes,
        "compute_alone_s_per_token": compute_s / schedule.tokens,
        "link_cap_bytes_per_s": settings.link_bytes_per_s,
        "link_bytes_per_s": median(bench.results.link_rates) if bench.link_has_one_rate else None,
        "tokens": schedule.tokens,
        "warm_up": schedule.warm_up,
        "rounds": schedule.rounds,
        "routing": bench.routing.source,
        "routing_sha256": bench.routing.sha256,
        "seed": bench.generated.seed,
        "hardware": hardware(settings.device),
        "refused": dict(bench.results.refused),
        "python": platform.python_version(),
        "packages": run_packages(),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """Names of the processor and the GPU, and the number of threads."""
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": gpu.name,
            "gpu_memory_gb": round(gpu.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def deliver(to: Output, rows: list[Row], made_by: dict[str, Any]) -> None:
    """Print or write the report; ``made_by`` has the options and versions of the measurement."""
    plain = with_refused([asdict(row) for row in rows], made_by["refused"])
    to.deliver(plain, lambda: table_of(rows, made_by), {"rows": plain, **made_by})


def table_of(rows: list[Row], made_by: dict[str, Any]) -> str:
    """The report for people: a line for each policy, and what its columns and marks mean."""
    names = ["tok/s", "spread", "hit | late | miss %", "GB/token", "GB/s", "bound ms", "over"]
    simulated = any(row.simulated_tokens_per_s is not None for row in rows)
    table = Table(["policy"], [*names, *["sim tok/s"] * simulated])
    for row in rows:
        shares = (row.hit_ratio, row.late_ratio, row.miss_ratio)
        cells = [
            marked(row.policy.partition(" (")[0], row.lossy),
            f"{row.tokens_per_s:.2f}",
            f"{100 * row.spread:.0f} %",
            " | ".join(f"{100 * share:.1f}" for share in shares),
            f"{row.gb_per_token:.4f}",
            f"{row.link_gb_per_s:.2f}",
            f"{1e3 * row.bound_s_per_token:.2f}",
            f"{100 * row.over_bound:+.0f} %",
        ]
        if simulated:
            rate = row.simulated_tokens_per_s
            cells.append("" if rate is None else f"{rate:.2f}")
        table.add_row(*cells)
    for name in made_by["refused"]:
        table.add_row(name, *[""] * (len(table.headings) - 1))
    return table.render() + wrapped(_legend(rows, made_by))


def _bound(link_bytes_per_s: float | None, compute_ms: float) -> str:
    compute = f"compute alone {compute_ms:.2f} ms a token"
    if link_bytes_per_s is None:
        return (
            f"{compute}, which alone is the bound: experts come partly from host memory and "
            "partly from disk, so the link has no single rate"
        )
    return f"link {link_bytes_per_s / 1e9:.2f} GB/s, {compute}; bound = max(bytes / link, compute)"


def _legend(rows: list[Row], made_by: dict[str, Any]) -> list[str]:
    machine = made_by["hardware"]
    lines = [
        f"{made_by['shape']}, {counted(made_by['layers'], 'layer')}, "
        f"{made_by['attention']} attention, "
        f"{made_by['precision']} experts of "
        f"{made_by['expert_bytes'] / 1e6:,.3g} MB (random weights) in {made_by['experts_in']}; "
        f"{counted(made_by['slots'], 'slot')} a layer, {cache_of(made_by['scope'])}, "
        f"on {made_by['device']}",
        f"routing forced: {made_by['routing']} (sha256 {made_by['routing_sha256'][:12]}), "
        f"{made_by['tokens']} tokens after {made_by['warm_up']} of warm-up, "
        f"{counted(made_by['rounds'], 'round')} in turns, medians",
        _bound(made_by["link_bytes_per_s"], 1e3 * made_by["compute_alone_s_per_token"]),
        f"{machine.get('gpu') or machine['cpu']}, {counted(machine['threads'], 'thread')}",
    ]
    lines += [_answers(row) for row in rows if row.lossy or row.cpu_ratio]
    lines += [f"{row.policy}: {OPEN_LOOP}" for row in rows if row.rerouted_share]
    lines += refusal_notes(made_by["refused"])
    if any(row.policy == RELEASED_LABEL for row in rows):
        lines.append(
            f"{RELEASED}: this project's model of the released mixtral-offloading engine (serial "
            "copies, evicted experts written back, no speculation), not that engine's code"
        )
    return lines


def _answers(row: Row) -> str:
    """What a policy made of misses besides loading them."""
    found = []
    if row.cpu_ratio:
        found.append(f"{100 * row.cpu_ratio:.1f} % of the experts computed on the CPU")
    if row.lossy:
        found.append(f"changes what the model computes: {changed(row.shares)}")
    return f"{marked(row.policy, row.lossy)}: {'; '.join(found)}"
