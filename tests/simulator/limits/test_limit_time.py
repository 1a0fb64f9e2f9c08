"""The least time, against every schedule on tiny machines and every policy on random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moepolicy import find_policy
from moesim import Machine, Workload, simulate
from moesim.limits import min_time_ns
from moesim.machine.profile import Compute, Cpu, Disk, LinkProfile
from moesim.sizes import sizes_of
from support.schedules import Tiny, quickest
from support.workloads import make_workload

NS = 1e-9
Demands = list[tuple[int, tuple[int, ...]]]


@st.composite
def demands_of(draw: st.DrawFn, n_layers: int, n_experts: int, longest: int) -> Demands:
    order = st.permutations(range(n_experts))
    width = st.sampled_from([1, 1, 2, n_experts])
    n = draw(st.integers(1, longest))
    return [(i % n_layers, tuple(draw(order)[: draw(width)])) for i in range(n)]


scopes = st.sampled_from(["layer", "global"])
tiny_machines = st.builds(
    Tiny,
    layer_ns=st.integers(1, 4),
    expert_ns=st.integers(1, 3),
    copy_ns=st.integers(1, 6),
    latency_ns=st.sampled_from([0, 0, 1, 3]),
    streams=st.integers(1, 2),
)


def machine_of(tiny: Tiny) -> Machine:
    link = LinkProfile(1e9, tiny.latency_ns * NS, tiny.streams)
    return Machine(
        "tiny",
        "",
        "published",
        link,
        Compute(layer_s=tiny.layer_ns * NS, expert_s=tiny.expert_ns * NS),
    )


def time_of(
    policy: str, workload: Workload, machine: Machine, n_bytes: int, slots: int, scope: str
) -> int:
    result = simulate(
        workload,
        find_policy(policy),
        machine,
        slots=slots,
        scope=scope,
        expert_bytes=n_bytes,
    )
    assert result.time_s is not None
    return round(result.time_s / NS)


def limit(
    workload: Workload, machine: Machine, n_bytes: int, slots: int, scope: str, **more: Any
) -> int:
    return min_time_ns(workload, machine, sizes_of(workload.meta, n_bytes), slots, scope, **more)


@given(
    demands_of(1, 3, 6) | demands_of(2, 2, 6),
    tiny_machines,
    scopes,
    st.integers(0, 2),
)
@settings(max_examples=150, deadline=None)
def test_no_schedule_beats_the_limit(demands: Demands, tiny: Tiny, scope: str, slots: int) -> None:
    workload = make_workload(demands, 1 + max(layer for layer, _ in demands), 3)
    found = limit(workload, machine_of(tiny), tiny.copy_ns, slots, scope)
    assert found <= quickest(demands, tiny, slots, scope)


@given(
    demands_of(2, 3, 6),
    tiny_machines,
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.booleans(),
)
@settings(max_examples=75, deadline=None)
def test_no_schedule_beats_the_limit_of_unequal_shares(
    demands: Demands, tiny: Tiny, shares: tuple[int, int], alike: bool
) -> None:
    workload = make_workload(demands, 2, 3)
    shares = shares[:1] * 2 if alike else shares
    found = limit(workload, machine_of(tiny), tiny.copy_ns, 9, "layer", shares=shares)
    assert found <= quickest(demands, tiny, 9, "layer", shares)
    if alike:
        assert found == limit(workload, machine_of(tiny), tiny.copy_ns, shares[0], "layer")


@given(
    demands_of(1, 3, 6) | demands_of(2, 2, 6),
    tiny_machines,
    scopes,
    st.integers(0, 2),
    st.sampled_from(["lru", "belady", "belady-bypass", "clairvoyant"]),
)
@settings(max_examples=100, deadline=None)
def test_the_schedules_searched_are_all_a_policy_could_make(
    demands: Demands, tiny: Tiny, scope: str, slots: int, policy: str
) -> None:
    workload = make_workload(demands, 1 + max(layer for layer, _ in demands), 3)
    found = time_of(policy, workload, machine_of(tiny), tiny.copy_ns, slots, scope)
    assert found >= quickest(demands, tiny, slots, scope)


# Everything a machine may have, with durations that coincide often or are nothing.
times = st.sampled_from([0.0, 1 * NS, 5 * NS])
machines = st.builds(
    Machine,
    name=st.just("any"),
    description=st.just(""),
    source=st.just("published"),
    link=st.builds(
        LinkProfile,
        bytes_per_s=st.sampled_from([1e9, 5e9]),
        latency_s=times,
        streams=st.integers(1, 3),
        chunk_bytes=st.sampled_from([0, 3, 10]),
        write_back=st.booleans(),
        back_to_back=st.booleans(),
    ),
    compute=st.builds(Compute, token_s=times, layer_s=times, expert_s=times, prefetch_s=times),
    disk=st.none()
    | st.builds(
        Disk,
        bytes_per_s=st.sampled_from([0.5e9, 2e9]),
        latency_s=times,
        host_bytes=st.sampled_from([0, 20, 50]),
    ),
    cpu=st.none() | st.builds(Cpu, workers=st.integers(1, 2), expert_s=times),
)
OWN = Path(__file__).parents[2] / "support" / "policies.py"
SHARING = [f"{OWN}:Sharing", f"{OWN}:SharingAhead"]
POLICIES = ["lru", "static", "belady-bypass", "clairvoyant", "clairvoyant:delay=3", "fiddler"]
POLICIES += SHARING
STAGING = ["lru-spec:n=1,staging=1", "lru-spec:n=2,staging=3"]


@given(
    demands=demands_of(1, 4, 12) | demands_of(2, 4, 12) | demands_of(3, 3, 12),
    machine=machines,
    scope=scopes,
    slots=st.integers(0, 3),
    policy=st.sampled_from(POLICIES) | st.sampled_from(STAGING),
)
@settings(max_examples=400, deadline=None)
def test_no_policy_beats_the_limit_on_any_machine(
    demands: Demands, machine: Machine, scope: str, slots: int, policy: str
) -> None:
    assume(policy != "fiddler" or machine.cpu is not None)
    n_layers = 1 + max(layer for layer, _ in demands)
    workload = make_workload(demands, n_layers, 4, foreseen=True)
    buffers = find_policy(policy).build(workload.context(slots, scope)).staging
    kept = buffers if policy in STAGING else 0
    found = time_of(policy, workload, machine, 10, slots, scope)
    shares = find_policy(policy).shares(workload.context(slots, scope))
    assert (shares is not None) == (policy in SHARING and scope == "layer")
    assert found >= limit(workload, machine, 10, slots, scope, buffers=kept, shares=shares)


def test_guesses_in_staging_go_beyond_the_slots() -> None:
    """No slots; three layers of 5 ns, experts of 5, copies of 10. With slots alone a copy can
    only start when its gate has spoken: 5 + 10 + 5 a step. With two buffers, one for the expert
    in use, a right guess travels meanwhile, and only each token's first layer takes as long.
    """
    workload = make_workload([(i % 3, (0,)) for i in range(9)], 3, 4, foreseen=True)
    machine = Machine(
        "hand", "", "published", LinkProfile(1e9), Compute(layer_s=5 * NS, expert_s=5 * NS)
    )
    assert limit(workload, machine, 10, 0, "layer") == 9 * 20
    assert time_of("lru", workload, machine, 10, 0, "layer") == 9 * 20
    found = time_of("lru-spec:n=1,staging=2", workload, machine, 10, 0, "layer")
    assert found == 3 * (20 + 10 + 10)
    assert found >= limit(workload, machine, 10, 0, "layer", buffers=2)
