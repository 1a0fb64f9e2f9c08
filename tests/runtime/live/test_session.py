"""The live cache and its property: the recorded trace and the journal repeat every decision."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moepolicy import Context, Event, ExpertCache, Kind, PolicyError, find_policy, replay_journal
from moeroute import TraceMeta, TraceWriter, open_trace
from moerun.errors import RunError
from moerun.links import DiskLink, Link
from moerun.live.passes import EventLog, Pass, rows_of
from moerun.live.session import Session
from moerun.offload.gate import Gate, GateOutput
from moesim import Workload, load_workload
from moesim.machine.profile import Compute, LinkProfile, Machine
from moesim.simulation import simulate
from support.links import RECORD_BYTES, MemoryRecords, MemorySlot, ShuffledLink


def make_session(
    context: Context,
    policy: str,
    make_link: Callable[[MemoryRecords, int], Link],
    *,
    broken: frozenset[int] = frozenset(),
    log: EventLog | None = None,
) -> Session:
    records = MemoryRecords(context.n_keys, broken)
    return Session(
        context,
        find_policy(policy),
        lambda n_slots: make_link(records, n_slots),
        record_bytes=RECORD_BYTES,
        journal=[],
        observers=[log] if log else [],
    )


def slots(n: int) -> list[MemorySlot]:
    return [MemorySlot() for _ in range(n)]


def disk_link(records: MemoryRecords, n_slots: int) -> Link:
    return DiskLink(records, slots(n_slots))


def link_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("link")]


def random_passes(
    seed: int, n_layers: int, n_experts: int, top_k: int, horizon: int, shape: list[int]
) -> list[Pass]:
    """Prompts and decoded tokens whose gates repeat themselves as real ones do. ``shape`` gives
    each pass's tokens; 0 is a decoded token, anything else a prompt that begins a sequence."""
    rng = np.random.default_rng(seed)
    passes: list[Pass] = []
    sequence, position = -1, 0
    last = rng.normal(size=(n_layers, n_experts))
    for tokens in shape:
        phase = int(tokens == 0 and bool(passes))
        n = max(tokens, 1)
        if phase == 0:
            sequence, position = sequence + 1, 0
        logits = []
        for _ in range(n):
            last = 0.7 * last + rng.normal(size=(n_layers, n_experts))
            logits.append(last.astype(np.float16))
        stacked = np.stack(logits, axis=1)  # [layers, tokens, experts]
        gates = [_gate(stacked, layer, top_k, horizon, rng) for layer in range(n_layers)]
        phases = np.full(n, phase, np.uint8)
        ids = np.zeros(n, np.int64)
        passes.append(Pass(len(passes), sequence, position, phases, ids, gates))
        position += n
    return passes


def _gate(
    logits: np.ndarray[Any, Any], layer: int, top_k: int, horizon: int, rng: np.random.Generator
) -> Gate:
    own = logits[layer].astype(np.float32)
    ids = np.argsort(-own, axis=1, kind="stable")[:, :top_k].astype(np.int64)
    chosen = np.exp(np.take_along_axis(own, ids, axis=1))
    weights = (chosen / chosen.sum(axis=1, keepdims=True)).astype(np.float32)
    predicted = np.full((horizon, *own.shape), np.nan, np.float16)
    for ahead in range(1, horizon + 1):
        if layer + ahead < len(logits):
            noise = rng.normal(scale=0.5, size=own.shape)
            predicted[ahead - 1] = logits[layer + ahead].astype(np.float32) + noise
    return Gate(ids, weights, logits[layer], predicted if horizon else None)


def drive(session: Session, passes: list[Pass]) -> None:
    """Serve every pass and check that each expert's slot holds that expert, and all come."""
    n_experts = session.context.n_experts
    for done in passes:
        for layer, gate in enumerate(done.gates):
            predicted = None if gate.predicted is None else torch.from_numpy(gate.predicted)
            assert gate.logits is not None
            output = GateOutput(torch.from_numpy(gate.logits), predicted)
            served = []
            ids, weights = torch.from_numpy(gate.ids), torch.from_numpy(gate.weights)
            slot: Any  # a MemorySlot, which computes nothing
            for expert, slot in session.serve(layer, ids, weights, output):
                words = slot.landing.view(torch.int32)
                assert bool((words == layer * n_experts + expert).all())
                served.append(expert)
                with session.lock:
                    session.cache.check()
            assert sorted(served) == sorted(np.unique(gate.ids).tolist())
    session.settle()


def trace_of(path: Path, passes: list[Pass], context: Context, horizon: int) -> Workload:
    meta = TraceMeta(
        source="live",
        model="random",
        n_layers=context.n_layers,
        n_experts=context.n_experts,
        top_k=context.top_k,
        horizon=horizon,
        prediction="noise" if horizon else None,
        expert_bytes={"fp16": RECORD_BYTES},
    )
    with TraceWriter(path, meta) as writer:
        writer.write(rows_of(passes, horizon))
    return load_workload(open_trace(path), predictions=horizon > 0)


machines = st.builds(
    Machine,
    name=st.just("random"),
    description=st.just(""),
    source=st.just("measured"),
    link=st.builds(
        LinkProfile,
        bytes_per_s=st.sampled_from([1e6, 1e8, 1e12]),
        latency_s=st.sampled_from([0.0, 1e-5]),
        streams=st.integers(1, 3),
    ),
    compute=st.builds(Compute, layer_s=st.sampled_from([0.0, 1e-5]), expert_s=st.just(1e-5)),
)

shapes = st.lists(st.sampled_from([0, 0, 0, 0, 1, 3, 9]), min_size=1, max_size=14)
contexts = st.builds(
    lambda n_layers, n_experts, top_k, slots, scope: Context(
        n_layers, n_experts, min(top_k, n_experts), min(slots, n_experts), scope
    ),
    n_layers=st.integers(1, 4),
    n_experts=st.integers(2, 8),
    top_k=st.integers(1, 3),
    slots=st.integers(0, 8),
    scope=st.sampled_from(["layer", "global"]),
)
SHARING = f"{Path(__file__).parents[2] / 'support' / 'policies.py'}:Sharing"
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def replayed(cache: ExpertCache, workload: Workload, journal: list[tuple[int, int]]) -> None:
    replay_journal(cache, map(workload.step, range(workload.n_steps)), journal)


@quick
@given(
    context=contexts,
    shape=shapes,
    policy=st.sampled_from(["lru", "lfu", "fifo", "random:seed=3", SHARING]),
    machine=machines,
    streams=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_without_prefetching_the_simulator_decides_as_the_live_run(
    tmp_path: Path,
    context: Context,
    shape: list[int],
    policy: str,
    machine: Machine,
    streams: int,
    seed: int,
) -> None:
    passes = random_passes(seed, *context[:3], 0, shape)
    live = EventLog()
    with make_session(
        context, policy, lambda r, n: ShuffledLink(r, slots(n), streams, seed), log=live
    ) as session:
        drive(session, passes)
        workload = trace_of(tmp_path / "live.parquet", passes, context, 0)
        simulated = EventLog()
        simulate(
            workload,
            session.policy,
            machine,
            slots=context.slots,
            scope=context.scope,
            observers=(simulated,),
        )
        assert live.events == simulated.events


@quick
@given(
    context=contexts,
    shape=shapes,
    policy=st.just(f"{SHARING}Ahead")
    | st.builds("lru-spec:n={},staging={}".format, st.integers(1, 2), st.integers(1, 4)),
    horizon=st.integers(1, 3),
    streams=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_with_prefetching_the_journal_and_the_trace_repeat_the_live_run(
    tmp_path: Path,
    context: Context,
    shape: list[int],
    policy: str,
    horizon: int,
    streams: int,
    seed: int,
) -> None:
    passes = random_passes(seed, *context[:3], horizon, shape)
    live, again = EventLog(), EventLog()
    with make_session(
        context, policy, lambda r, n: ShuffledLink(r, slots(n), streams, seed), log=live
    ) as session:
        drive(session, passes)
        journal = session.cache.journal
        assert journal is not None
        totals = session.totals
    workload = trace_of(tmp_path / "live.parquet", passes, context, horizon)
    spec = find_policy(policy)
    cache = ExpertCache(context, spec.build(context), observers=[again])
    replayed(cache, workload, journal)
    assert again.events == live.events
    assert totals.hits == sum(event.kind == Kind.HIT for event in live.events)
    assert totals.loads == sum(e.kind in (Kind.LOAD, Kind.SPECULATE) for e in live.events)
    assert totals.requests == totals.hits + totals.late + totals.misses


def test_a_prediction_is_on_the_row_of_the_layer_it_is_for() -> None:
    n_layers, n_experts, horizon = 4, 6, 3
    (prompt,) = random_passes(3, n_layers, n_experts, 2, horizon, [5])
    rows = rows_of([prompt], horizon)
    for ahead in range(1, horizon + 1):
        found = rows.predicted[ahead - 1].reshape(5, n_layers, n_experts)
        assert np.isnan(found[:, :ahead]).all()
        for layer in range(ahead, n_layers):
            made = prompt.gates[layer - ahead].predicted
            assert made is not None
            assert np.array_equal(found[:, layer], made[ahead - 1])


def test_a_journal_of_another_trace_is_refused(tmp_path: Path) -> None:
    context = Context(2, 4, 2, 1)
    passes = random_passes(1, 2, 4, 2, 0, [0] * 6)
    with make_session(context, "lru", disk_link) as session:
        drive(session, passes)
        journal = session.cache.journal
    assert journal is not None
    workload = trace_of(tmp_path / "t.parquet", passes[:3], context, 0)
    with pytest.raises(PolicyError, match="the trace does not have"):
        replayed(ExpertCache(context, find_policy("lru").build(context)), workload, journal)


def test_a_copy_that_fails_stops_the_generating_thread_with_its_message() -> None:
    context = Context(1, 4, 1, 4)
    ids, weights = torch.tensor([[2]]), torch.ones(1, 1)
    with make_session(context, "lru", disk_link, broken=frozenset({2})) as session:
        with pytest.raises(RunError, match="expert 2 in store"):
            list(session.serve(0, ids, weights))
        with pytest.raises(RunError, match="expert 2 in store"):
            list(session.serve(0, ids, weights))
        session.reset()
        assert [e for e, _ in session.serve(0, torch.tensor([[1]]), weights)] == [1]
        assert link_threads()
    assert not link_threads()


def test_a_policy_that_raises_in_the_link_thread_is_heard_of() -> None:
    context = Context(1, 4, 2, 1)
    with make_session(context, "random", disk_link) as session:
        session.cache.policy.victim = lambda *_: 99  # type: ignore[method-assign]
        with pytest.raises(PolicyError, match="does not exist"):
            drive(session, random_passes(5, 1, 4, 2, 0, [0] * 20))


def test_a_copy_s_thread_does_not_end_unheard() -> None:
    class Leaving(MemoryRecords):
        def read_into(self, key: int, buffer: torch.Tensor, **given: Any) -> None:
            if key in self.broken:
                raise SystemExit(3)
            super().read_into(key, buffer, **given)

    context = Context(1, 4, 2, 4)
    records = Leaving(context.n_keys, frozenset({1}))
    ask = torch.tensor([[0, 1]]), torch.ones(1, 2)
    with make_session(context, "lru", lambda _, n: DiskLink(records, slots(n))) as session:
        with pytest.raises(RunError, match=r"thread was ended by SystemExit \(3\)"):
            list(session.serve(0, *ask))
        assert len(link_threads()) == 1
        records.broken = frozenset()
        session.reset()
        assert len(list(session.serve(0, *ask))) == 2


def test_a_step_left_unfinished_is_not_built_upon() -> None:
    context = Context(1, 4, 2, 4)
    with make_session(context, "lru", disk_link) as session:
        steps = iter(session.serve(0, torch.tensor([[0, 1]]), torch.ones(1, 2)))
        next(steps)
        steps.close()
        with pytest.raises(RunError, match="unfinished"):
            list(session.serve(0, torch.tensor([[0, 1]]), torch.ones(1, 2)))
        session.reset()
        assert len(list(session.serve(0, torch.tensor([[0, 1]]), torch.ones(1, 2)))) == 2


def test_the_cache_lives_on_until_it_is_reset() -> None:
    context = Context(1, 4, 2, 4)
    ask = (0, torch.tensor([[0, 1]]), torch.ones(1, 2))
    with make_session(context, "lru", disk_link) as session:
        list(session.serve(*ask))
        list(session.serve(*ask))
        assert (session.totals.hits, session.totals.misses) == (2, 2)
        assert session.totals.bytes_loaded == 2 * RECORD_BYTES
        session.reset()
        list(session.serve(*ask))
        assert (session.totals.hits, session.totals.misses) == (0, 2)


def test_a_closed_session_refuses_and_its_threads_have_ended() -> None:
    session = make_session(Context(1, 4, 2, 4), "lru", disk_link)
    assert link_threads()
    session.close()
    session.close()
    with pytest.raises(RunError, match="closed"):
        list(session.serve(0, torch.tensor([[0, 1]]), torch.ones(1, 2)))
    assert not link_threads()


def test_events_name_what_happened() -> None:
    log = EventLog()
    with make_session(Context(1, 3, 1, 1), "lru", disk_link, log=log) as session:
        for expert in (0, 0, 1):
            list(session.serve(0, torch.tensor([[expert]]), torch.ones(1, 1)))
    assert log.events == [
        Event(Kind.MISS, 0, 0, -1),
        Event(Kind.LOAD, 0, 0, 0),
        Event(Kind.HIT, 1, 0, -1),
        Event(Kind.MISS, 2, 1, -1),
        Event(Kind.EVICT, 2, 0, 1),
        Event(Kind.LOAD, 2, 1, 0),
    ]
