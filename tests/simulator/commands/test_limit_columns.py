"""The limit beside every policy: in results, in what `compare` prints, and in sweeps."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moepolicy import Context, PolicySpec, find_policy
from moepolicy.library.recency.lru import Lru
from moepolicy.policy import Policy
from moesim import Machine, simulate
from moesim.engines.names import Engine
from moesim.limits import min_time_ns
from moesim.machine.profile import Compute, LinkProfile
from moesim.sizes import sizes_of
from moesim.sweep import Grid, SweepSettings, run_sweep
from support.machines import machine, machines
from support.traces import random_trace
from support.workloads import make_workload

NS = 1e-9


def moesim(*arguments: str | Path) -> str:
    command = [sys.executable, "-c", "from moesim.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Steps of (layer, experts, tokens), some of them prompts.
steps = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), st.integers(1, 3)),
    min_size=1,
    max_size=14,
)


@given(steps, machines, st.sampled_from(["layer", "global"]), st.integers(0, 3), st.data())
@settings(max_examples=150, deadline=None)
def test_no_policy_decodes_faster_than_the_limit(
    steps: list[tuple[list[int], int]], on: Machine, scope: str, slots: int, data: st.DataObject
) -> None:
    """Prompts and decoded tokens mixed: the limit is of the time that tokens/s count."""
    workload = make_workload(
        [(i % 2, experts) for i, (experts, _) in enumerate(steps)],
        2,
        4,
        tokens=[tokens for _, tokens in steps],
        foreseen=True,
    )
    name = data.draw(st.sampled_from(["lru", "belady-bypass", "clairvoyant", "lru-spec:n=1"]))
    result = simulate(workload, find_policy(name), on, slots=slots, scope=scope)
    assert result.limit_tokens_per_s is not None
    assert result.limit_loads is not None
    assert result.share_of_limit is not None
    assert result.tokens_per_s is not None
    assume(result.tokens_per_s < float("inf"))
    assert result.share_of_limit <= 1 + 1e-9
    assert result.limit_loads <= result.loads
    if name == "lru" and result.bypasses == 0:
        assert result.limit_loads_kept is not None
        assert result.limit_loads <= result.limit_loads_kept <= result.loads


def test_the_decoded_part_alone_is_bounded_by_hand() -> None:
    """A prompt of 2 tokens wanting both experts, then expert 0 and expert 1 with one slot; copies
    of 10 ns, layers of 5, experts of 3. Of the decoded tokens' experts the slot can hold one when
    the first gate has spoken; the other then crosses the link and is computed: 5 + 10 + 3."""
    workload = make_workload([(0, (0, 1)), (0, (0,)), (0, (1,))], 1, 2, tokens=[2, 1, 1])
    on, sizes = machine(), sizes_of(workload.meta, 10)
    assert not workload.decode[0]
    whole = min_time_ns(workload, on, sizes, 1, "layer")
    part = min_time_ns(workload, on, sizes, 1, "layer", decoding=True)
    assert part == 5 + 10 + 3
    assert part < whole
    found = simulate(workload, find_policy("belady-bypass"), on, slots=1)
    assert found.limit_tokens_per_s == pytest.approx(2 / (part * NS))


class Ahead(Policy):
    """Prefetches the next layer's first expert, whatever any gate says."""

    def __init__(self, context: Context) -> None:
        self.n_experts = context.n_experts
        self.n_keys = context.n_keys

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        return int(candidates[0])

    def prefetch(self, step: Any, keys: Any) -> int:
        keys[0] = (step.layer + 1) * self.n_experts % self.n_keys
        return 1


class Gated(Ahead):
    """The same, but asks for speculative gates."""

    requires = frozenset({"predictions"})


@pytest.mark.parametrize("engine", [Engine.simpy, Engine.replay])
def test_speculative_gates_are_charged_to_those_who_ask_for_them(
    engine: Engine,
) -> None:
    workload = make_workload([(i % 2, (i % 4, 3 - i % 4)) for i in range(12)], 2, 4, foreseen=True)
    compute = Compute(layer_s=5 * NS, expert_s=3 * NS)
    gates = Compute(layer_s=5 * NS, expert_s=3 * NS, prefetch_s=1000 * NS)
    times: dict[tuple[str, float], Any] = {
        (spec.name, cost.prefetch_s): simulate(
            workload,
            spec,
            Machine("m", "", "published", LinkProfile(1e9), cost),
            slots=2,
            engine=engine,
        ).time_s
        for spec in (PolicySpec("ahead", Ahead), PolicySpec("gated", Gated), find_policy("lru"))
        for cost in (compute, gates)
    }
    gate = 1000 * NS
    assert times["ahead", gate] == times["ahead", 0] == times["gated", 0]
    assert times["lru", gate] == times["lru", 0]
    # The wait for what travels under the gates' time is all that may be won back of it.
    assert times["gated", gate] >= times["gated", 0] + 12 * (gate - 20 * NS)


def test_compare_prints_the_limit_and_the_gap_within_100_columns() -> None:
    text = moesim("compare", "lfu", "lru-spec:n=2,staging=8", "--tokens", "60", "--slots", "2,4")
    assert max(map(len, text.splitlines())) <= 100
    headings = next(line for line in text.splitlines() if line.split()[:1] == ["policy"])
    for heading in ("x limit", "limit %", "gap %"):
        assert headings.count(heading) == 1
    gaps = [line.split()[-1] for line in text.splitlines() if line.startswith("limit  ")]
    assert headings.endswith("gap %")
    assert gaps == ["100.0", "100.0"]
    assert text.count("\nlimit ") == 2  # a row for each number of slots
    assert "lru is not among the policies; it was simulated for this" in text
    bare = moesim("compare", "lfu", "--tokens", "60", "--slots", "2", "--no-limits")
    assert "limit" not in bare


@pytest.mark.slow
def test_json_and_csv_have_the_limit_and_the_gap(tmp_path: Path) -> None:
    arguments = ["compare", "lru", "belady", "lfu", "--tokens", "60", "--slots", "4"]
    rows = json.loads(moesim(*arguments, "--format", "json"))
    lru, belady, lfu = rows
    assert (lru["gap_closed_time"], lru["gap_closed_loads"]) == (0, 0)
    for row in (belady, lfu):
        assert row["share_of_limit"] == row["tokens_per_s"] / row["limit_tokens_per_s"] < 1
        saved = 1 / lru["tokens_per_s"] - 1 / row["tokens_per_s"]
        most = 1 / lru["tokens_per_s"] - 1 / row["limit_tokens_per_s"]
        assert row["gap_closed_time"] == pytest.approx(saved / most)
        gap = lru["loads"] - row["limit_loads"]
        assert row["gap_closed_loads"] == pytest.approx((lru["loads"] - row["loads"]) / gap)
    assert belady["loads"] == belady["limit_loads_kept"]  # the least without bypass
    # Without lru among the policies the same is measured from it.
    alone = json.loads(moesim("compare", "belady", *arguments[4:], "--format", "json"))
    assert alone == [belady]
    out = tmp_path / "none.csv"
    moesim(*arguments, "--no-limits", "--format", "csv", "--out", out)
    with out.open() as file:
        assert {(r["limit_loads"], r["gap_closed_time"]) for r in csv.DictReader(file)} == {
            ("", "")
        }


@pytest.mark.slow
def test_a_sweep_has_the_same_columns_as_a_comparison(tmp_path: Path) -> None:
    trace = str(random_trace(tmp_path / "t.parquet"))
    axes: dict[str, Any] = {"traces": (trace,), "slots": (1, 3), "machines": ("t4", "a100")}

    def swept(name: str, *policies: str, **more: Any) -> pl.DataFrame:
        report = run_sweep(
            Grid(policies, **axes, **more), str(tmp_path / name), SweepSettings(workers=2)
        )
        assert not report.failures
        return pl.read_parquet(tmp_path / name)

    both = swept("both.parquet", "lru", "belady")
    one = swept("one.parquet", "belady")
    columns = ["policy", "machine", "slots", "limit_tokens_per_s", "limit_loads"]
    columns += ["share_of_limit", "gap_closed_loads", "gap_closed_time"]
    # What lru is needed for alone is no row.
    assert one[columns].rows() == both.filter(policy="belady")[columns].rows()
    assert set(both.filter(policy="lru")["gap_closed_time"]) <= {0.0, None}
    assert both["gap_closed_time"].null_count() < len(both)
    rows = json.loads(
        moesim(
            *("compare", "belady", "--trace", trace, "--slots", "1,3", "--machine", "t4"),
            *("--format", "json"),
        )
    )
    assert [tuple(row[name] for name in columns) for row in rows] == one.filter(machine="t4")[
        columns
    ].rows()
    cold = swept("cold.parquet", "belady", cold=True, limits=False)
    assert cold["cold"].all()
    assert cold["limit_loads"].null_count() == len(cold)
    assert cold["hits"].to_list() == one["hits"].to_list()  # the trace is of one sequence
    # What is finished is not measured anew, and what is new is.
    out = str(tmp_path / "one.parquet")
    again = run_sweep(Grid(("belady",), **axes), out, SweepSettings(resume=True))
    assert (again.ran, again.kept) == (0, 4)
    assert pl.read_parquet(out).equals(one)
    more = run_sweep(Grid(("belady", "lfu"), **axes), out, SweepSettings(resume=True))
    assert (more.ran, more.kept) == (4, 4)
    assert (
        pl.read_parquet(out)["gap_closed_time"].null_count()
        == one["gap_closed_time"].null_count() * 2
    )


@pytest.mark.slow
def test_a_sweep_of_a_file_without_limits(tmp_path: Path) -> None:
    trace = random_trace(tmp_path / "t.parquet")
    grid = tmp_path / "grid.toml"
    grid.write_text(
        f"policies = ['lfu']\ntraces = {str(trace)!r}\nslots = [1]\nlimits = false\ncold = true\n"
    )
    out = tmp_path / "r.parquet"
    moesim("sweep", "--grid", grid, "--out", out)
    frame = pl.read_parquet(out)
    assert frame["limit_loads"].to_list() == [None]
    assert frame["cold"].to_list() == [True]
    moesim("sweep", "--grid", grid, "--limits", "--out", out, "--force")
    assert pl.read_parquet(out)["limit_loads"].null_count() == 0


def test_a_policy_that_shares_slots_has_a_limit_of_its_own(tmp_path: Path) -> None:
    """Layer 0 uses two experts in turns, layer 1 always the same, 8 times each. With all slots in
    layer 0 that has 2 loads and layer 1 has 8; with 3 slots in each they have 2 and 1; with one
    in each 1 + 4, as one of the two is kept, and 1."""

    class All(Lru):
        @classmethod
        def share_slots(cls, total: int, context: Context) -> Any:
            return [total, 0] if context.slots < 3 else None

    workload = make_workload([(i % 2, (i // 2 % 2 * (1 - i % 2),)) for i in range(16)], 2, 4)
    spec = PolicySpec("all", All)
    one, two, three = (simulate(workload, spec, machine(), slots=n) for n in (1, 2, 3))
    assert [r.limit_loads for r in (one, two, three)] == [2 + 8, 2 + 8, 3]
    assert [r.shares_slots for r in (one, two, three)] == [True, True, False]
    assert one.loads == 2 + 8
    equal = simulate(workload, find_policy("lru"), machine(), slots=1)
    assert (equal.limit_loads, equal.shares_slots) == (1 + 4 + 1, False)
    printed = moesim(
        "compare", "lru", "adapmoe-slots", "--trace", "tiny", "--tokens", "64", "--slots", "2"
    )
    limits = [line.split()[0:2] for line in printed.splitlines() if line.startswith("limit ")]
    assert limits == [["limit", "2"], ["limit", "(adapmoe-slots)"]]
    assert "(with the slots of each layer as the policy has them: adapmoe-slots)" in printed
