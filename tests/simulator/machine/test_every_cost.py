"""Each entry of a machine profile costs what it says, in both engines and in the limit.

The table has a row for every field of a profile's sections, with the times worked out by hand: a
field that an engine or the limit does not charge fails here, and so does a new field without a row.

Unless a row says otherwise: one step that wants experts 0 and 1, both missing, with a slot for
each; a layer of 5 ns, experts of 3, copies of 10 (10 bytes at 1 byte a ns). Both engines, and the
limit, take 5 | copies 5..15, 15..25 | the last expert 25..28.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import pytest
from moepolicy import Context, Policy, PolicySpec, find_policy
from moepolicy.kinds import COMPUTE
from moesim import Machine, Workload, simulate
from moesim.engines.names import Engine
from moesim.errors import SimulationError
from moesim.limits import min_time_ns
from moesim.machine.costs import Sizes, costs_of
from moesim.machine.profile import Compute, Cpu, Disk, LinkProfile
from moesim.sizes import sizes_of
from support.workloads import make_workload

NS = 1e-9
SECTIONS = {"link": LinkProfile, "compute": Compute, "disk": Disk, "cpu": Cpu}

PLAIN = Machine(
    "by hand", "", "published", LinkProfile(1e9), Compute(layer_s=5 * NS, expert_s=3 * NS)
)
LATENT = replace(PLAIN, link=LinkProfile(1e9, latency_s=4 * NS))
WITH_DISK = replace(PLAIN, link=LinkProfile(1e9, streams=2), disk=Disk(1e9))
WITH_CPU = replace(PLAIN, cpu=Cpu(1, expert_s=7 * NS))

ONE_STEP = make_workload([(0, (0, 1))], 1, 4, foreseen=True)
TWO_TOKENS = make_workload([(0, (0, 1))], 1, 4, tokens=[2])
TWICE = make_workload([(0, (0, 1))] * 2, 1, 4)
ONE_AFTER_THE_OTHER = make_workload([(0, (0,)), (0, (1,))], 1, 4)
TWO_LAYERS = make_workload([(0, (0,)), (1, (0,)), (0, (1,)), (1, (0,))], 2, 4, foreseen=True)


class OnCpu(Policy):
    """Computes every miss where the experts are kept."""

    requires = frozenset({"cpu"})

    def __init__(self, context: Context) -> None:
        pass

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        return int(candidates[0])

    def on_miss(self, step: Any, rank: int) -> int:
        return COMPUTE


LRU, ON_CPU = find_policy("lru"), PolicySpec("on-cpu", OnCpu)


@dataclass(frozen=True)
class Case:
    """``field`` of a profile goes from its value on the machine to ``to``; times in ns, before
    and after. ``limit``: what no policy beats; the same twice where a policy can avoid the cost."""

    field: str
    to: Any
    time: tuple[int, int]
    limit: tuple[int, int]
    on: Machine = PLAIN
    workload: Workload = ONE_STEP
    policy: PolicySpec = LRU
    slots: int = 2


CASES = [
    # 5 | 5..25, 25..45 | 45..48
    Case("link.bytes_per_s", 0.5e9, (28, 48), (28, 48)),
    # 5 | 5..19, 19..33 | 33..36
    Case("link.latency_s", 4 * NS, (28, 36), (28, 36)),
    # Of two streams the latencies overlap: 5 | 9..19, 19..29 | 29..32
    Case("link.streams", 2, (36, 32), (36, 32), on=LATENT),
    # 2 bytes a ns: pieces of 3, 3, 3 and 1 bytes take 2, 2, 2 and 1 ns, an expert at once 5.
    Case("link.chunk_bytes", 3, (18, 22), (18, 22), on=replace(PLAIN, link=LinkProfile(2e9))),
    # A wrong guess crosses 25..35. The demand of 33 waits for its end, or for its piece's: 33.
    # So expert 1 arrives at 45 or 43, and after it come 3 + 5 + 3. The limit: two copies for the
    # first token, 5 + 20 + 3, and the compute of the second, 16.
    Case(
        "link.chunk_bytes",
        2,
        (56, 54),
        (44, 44),
        on=replace(PLAIN, link=LinkProfile(1e9, streams=2)),
        workload=TWO_LAYERS,
        policy=find_policy("lru-spec:n=2"),
        slots=1,
    ),
    # 5 | 5..15 | 15..18 | 23 | the victim out 23..33, the expert in 33..43 | 43..46. A policy may
    # bypass the cache, and then nothing goes out: the limit counts the way in.
    Case("link.write_back", True, (36, 46), (28, 28), workload=ONE_AFTER_THE_OTHER, slots=1),
    # The second copy waited for its stream: 5 | 5..19, 19..29 | 29..32. For all the limit knows
    # the first one may have, too.
    Case("link.back_to_back", True, (36, 32), (36, 28), on=LATENT),
    Case("compute.token_s", 6 * NS, (28, 34), (28, 34)),
    Case("compute.layer_s", 9 * NS, (28, 32), (28, 32)),
    Case("compute.layer_token_s", 4 * NS, (28, 32), (28, 32), workload=TWO_TOKENS),
    Case("compute.gate_sync_s", 4 * NS, (28, 32), (28, 32)),
    # Only a policy that predicts pays for its gates.
    Case("compute.prefetch_s", 4 * NS, (28, 32), (28, 28), policy=find_policy("lru-spec:n=1")),
    Case("compute.prefetch_s", 4 * NS, (28, 28), (28, 28)),
    # Waking 15..21, expert 21..24, waiting until 25, waking 25..31, expert 31..34. Compute that
    # is busy when an expert arrives does not wake up for it, so the limit cannot count on it.
    Case("compute.arrival_s", 6 * NS, (28, 34), (28, 28)),
    # 15..22, 25..32
    Case("compute.expert_s", 7 * NS, (28, 32), (28, 32)),
    Case("compute.expert_token_s", 4 * NS, (28, 32), (28, 32), workload=TWO_TOKENS),
    # 10 bytes, or the 10 operations of 5 parameters, in 10 ns: experts 15..28, 28..41; the limit
    # has the last one arrive at 25.
    Case("compute.memory_bytes_per_s", 1e9, (28, 41), (28, 38)),
    Case("compute.flops_per_s", 1e9, (28, 41), (28, 38)),
    # Reads 5..15, 15..25, copies 15..25, 25..35 | 35..38; then reads of 20, and of 14.
    Case("disk.bytes_per_s", 0.5e9, (38, 58), (38, 58), on=WITH_DISK),
    Case("disk.latency_s", 4 * NS, (38, 46), (38, 46), on=WITH_DISK),
    # Both experts again, no slots, one buffer: a step reads 5..15, copies 15..25, computes 25..28,
    # then 28..38, 38..48, 48..51; host memory spares the second step its reads. The limit counts
    # on as many buffers as it takes: 38 a step, 28 without reads.
    Case("disk.host_bytes", 20, (102, 82), (76, 66), on=WITH_DISK, workload=TWICE, slots=0),
    # Both on the CPU, 5 | 5..12, 12..19; the limit lets it begin before the gate has spoken.
    Case("cpu.workers", 2, (19, 12), (14, 7), on=WITH_CPU, policy=ON_CPU),
    Case("cpu.expert_s", 8 * NS, (19, 21), (14, 16), on=WITH_CPU, policy=ON_CPU),
    Case(
        "cpu.expert_token_s",
        1 * NS,
        (19, 21),
        (14, 16),
        on=WITH_CPU,
        workload=TWO_TOKENS,
        policy=ON_CPU,
    ),
    Case("cpu.memory_bytes_per_s", 10e9, (19, 21), (14, 16), on=WITH_CPU, policy=ON_CPU),
    Case("cpu.flops_per_s", 10e9, (19, 21), (14, 16), on=WITH_CPU, policy=ON_CPU),
]


def changed(machine: Machine, name: str, value: Any) -> Machine:
    section, field = name.split(".")
    return replace(machine, **{section: replace(getattr(machine, section), **{field: value})})


def time_ns(case: Case, on: Machine, engine: Engine) -> int:
    result = simulate(case.workload, case.policy, on, slots=case.slots, engine=engine)
    assert result.time_s is not None
    return round(result.time_s / NS)


def limit_ns(case: Case, on: Machine) -> int:
    sizes = sizes_of(case.workload.meta, 10)
    return min_time_ns(case.workload, on, sizes, case.slots, "layer")


def test_every_entry_of_a_profile_has_a_row() -> None:
    names = {f"{name}.{f.name}" for name, cls in SECTIONS.items() for f in fields(cls)}
    assert {case.field for case in CASES} == names


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.field)
@pytest.mark.parametrize("engine", [Engine.simpy, Engine.replay])
def test_an_engine_charges_it(case: Case, engine: Engine) -> None:
    after = changed(case.on, case.field, case.to)
    assert (time_ns(case, case.on, engine), time_ns(case, after, engine)) == case.time


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.field)
def test_the_limit_charges_what_no_policy_can_avoid(case: Case) -> None:
    after = changed(case.on, case.field, case.to)
    assert (limit_ns(case, case.on), limit_ns(case, after)) == case.limit
    assert all(limit <= time for limit, time in zip(case.limit, case.time, strict=True))


@pytest.mark.parametrize("engine", [Engine.simpy, Engine.replay])
@pytest.mark.parametrize(("layer_bytes", "token_bytes", "more"), [(4, None, 4), (None, 2, 2)])
def test_reading_dense_weights_is_charged(
    engine: Engine, layer_bytes: int | None, token_bytes: int | None, more: int
) -> None:
    """At 1 byte a ns, on top of the experts' 10 bytes."""
    meta = replace(ONE_STEP.meta, layer_bytes=layer_bytes, token_bytes=token_bytes)
    on = changed(PLAIN, "compute.memory_bytes_per_s", 1e9)
    case = Case("", 0, (0, 0), (0, 0), workload=replace(ONE_STEP, meta=meta))
    assert time_ns(case, on, engine) == 41 + more
    assert limit_ns(case, on) == 38 + more


@pytest.mark.parametrize("engine", [Engine.simpy, Engine.replay])
def test_a_disk_is_charged_where_there_was_none(engine: Engine) -> None:
    case = Case("", 0, (0, 0), (0, 0))
    without = replace(WITH_DISK, disk=None)
    assert (time_ns(case, without, engine), limit_ns(case, without)) == (28, 28)
    assert (time_ns(case, WITH_DISK, engine), limit_ns(case, WITH_DISK)) == (38, 38)


def test_what_a_profile_leaves_out_costs_nothing() -> None:
    for cls in SECTIONS.values():
        for field in fields(cls):
            if field.default is not MISSING:
                free = 1 if field.name == "streams" else 0
                assert field.default == (math.inf if field.name.endswith("_per_s") else free)
    assert Sizes(10, 5, 0, 0).low_bytes == 0


CENTURY_S = 100 * 365 * 24 * 3600


@pytest.mark.parametrize(
    ("field", "times"),
    [
        ("link.latency_s", 2),  # of two copies
        ("link.bytes_per_s", 4),  # and of their victims' ways back
        ("disk.latency_s", 2),
        ("compute.arrival_s", 2),
        ("compute.expert_s", 2),
        ("cpu.expert_s", 2),
        ("compute.layer_s", 1),
        ("compute.token_s", 1),
    ],
)
def test_a_run_that_may_take_a_century_is_refused(field: str, times: int) -> None:
    """Were everything in the step to come one after the other: 64 bits hold 292 years."""
    on = replace(PLAIN, disk=Disk(1e9), cpu=Cpu(1))
    for share, refused in ((0.99, False), (1.01, True)):
        each_s = share * CENTURY_S / times
        slow = changed(on, field, 10 / each_s if field.endswith("_per_s") else each_s)
        sizes = sizes_of(ONE_STEP.meta, 10)
        with pytest.raises(SimulationError, match="100 years") if refused else nullcontext():
            costs_of(ONE_STEP, slow, sizes, predicting=False)


def test_a_century_is_the_sum_of_all() -> None:
    """A copy's two latencies, of a quarter and a bit each, for two copies."""
    each_s = 0.26 * CENTURY_S
    on = replace(PLAIN, link=LinkProfile(1e9, latency_s=each_s), disk=Disk(1e9, latency_s=each_s))
    with pytest.raises(SimulationError, match="100 years"):
        costs_of(ONE_STEP, on, sizes_of(ONE_STEP.meta, 10), predicting=False)
