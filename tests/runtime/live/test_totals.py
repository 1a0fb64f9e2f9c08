"""A live run's totals and the columns of its report."""

from __future__ import annotations

import pytest
from moepolicy.counts import as_row, columns
from moerun.live.report import Report
from moerun.live.totals import Totals


def test_a_report_has_its_columns_in_their_order() -> None:
    assert list(columns(Report)) == [
        *("policy", "slots", "scope", "model", "precision", "attention", "device", "streams"),
        *("link_bytes_per_s", "prompt_tokens", "new_tokens", "steps", "requests", "hits", "late"),
        *("misses", "loads", "bypasses", "prefetches", "useless_prefetches", "cpu_experts"),
        *("low_loads", "substituted", "skipped", "rerouted", "skipped_share"),
        *("substituted_share", "low_share", "rerouted_share", "bytes_loaded", "hit_ratio"),
        *("time_s", "stall_s", "decide_s", "tokens_per_s"),
        *("prompt_tokens_per_s", "disk_reads", "arena_bytes", "memory_budget_bytes"),
        *("memory_planned_bytes", "memory_peak_bytes", "peak_host_bytes", "peak_device_bytes"),
        *("lossy", "interrupted", "policy_failure"),
    ]


def test_totals_add_up_and_tell_what_came_since() -> None:
    first = Totals(steps=2, requests=4, hits=1, bytes_loaded=30, stall_s=0.5, gate_mass=2.0)
    second = Totals(steps=1, requests=2, hits=2, stall_s=0.25, gate_mass=1.0, low_mass=0.5)
    both = first + second
    assert (both.steps, both.requests, both.bytes_loaded, both.stall_s) == (3, 6, 30, 0.75)
    assert both.since(first) == second
    assert second.low_share == 0.5
    assert both.hit_ratio == pytest.approx(0.5)
    assert Totals() + first == first
    assert as_row(first)["skipped_share"] == 0.0
