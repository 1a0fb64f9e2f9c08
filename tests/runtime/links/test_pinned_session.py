"""A session over the link of a GPU, on a device of threads: what is computed is always right."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moepolicy import Context, ExpertCache, find_policy, replay_journal
from moerun.errors import RunError
from moerun.links import HostTier, Throttle
from moerun.links.arena import Arena
from moerun.links.pinned import PinnedLink
from moerun.live.passes import EventLog, Pass
from moerun.live.session import Session
from moerun.offload.gate import GateOutput
from runtime.live.test_session import random_passes, trace_of
from support.links import MemoryRecords
from support.pinned import CHUNK, FIRST_LOW, LOW, RECORD, Form, dual_slot
from support.thread_device import PATIENCE_S, ThreadDevice

OWN = Path(__file__).parents[2] / "support" / "policies.py"


class Compute:
    """Computes experts in the device's own time: looks whether each is what it should be."""

    def __init__(self, session: Session, device: ThreadDevice) -> None:
        self.session = session
        self.device = device
        self.wrong: list[tuple[int, int]] = []
        self.computed = 0
        self.lowered = 0

    def run(self, passes: list[Pass], sizes: list[int]) -> None:
        """Serve every pass; before each the cache is given another of ``sizes``, in turns."""
        session = self.session
        for i, done in enumerate(passes):
            if sizes:
                session.resize(sizes[i % len(sizes)])
            for layer, gate in enumerate(done.gates):
                assert gate.logits is not None
                predicted = None if gate.predicted is None else torch.from_numpy(gate.predicted)
                output = GateOutput(torch.from_numpy(gate.logits), predicted)
                served = []
                ids, weights = torch.from_numpy(gate.ids), torch.from_numpy(gate.weights)
                for expert, form in session.serve(layer, ids, weights, output):
                    key = layer * session.context.n_experts + expert
                    if form is not None:  # or it is skipped
                        assert isinstance(form, Form)
                        self.device.compute.run(partial(self._compute, key, form))
                    served.append(expert)
                assert sorted(served) == sorted(np.unique(gate.ids).tolist())
        session.settle()
        with session.lock:  # another thread may resize
            session.cache.check()
        self.device.synchronize()

    def _compute(self, key: int, form: Form) -> None:
        low = len(form.memory) == LOW
        self.computed += 1
        self.lowered += low
        if not form.holds(key + FIRST_LOW * low):
            self.wrong.append((key, int(form.memory.view(torch.int32)[0])))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from(["lru", "lru-spec:n=2,staging=2", "hobbit", f"{OWN}:SlotSpec"]),
    slots=st.integers(0, 6),
    scope=st.sampled_from(["layer", "global"]),
    streams=st.integers(1, 3),
    chunk_bytes=st.sampled_from([0, CHUNK]),
    records_held=st.sampled_from([None, 0, 9]),
    derives=st.booleans(),
    capped=st.booleans(),
    sizes=st.lists(st.integers(0, 6), max_size=3),
    seed=st.integers(0, 10**6),
)
def test_every_expert_is_computed_from_its_own_record(
    policy: str,
    slots: int,
    scope: str,
    streams: int,
    chunk_bytes: int,
    records_held: int | None,
    derives: bool,
    capped: bool,
    sizes: list[int],
    seed: int,
) -> None:
    context = Context(3, 6, 2, slots, scope)
    full = MemoryRecords(context.n_keys, record_bytes=RECORD)
    low = MemoryRecords(context.n_keys, record_bytes=LOW, first=FIRST_LOW)
    copies = streams * (2 if chunk_bytes else 1)
    n_bytes = None if records_held is None else (copies + records_held) * RECORD
    device = ThreadDevice(seed)

    def make_link(n_slots: int) -> PinnedLink:
        return PinnedLink(
            HostTier(full, n_bytes, low, read_bytes=CHUNK),
            Arena(partial(dual_slot, derives), n_slots),
            device,
            streams=streams,
            chunk_bytes=chunk_bytes,
            throttle=Throttle(bytes_per_s=1e9) if capped else None,
        )

    with Session(
        context, find_policy(policy), make_link, record_bytes=RECORD, low_record_bytes=LOW
    ) as session:
        compute = Compute(session, device)
        compute.run(random_passes(seed, 3, 6, 2, 2, [5, 0, 0, 3, 0]), sizes)
        totals = session.totals
        assert session.link.statistics.copies == totals.loads
        assert session.link.statistics.bytes_copied == totals.bytes_loaded
    device.end()
    assert compute.wrong == []
    assert compute.computed == totals.requests - totals.skipped
    assert policy == "hobbit" or not compute.lowered


@pytest.mark.parametrize("chunk_bytes", [0, CHUNK])
@pytest.mark.parametrize("fails", ["disk", "device"])
def test_an_error_ends_the_pass_and_a_reset_session_serves_again(
    chunk_bytes: int, fails: str
) -> None:
    context = Context(3, 6, 2, 1, "layer")
    broken = frozenset({9}) if fails == "disk" else frozenset()
    records = MemoryRecords(context.n_keys, broken, record_bytes=RECORD)
    device = ThreadDevice(3, failing=frozenset({11}) if fails == "device" else frozenset())
    passes = random_passes(5, 3, 6, 2, 2, [5, 0, 0, 3, 0])
    outcome: list[BaseException] = []

    def make_link(n_slots: int) -> PinnedLink:
        tier = HostTier(records, 8 * RECORD, read_bytes=CHUNK)
        slots = Arena(partial(dual_slot, False), n_slots)
        return PinnedLink(tier, slots, device, streams=2, chunk_bytes=chunk_bytes)

    with Session(
        context, find_policy("lru-spec:n=2,staging=2"), make_link, record_bytes=RECORD
    ) as session:

        def serve() -> None:
            try:
                Compute(session, device).run(passes, [])
            except (RunError, RuntimeError) as error:
                outcome.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        (error,) = outcome
        said = "expert 9 in store" if fails == "disk" else "copy 11 failed"
        assert said in str(error)
        records.broken = frozenset()
        session.reset()
        compute = Compute(session, device)
        compute.run(passes, [])
    device.end()
    assert compute.wrong == []
    assert compute.computed


@pytest.mark.slow
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    policy=st.sampled_from(["lru", "lru-spec:n=2,staging=1", f"{OWN}:SlotSpec"]),
    slots=st.integers(0, 6),
    streams=st.integers(1, 3),
    chunk_bytes=st.sampled_from([0, CHUNK]),
    records_held=st.sampled_from([None, 3]),
    seed=st.integers(0, 10**6),
)
def test_a_run_repeats_from_its_journal(
    tmp_path: Path,
    policy: str,
    slots: int,
    streams: int,
    chunk_bytes: int,
    records_held: int | None,
    seed: int,
) -> None:
    """However its copies ended: the order in which they did is all that matters."""
    context = Context(3, 6, 2, slots, "layer")
    passes = random_passes(seed, 3, 6, 2, 2, [5, 0, 0, 3, 0])
    records = MemoryRecords(context.n_keys, record_bytes=RECORD)
    device = ThreadDevice(seed)
    n_bytes = None if records_held is None else (2 * streams + records_held) * RECORD
    chosen, live, again = find_policy(policy), EventLog(), EventLog()

    def make_link(n_slots: int) -> PinnedLink:
        return PinnedLink(
            HostTier(records, n_bytes, read_bytes=CHUNK),
            Arena(partial(dual_slot, False), n_slots),
            device,
            streams=streams,
            chunk_bytes=chunk_bytes,
        )

    with Session(
        context, chosen, make_link, record_bytes=RECORD, journal=[], observers=[live]
    ) as session:
        Compute(session, device).run(passes, [])
        journal = session.cache.journal
    device.end()
    assert journal is not None
    workload = trace_of(tmp_path / "live.parquet", passes, context, 2)
    cache = ExpertCache(context, chosen.build(context), observers=[again])
    replay_journal(cache, map(workload.step, range(workload.n_steps)), journal)
    assert again.events == live.events
