"""The grid: what a TOML file and flags may say, and the points it is laid out as."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from moepolicy import PolicyError, PolicySpec, find_policy
from moeroute import TraceError, open_trace
from moesim import SimulationError, load_workload
from moesim.engines.names import Engine
from moesim.sweep.grid import Grid, load_grid, make_grid, merge, parse_parameter
from moesim.sweep.plan import make_plan
from moesim.sweep.run import run_sweep
from moesim.sweep.worker import slots_in
from support.traces import decoded, random_trace, write_trace

POLICIES = Path(__file__).parents[2] / "support" / "sweep_policies.py"

EVERYTHING = """
policies = ["lru", "lru-spec:staging=2"]
traces = "tiny"
memory = ["1.5GiB", "500 MB", 4096]
scopes = ["layer", "global"]
machines = ["rtx3060", "t4"]
expert_bytes = ["66.7MB", 4096]
low_precision = "2bit"
calibration = "tiny"
engine = "simpy"

[parameters.lru-spec]
n = [1, 2]
"""


@pytest.fixture
def trace(tmp_path: Path) -> str:
    return str(random_trace(tmp_path / "trace.parquet"))


def test_a_file_with_every_entry(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(EVERYTHING)
    grid = make_grid(load_grid(path))
    assert grid.traces == ("tiny",)  # one value stands for a list
    assert grid.memory == (3 * 2**29, 500_000_000, 4096)
    assert grid.expert_bytes == (66_700_000, 4096)
    assert (grid.engine, grid.low_precision, grid.calibration) == ("simpy", "2bit", "tiny")
    labels = [spec.label for spec in grid.specs()]
    assert labels == ["lru", "lru-spec:staging=2,n=1", "lru-spec:staging=2,n=2"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("policy = ['lru']", "unknown entry policy; did you mean 'policies'?"),
        ("policies = []", "policies is empty"),
        ("policies = [3]", "policies: 3 is not a name"),
        ("slots = [1.5]", "slots: 1.5 is not a whole number"),
        ("slots = -1", "slots is -1: a cache has 0 slots or more"),
        ("slots = true", "slots: True is not a whole number"),
        ("memory = '4 gibs'", "'4 gibs' is no amount of memory"),
        ("expert_bytes = 0", "an expert has 1 byte or more"),
        ("expert_bytes = 1.5", "expert_bytes: 1.5 is no amount of memory"),
        ("expert_bytes = true", "expert_bytes: True is no amount of memory"),
        ("scopes = ['both']", "unknown scope 'both'; there are: global, layer"),
        ("engine = 'fast'", "unknown engine 'fast'"),
        ("slots = 1\nmemory = '1GiB'", "slots or memory, not both"),
        ("precisions = 'fp16'\nexpert_bytes = 4", "precisions or expert_bytes, not both"),
        ("parameters = 3", "parameters must be tables"),
        ("[parameters.lru]\nn = [true]", "lru:n: True is not a number or a name"),
        ("[parameters.lru]\nn = ['1,2']", "has a comma"),
        ("slots = [", "is not a grid"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_it(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(SimulationError) as error:
        load_grid(path)
    assert str(path) in str(error.value)
    assert says in str(error.value)


def test_flags_take_the_place_of_entries_and_add_parameters() -> None:
    table = {"policies": ["lru-spec"], "slots": [1], "parameters": {"lru-spec": {"n": [1]}}}
    flags = {"memory": ["1GiB"], "parameters": {"lru-spec": {"staging": ["1", "2"]}}}
    grid = make_grid(merge(table, flags))
    assert grid.slots == ()
    assert grid.memory == (2**30,)
    assert [spec.label for spec in grid.specs()] == [
        "lru-spec:n=1,staging=1",
        "lru-spec:n=1,staging=2",
    ]


def test_a_parameter_flag() -> None:
    assert parse_parameter("lru-spec:n=1,2") == ("lru-spec", "n", ["1", "2"])
    assert parse_parameter("my.py:Mine:n=1") == ("my.py:Mine", "n", ["1"])
    for wrong in ("n=1", "lru-spec", "lru-spec:n", "lru-spec:n=", ":n=1"):
        with pytest.raises(SimulationError, match=r"is not policy:parameter=value"):
            parse_parameter(wrong)


@pytest.mark.parametrize(
    ("parameters", "policies", "says"),
    [
        ({"lur": {"n": ("1",)}}, ("lru",), "'lur', which is not in the grid; did you mean 'lru'"),
        ({"lru": {"n": ("1",)}}, ("lru",), "policy 'lru' has no parameter 'n'"),
        ({"lru-spec": {"n": ("1",)}}, ("lru-spec:n=2",), "fixes n, and the grid varies it"),
    ],
)
def test_parameters_of_no_policy(
    parameters: dict[str, Any], policies: tuple[str, ...], says: str
) -> None:
    with pytest.raises((SimulationError, PolicyError), match=says):
        Grid(policies, parameters=parameters).specs()


def test_points_come_in_the_order_of_the_axes(trace: str) -> None:
    grid = Grid(("lru", "lfu"), (trace,), (1, 2), scopes=("layer", "global"), machines=("t4",))
    plan = make_plan(grid)
    rows = [plan.labels(point) for point in plan.points]
    assert [(row["scope"], row["slots"], row["policy"]) for row in rows] == [
        (scope, slots, policy)
        for scope in ("layer", "global")
        for slots in (1, 2)
        for policy in ("lru", "lfu")
    ]
    assert {row["precision"] for row in rows} == {"fp16"}  # the trace's own
    assert len({point.key for point in plan.points}) == len(plan.points)


def test_without_sizes_there_are_quarters_of_a_layer(trace: str) -> None:
    plan = make_plan(Grid(("lru",), (trace,)))
    assert [point.slots for point in plan.points] == [1, 2, 3]


def test_a_budget_holds_slots_and_the_policy_s_staging(trace: str) -> None:
    # Experts of 10 bytes in 2 layers: 64 bytes hold 6. `two` stages 2, `lru` 1.
    workload = load_workload(open_trace(trace))
    two = find_policy(f"{POLICIES}:Staging:buffers=2")

    def slots(budget: int, policy: PolicySpec) -> int:
        return slots_in(budget, 10, policy, workload.context(0, "layer"))

    assert [slots(budget, find_policy("lru")) for budget in (64, 30, 10, 10_000)] == [2, 1, 0, 4]
    assert [slots(budget, two) for budget in (64, 30, 20, 10_000)] == [2, 0, 0, 4]
    with pytest.raises(SimulationError, match=r"the least that works is 20, .* takes 20 more"):
        slots(19, two)


def test_a_point_that_cannot_be_is_refused_and_the_others_stay(trace: str) -> None:
    plan = make_plan(Grid(("lru", "lru-spec"), (trace,), (1,), precisions=("fp16", "2bit")))
    refused = {plan.name(point): point.refused for point in plan.points}
    assert [bool(reason) for reason in refused.values()] == [False, True, True, True]
    reasons = [reason for reason in refused.values() if reason]
    assert "no column predicted_logits_1, which policy 'lru-spec' needs" in reasons[0]
    assert "no size for precision '2bit'" in reasons[1]


def test_a_grid_without_a_valid_point_says_why(trace: str) -> None:
    grid = Grid(("lru-spec",), (trace,), (1, 2, 3))
    with pytest.raises(SimulationError) as error:
        make_plan(grid)
    said = str(error.value)
    assert said.startswith("none of the grid's 3 points can be simulated: ")
    assert said.count("no column predicted_logits_1") == 1  # one reason, however many points


@pytest.mark.parametrize(
    ("grid", "error", "says"),
    [
        (Grid(()), SimulationError, "no policies"),
        (Grid(("lur",)), PolicyError, "unknown policy 'lur'"),
        (Grid(("lru",), machines=("t5",)), SimulationError, "unknown machine 't5'"),
        (Grid(("lru",), ("absent.parquet",)), TraceError, "absent.parquet"),
    ],
)
def test_a_name_that_is_not_there_stops_the_sweep(
    grid: Grid, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        make_plan(grid)


def test_a_key_names_what_the_result_depends_on(tmp_path: Path, trace: str) -> None:
    def key(**changes: Any) -> str:
        axes = {"policies": ("lru",), "traces": (trace,), "slots": (1,), **changes}
        (point,) = (p for p in make_plan(Grid(**axes)).points if not p.reference)
        return point.key

    other = str(random_trace(tmp_path / "other.parquet", seed=1))
    profile = tmp_path / "mine.toml"
    text = "name = 'mine'\n[link]\nbytes_per_s = 1e9\n"
    profile.write_text(text)
    mine = key(machines=(str(profile),))
    different = [
        key(),
        key(slots=(2,)),
        key(policies=("lfu",)),
        key(policies=("random:seed=1",)),
        key(policies=("random:seed=2",)),
        key(scopes=("global",)),
        key(expert_bytes=(11,)),
        key(cold=True),
        key(limits=False),
        key(traces=(other,)),
        mine,
    ]
    assert len(set(different)) == len(different)
    assert key(expert_bytes=(10,)) == key()  # what fp16 is in this trace
    assert key(engine=Engine.simpy) == key()  # all engines have one result
    profile.write_text("description = 'the same machine'\n" + text)
    assert key(machines=(str(profile),)) == mine
    profile.write_text(text.replace("1e9", "2e9"))
    assert key(machines=(str(profile),)) != mine


def test_a_changed_policy_file_is_another_policy(tmp_path: Path, trace: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(POLICIES.read_text())
    grid = Grid((f"{file}:First",), (trace,), (1,))
    before = make_plan(grid)
    file.write_text(POLICIES.read_text() + "\n# changed\n")
    after = make_plan(grid)
    assert before.points[0].key != after.points[0].key
    assert before.labels(before.points[0])["policy_sha256"] is not None


def test_a_row_states_parameters_left_at_their_defaults(tmp_path: Path) -> None:
    predicted = [[0.0, 1.0]] * 2
    path = write_trace(tmp_path / "p.parquet", decoded([[0], [1]]), 2, predicted)
    plan = make_plan(Grid(("lru-spec:n=1",), (str(path),), (1,)))
    row = plan.labels(plan.points[0])
    assert json.loads(row["parameters"]) == {"n": 1, "staging": 4}


def test_only_policies_that_require_it_have_a_second_store() -> None:
    grid = make_grid({"policies": ["lru", "hobbit"], "slots": 2, "precisions": ["fp32", "2bit"]})
    without = {(p.policy, p.precision): p for p in make_plan(grid).points}
    chosen = make_plan(replace(grid, low_precision="2bit"))
    points = {(p.policy, p.precision): p for p in chosen.points}
    hobbit, lru = points[1, "fp32"], points[0, "fp32"]
    assert (hobbit.low_bytes, lru.low_bytes) == (40_960, 0)
    assert lru.key == without[0, "fp32"].key
    assert hobbit.key != without[1, "fp32"].key
    refused = points[1, "2bit"].refused
    assert refused is not None
    assert "no fewer than the" in refused


def test_a_calibration_trace_concerns_the_policies_that_count(tmp_path: Path, trace: str) -> None:
    other = str(random_trace(tmp_path / "other.parquet", seed=1))
    grid = Grid(("lru", "static"), (trace,), (1,))
    lru, static = make_plan(grid).points
    with_other = make_plan(replace(grid, calibration=other)).points
    assert with_other[0].key == lru.key
    assert with_other[1].key != static.key
    plan = make_plan(replace(grid, calibration="tiny"))
    assert plan.points[0].refused is None
    assert "layers of 8 experts" in str(plan.points[1].refused)


def test_a_policy_that_the_machine_cannot_serve_is_refused_and_the_sweep_succeeds(
    trace: str, tmp_path: Path
) -> None:
    grid = make_grid({"policies": ["lru", "fiddler"], "traces": [trace], "slots": [2]})
    report = run_sweep(grid, str(tmp_path / "r.parquet"))
    assert [row["status"] for row in report.rows] == ["ok", "failed"]
    assert "computes on CPU workers" in report.rows[1]["error"]
    assert (len(report.failures), report.refused) == (1, 1)
