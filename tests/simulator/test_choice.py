"""What a comparison chooses where nobody does, and the sentence that it ends with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import moesim
import pytest
from moepolicy import find_policy
from moeroute import open_trace
from moeroute.models import find_model
from moeroute.sizes import GivenSizes
from moesim.choice import choose
from moesim.comparison import PolicyComparison, Setting, prepare, run
from moesim.curves.hit_ratios import hit_curve
from moesim.engines.compilations import OF_THIS_PROCESS
from moesim.machine.profile import DEFAULT_MACHINE
from moesim.reading import sentence
from moesim.report import Compared, RefusedPoint
from moesim.simulation import workload_for
from moesim.sizes import spare_slots

TOKENS = 200


def compared(trace: str, *policies: str, slots: list[int], **options: Any) -> PolicyComparison:
    machine = options.pop("machine", "cpu-disk")
    setting = Setting.of(trace, machine, tokens=TOKENS, **options)
    specs = [find_policy(name) for name in policies]
    return run(setting, specs, slots, compilations=OF_THIS_PROCESS)


def test_sizes_are_those_at_which_lru_and_belady_differ() -> None:
    workload = workload_for(open_trace("tiny"), []).head(1000)
    found = choose(workload, "layer", None, machine=None, slots=None)
    assert found.machine.name == DEFAULT_MACHINE  # without sizes there are no times to choose by
    gap = hit_curve(workload, "belady", "layer") - hit_curve(workload, "lru", "layer")
    assert 2 not in found.slots
    assert int(gap.argmax()) in found.slots
    assert all(gap[size] >= gap.max() / 2 for size in found.slots)
    points = sorted(100 * gap[size] for size in found.slots)
    assert f"{points[0]:.0f} to {points[-1]:.0f} points more than lru" in found.why


def test_a_machine_is_chosen_on_which_copies_count() -> None:
    small = workload_for(open_trace("tiny"), []).head(300)
    size = next(iter(small.meta.expert_bytes.values()))
    found = choose(small, "layer", size, machine=None, slots=[4])
    assert found.machine.name != DEFAULT_MACHINE
    assert f"machine {found.machine.name}, because" in found.why
    assert f"on {DEFAULT_MACHINE}" in found.why
    stalls = {
        name: moesim.compare("tiny", ["lru"], slots=4, machine=name, tokens=300)
        .select(moesim_share())
        .item()
        for name in (found.machine.name, DEFAULT_MACHINE)
    }
    assert stalls[found.machine.name] > 2 * stalls[DEFAULT_MACHINE]


def moesim_share() -> Any:
    import polars as pl

    return pl.col("stall_s") / pl.col("time_s")


def test_the_default_machine_stays_where_copies_count_on_it() -> None:
    workload = workload_for(open_trace("mixtral-like"), []).head(100)
    found = choose(workload, "layer", 66_700_000, machine=None, slots=[4])
    assert (found.machine.name, found.slots, found.why) == (DEFAULT_MACHINE, [4], "")


def test_what_is_asked_for_in_vain_is_noted() -> None:
    tiny, given = open_trace("tiny").meta, GivenSizes("mixtral-8x7b")
    assert spare_slots([2, 8], tiny) == []
    assert "has 8 experts, so that the cache holds all" in spare_slots([8, 9], tiny)[0]
    mixtral = open_trace("mixtral-like").meta
    assert "has its own sizes: --like mixtral-8x7b adds" in given.notes(mixtral)[0]
    every = replace(mixtral, expert_bytes=find_model("mixtral-8x7b").expert_bytes())
    assert "--like mixtral-8x7b changes nothing" in given.notes(every)[0]
    wanting: list[dict[str, Any]] = [
        {"layer_bytes": None},
        {"expert_bytes": {}},
        {"expert_bytes": {"4bit": 9}},
    ]
    for lacking in wanting:
        assert given.notes(replace(mixtral, **lacking)) == []
    assert replace(given, attention="4bit").notes(mixtral) == []
    assert GivenSizes().notes(mixtral) == []


def test_what_is_named_is_not_chosen() -> None:
    setting = Setting.of("tiny", "t4", tokens=50)
    ready = prepare(setting, [find_policy("lru")], setting.machine, [2])
    assert (ready.setting.machine.name, ready.slots, ready.why) == ("t4", [2], "")
    ready = prepare(setting, [find_policy("lru")], setting.machine, None)
    assert ready.setting.machine.name == "t4"
    assert ready.why.startswith("Chosen: slots ")
    assert "machine t4" not in ready.why


def test_the_sentence_names_the_fastest_that_runs_live() -> None:
    found = compared("tiny", "lru", "lru-spec", "belady", "moe-eras", slots=[3, 6])
    speeds = {
        (one.slots, one.result.policy): one.result.speed
        for one in found.rows
        if isinstance(one, Compared)
    }
    said = sentence(found.rows)
    gain = 100 * (speeds[3, "lru-spec"] / speeds[3, "lru"] - 1)
    assert "lru-spec is the fastest lossless policy that runs live at 3" in said
    assert f"{gain:.0f}" in said
    assert "% faster than lru" in said
    assert "belady" not in said  # it knows the future
    faster = [n for n in (3, 6) if speeds[n, "moe-eras"] > speeds[n, "lru-spec"]]
    assert (f"moe-eras at {' and '.join(map(str, faster))} slots is faster" in said) == bool(faster)
    assert "; the best lossless policy that runs live reaches " in said
    assert "of the most tokens/s that any policy could reach." in said
    assert ".." not in said


def test_the_sentence_says_that_nothing_is_to_choose() -> None:
    found = compared("tiny", "lru", "fifo", slots=[2], machine="rtx4090")
    said = sentence(found.rows)
    assert "as fast as one another within 1%" in said
    assert "compute hardly waits" in said


def test_policies_that_cannot_differ_are_not_said_to_lead() -> None:
    """At as many slots as a token has experts, lru and lfu do the same."""
    found = compared("tiny", "lru", "lfu", "lru-spec", slots=[2], machine="t4")
    said = sentence(found.rows)
    assert "at 2 slots (as fast as lfu)" in said
    assert "less than" not in said


def test_without_times_loads_are_read() -> None:
    found = compared("tiny", "lru", "lfu", slots=[4])
    untimed = [
        one._replace(result=replace(one.result, tokens_per_s=None, share_of_limit=None), gap=None)
        for one in found.rows
        if isinstance(one, Compared)
    ]
    assert "loads the fewest of the policies that run live" in sentence(untimed)


def test_the_sentence_is_of_what_ran() -> None:
    found = compared("tiny", "lru", "clairvoyant", slots=[4])
    said = sentence(found.rows)
    assert said.startswith("lru is the only one of these policies that runs live; it reaches ")
    failed = RefusedPoint("lfu", 4, "layer", "t4", "tiny", refused="failed")
    said = sentence([*found.rows, failed])
    assert said.startswith("lru is the only one of the policies that could run that runs live")


def test_a_lossy_policy_that_is_faster_is_said_to_be_lossy() -> None:
    rows = compared("tiny", "lru", "moe-eras", slots=[3]).rows
    lru, lossy = (one for one in rows if isinstance(one, Compared))
    quick = lossy._replace(result=replace(lossy.result, tokens_per_s=2 * lru.result.speed))
    said = sentence([lru, quick])
    assert said.startswith("lru is the only lossless one of these policies that runs live")
    assert said.endswith("moe-eras at 3 slots is faster, and changes what is computed.")
    slow = lossy._replace(result=replace(lossy.result, tokens_per_s=lru.result.speed / 2))
    assert "moe-eras" not in sentence([lru, slow])


@pytest.mark.parametrize("policies", [("belady",), ("moe-eras",)])
def test_where_no_policy_runs_live_nothing_is_said(policies: tuple[str, ...]) -> None:
    assert sentence(compared("tiny", *policies, slots=[4]).rows) == ""
