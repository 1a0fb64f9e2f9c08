"""What a live run reports: one row, as a table for people or as JSON and CSV for programs."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moepolicy.amounts import cache_of, counted
from moepolicy.counts import CountColumns, as_row
from moepolicy.lossy import changed
from moepolicy.tables import Format, described, to_csv, to_json

from moerun.versions import run_packages

if TYPE_CHECKING:
    from moerun.live.runner import Runner
    from moerun.live.sampling import Sampling
    from moerun.live.work import Work


@dataclass(frozen=True, kw_only=True)
class _ReportOf:
    """What a report is of: the first columns of its row."""

    policy: str
    slots: int
    scope: str
    model: str
    precision: str
    attention: str
    device: str
    streams: int
    link_bytes_per_s: float | None
    prompt_tokens: int
    new_tokens: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Report(CountColumns, _ReportOf):
    """One live run; times are measured seconds, counts are of experts
    (see `CountColumns`).

    decide_s           that the policy took, with the state machine that asks it
    tokens_per_s       of decoding: tokens after the first over the time they took
    policy_failure     what the policy failed of, where LRU went on without it
    """

    bytes_loaded: int
    time_s: float
    stall_s: float
    decide_s: float
    tokens_per_s: float
    prompt_tokens_per_s: float
    disk_reads: int | None  # of loads, where host memory holds some experts and the disk all
    arena_bytes: int
    memory_budget_bytes: int | None
    memory_planned_bytes: int
    memory_peak_bytes: int
    peak_host_bytes: int
    peak_device_bytes: int | None
    lossy: bool
    interrupted: bool
    policy_failure: str | None


def report_of(runner: Runner, generated: Work, *, interrupted: bool = False) -> Report:
    """The report on a run that generated with ``runner``."""
    from moerun.devices import peak_device_bytes, peak_host_bytes

    settings, totals = runner.settings, generated.totals
    failure = runner.session.policy_failure
    return Report(
        policy=settings.policy.label,
        slots=runner.context.slots,
        scope=settings.scope,
        model=runner.store.index.model,
        precision=runner.store.index.precision,
        attention=runner.store.index.attention_precision,
        device=str(settings.device),
        streams=settings.streams,
        link_bytes_per_s=settings.link_bytes_per_s,
        prompt_tokens=generated.prompt_tokens,
        new_tokens=generated.new_tokens,
        steps=totals.steps,
        **totals.counted(),
        bytes_loaded=totals.bytes_loaded,
        stall_s=round(totals.stall_s, 6),
        decide_s=round(totals.decide_s, 6),
        time_s=round(generated.prompt_s + generated.decode_s, 6),
        tokens_per_s=round(generated.tokens_per_s, 3),
        prompt_tokens_per_s=round(generated.prompt_tokens_per_s, 3),
        disk_reads=None if runner.host_tier is None else runner.host_tier.reads,
        arena_bytes=runner.arena_bytes,
        memory_budget_bytes=runner.plan.budget_bytes,
        memory_planned_bytes=runner.plan.total_bytes,
        memory_peak_bytes=runner.peak_bytes,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(settings.device),
        lossy=settings.policy.policy.lossy,
        interrupted=interrupted,
        policy_failure=None if failure is None else str(failure),
    )


def provenance(sampling: Sampling) -> dict[str, Any]:
    """Versions and options of a run that its row does not have."""
    return {
        "kind": "measured",
        "sampling": asdict(sampling),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "packages": run_packages(),
    }


def in_a_line(work: Work) -> str:
    """How a run is going, short enough for a line."""
    totals = work.totals
    if not work.new_tokens:
        return f"reading the prompt: {totals.steps:,} layers of it"
    parts = [f"{work.new_tokens:,} tokens", f"{work.tokens_per_s:.2f} tokens/s"]
    if totals.requests:
        parts.append(f"{_share(totals.hits, totals.requests)} hits")
    parts.append(f"{totals.loads:,} loads")
    return ", ".join([*parts, f"{totals.stall_s:.1f} s stalled"])


def render(report: Report, format: Format, text: str, made_by: dict[str, Any]) -> str:
    """The row in one format. JSON and CSV carry the text; a table comes after it."""
    if format is Format.table:
        return _table(report)
    row = as_row(report)
    if format is Format.json:
        return to_json({**row, "text": text, **made_by})
    return to_csv([{**row, "text": text}])


def _table(report: Report) -> str:
    """Lines for people; what a run broken off early has no value of is left out."""
    lossy = "  (changes what the model computes)" if report.lossy else ""
    slots = f"{counted(report.slots, 'slot')} a layer"
    cache = f"{slots}, {cache_of(report.scope)}, on {report.device}"
    lines = {
        "policy": f"{report.policy}{lossy}: {cache}",
        "failed": f"{report.policy_failure}: LRU went on" if report.policy_failure else "",
        "speed": _speed(report),
        **(_experts(report) if report.requests else {}),
        "memory": _memory(report),
        "tokens": f"{report.prompt_tokens:,} prompt, {report.new_tokens:,} new"
        + (" (interrupted)" if report.interrupted else ""),
    }
    return described({f"{name:8}": line for name, line in lines.items() if line})


def _speed(report: Report) -> str:
    speeds = {"decoding": report.tokens_per_s, "reading the prompt": report.prompt_tokens_per_s}
    known = [f"{speed:.2f} {doing}" for doing, speed in speeds.items() if speed]
    return ", ".join(known).replace(" ", " tokens/s ", 1)


def _experts(report: Report) -> dict[str, str]:
    from moerun.amounts import format_bytes

    useless = f", {report.useless_prefetches:,} useless" if report.prefetches else ""
    on_cpu = f"; {report.cpu_experts:,} computed on the CPU" if report.cpu_experts else ""
    # Of a prompt that was broken off the stall is known and the time is not.
    of_time = f" of {report.time_s:.2f} s" if report.time_s else ""
    return {
        "experts": f"{report.requests:,} wanted: {_share(report.hits, report.requests)} hits, "
        f"{_share(report.late, report.requests)} late, "
        f"{_share(report.misses, report.requests)} misses",
        "loads": f"{report.loads:,} ({format_bytes(report.bytes_loaded)}), of which "
        f"{report.prefetches:,} prefetches{useless}; {report.bypasses:,} bypasses{on_cpu}"
        + ("" if report.disk_reads is None else f"; {report.disk_reads:,} read from disk"),
        **({"changed": changed(report.shares)} if report.lossy else {}),
        "stall": f"{report.stall_s:.2f} s{of_time} waiting for experts",
        "deciding": _deciding(report),
    }


def _deciding(report: Report) -> str:
    if not (report.steps and report.time_s):
        return ""
    share = 100 * report.decide_s / report.time_s
    return (
        f"{1e6 * report.decide_s / report.steps:,.0f} us a step ({share:.1f} % of the time) by the "
        "policy and the state machine"
    )


def _memory(report: Report) -> str:
    from moerun.amounts import format_bytes

    text = (
        f"{_against_budget(report)}{format_bytes(report.arena_bytes)} expert slots; peak "
        f"{format_bytes(report.peak_host_bytes)} of host memory"
    )
    if report.peak_device_bytes is not None:
        text += f", {format_bytes(report.peak_device_bytes)} on {report.device}"
    return text


def _against_budget(report: Report) -> str:
    from moerun.amounts import format_bytes

    if report.memory_budget_bytes is None:
        return ""
    return (
        f"{format_bytes(report.memory_peak_bytes)} taken of "
        f"{format_bytes(report.memory_budget_bytes)}; "
    )


def _share(count: int, of: int) -> str:
    return f"{100 * count / of:.1f} %"
