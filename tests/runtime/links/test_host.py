"""Three tiers: experts on disk, some of them in host memory, fewer on the device."""

from __future__ import annotations

import os
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moepolicy import find_policy
from moeroute import open_trace
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.links import HostTier, Variant
from moerun.live.recording import LiveRecording
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from moesim.engines.choose import run as simulate_with
from moesim.engines.clock import DISK_LANE, Segment
from moesim.engines.compilations import Compilations
from moesim.engines.in_simpy import Host
from moesim.machine.costs import costs_of
from moesim.machine.profile import Compute, Disk, LinkProfile, Machine
from moesim.simulation import simulate
from moesim.sizes import sizes_of
from moesim.workload.loading import load_workload
from support.links import RECORD_BYTES, MemoryRecords
from support.runs import generate

PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom"
PATIENCE_S = 30


@pytest.fixture
def tiny(tmp_path: Path) -> ExpertStore:
    return pack(resolve("tiny"), tmp_path / "tiny")


def is_of(record: torch.Tensor, key: int) -> bool:
    return bool((record.view(torch.int32) == key).all())


def bring(tier: HostTier, key: int, variant: Variant = Variant.FULL) -> None:
    with tier.hold(key, variant) as held:
        held.wait()


@settings(deadline=None)
@given(keys=st.lists(st.integers(0, 7), max_size=40), capacity=st.integers(1, 8))
def test_it_keeps_what_the_simulators_host_cache_keeps(keys: list[int], capacity: int) -> None:
    tier, host = HostTier(MemoryRecords(8), capacity * RECORD_BYTES), Host(capacity * RECORD_BYTES)
    buffer = torch.empty(RECORD_BYTES, dtype=torch.uint8)
    for key in keys:
        reads, hits = tier.reads, tier.hits
        tier.read_into(key, buffer)
        assert is_of(buffer, key)
        assert (tier.hits - hits, tier.reads - reads) == (
            (1, 0) if host.has(key, False, RECORD_BYTES) else (0, 1)
        )


sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=50),
    sizes=sizes,
    room=st.integers(0, 12),
)
def test_both_precisions_share_it_as_they_do_the_simulators(
    asked: list[tuple[int, bool]], sizes: tuple[int, int], room: int
) -> None:
    full, low = (
        MemoryRecords(6, record_bytes=n * RECORD_BYTES, first=100 * i) for i, n in enumerate(sizes)
    )
    n_bytes = (max(sizes) + room) * RECORD_BYTES
    tier, host = HostTier(full, n_bytes, low, read_bytes=RECORD_BYTES), Host(n_bytes)
    for key, is_low in asked:
        reads, hits = tier.reads, tier.hits
        with tier.hold(key, Variant(is_low)) as held:
            assert is_of(held.wait(), key + 100 * is_low)
        bytes_of = sizes[is_low] * RECORD_BYTES
        assert (tier.hits - hits, tier.reads - reads) == (
            (1, 0) if host.has(key, is_low, bytes_of) else (0, 1)
        )
    for key, is_low in host.used:  # and it lies where it should, wherever it has moved
        with tier.hold(key, Variant(is_low)) as held:
            assert is_of(held.wait(), key + 100 * is_low)


def test_a_record_in_use_is_not_overwritten() -> None:
    tier = HostTier(MemoryRecords(4), 2 * RECORD_BYTES)
    held = tier.hold(0)
    for key in (1, 2, 3, 1):
        bring(tier, key)
    assert is_of(held.wait(), 0)
    held.drop()
    bring(tier, 3)
    bring(tier, 0)  # it was the one used longest ago as soon as it could go
    assert (tier.hits, tier.reads) == (0, 7)


def test_a_record_without_a_place_is_read_when_another_is_dropped() -> None:
    tier = HostTier(MemoryRecords(4), RECORD_BYTES)
    held = tier.hold(0)
    held.wait()
    told = threading.Event()
    later = tier.hold(1, listener=told.set)
    assert later.readable.n_bytes == 0
    assert is_of(held.wait(), 0)
    held.drop()
    assert told.wait(PATIENCE_S)
    assert is_of(later.wait(), 1)
    later.drop()


def test_a_record_moves_only_when_nobody_holds_it() -> None:
    """Room for two full records, or four low ones."""
    full = MemoryRecords(4, record_bytes=2 * RECORD_BYTES)
    tier = HostTier(full, 4 * RECORD_BYTES, MemoryRecords(4, first=100))
    for key in range(4):
        bring(tier, key, Variant.LOW)
    held = tier.hold(3, Variant.LOW)  # the one next to the middle
    wanted = tier.hold(0)  # for which 0 and 1 go, and 3 must move
    bring(tier, 2, Variant.LOW)
    assert wanted.readable.n_bytes == 0
    assert is_of(held.wait(), 103)
    held.drop()
    assert is_of(wanted.wait(), 0)
    wanted.drop()
    for key in (2, 3):
        with tier.hold(key, Variant.LOW) as found:
            assert is_of(found.wait(), 100 + key)
    assert (tier.hits, tier.reads) == (4, 5)


def test_threads_share_it_and_find_what_they_asked_for() -> None:
    full = MemoryRecords(12, record_bytes=3 * RECORD_BYTES)
    tier = HostTier(full, 10 * RECORD_BYTES, MemoryRecords(12, first=100), read_bytes=RECORD_BYTES)
    wrong = []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(200):
            key, low = choose.randrange(12), choose.random() < 0.5
            with tier.hold(key, Variant(low)) as held:
                if not is_of(held.wait(), key + 100 * low):
                    wrong.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert not wrong
    assert tier.hits + tier.reads == 600


def test_a_read_that_fails_leaves_its_place_to_others() -> None:
    tier = HostTier(MemoryRecords(4, broken=frozenset({2})), RECORD_BYTES)
    for _ in range(2):
        with pytest.raises(RunError, match="expert 2 in store"), tier.hold(2) as held:
            held.wait()
    with tier.hold(1) as held:
        assert is_of(held.wait(), 1)


def test_a_place_is_not_given_on_while_a_failed_read_of_it_is_still_held() -> None:
    tier = HostTier(MemoryRecords(4, broken=frozenset({2})), RECORD_BYTES)
    failed = tier.hold(2)
    with pytest.raises(RunError):
        failed.wait()
    told = threading.Event()
    later = tier.hold(1, listener=told.set)
    assert not told.wait(0.02)  # what has been queued of the first may still be crossing
    assert is_of(failed.record, 2)
    failed.drop()
    assert is_of(later.wait(), 1)


def test_a_live_run_reads_from_disk_what_the_simulated_one_does(
    tiny: ExpertStore, tmp_path: Path
) -> None:
    with Runner(tiny, Settings(find_policy("lru"), slots=3)) as runner:
        expected = generate(runner, PROSE, Sampling(max_new_tokens=12))
    host_bytes = 40 * tiny.record_bytes
    chosen = Settings(find_policy("lru"), slots=3, host_bytes=host_bytes)
    with Runner(tiny, chosen) as runner:
        recording = LiveRecording(runner, tmp_path / "t.parquet", None, seed=0)
        recording.recorder.begin_sequence()
        assert generate(runner, PROSE, Sampling(max_new_tokens=12)) == expected
        recording.finish()
        assert runner.host_tier is not None
        reads, loads = runner.host_tier.reads, runner.session.totals.loads
    machine = Machine(
        "m",
        "",
        "measured",
        LinkProfile(1e9),
        Compute(layer_s=1e-4),
        Disk(1e9, host_bytes=host_bytes),
    )
    segments: list[Segment] = []
    result = simulate(
        load_workload(open_trace(tmp_path / "t.parquet")),
        chosen.policy,
        machine,
        slots=3,
        expert_bytes=tiny.record_bytes,
        timeline=segments,
    )
    simulated = sum(segment.lane == DISK_LANE for segment in segments)
    assert (reads, loads) == (simulated, result.loads)
    assert tiny.n_keys // 2 < reads < loads


@pytest.mark.slow
def test_both_precisions_of_a_live_run_share_what_host_memory_it_is_given(
    tiny: ExpertStore, tmp_path: Path
) -> None:
    low = pack(resolve("tiny"), tmp_path / "low", precision="2bit")
    chosen = Settings(find_policy("hobbit"), slots=2, low=low, host_bytes=20 * tiny.record_bytes)
    with Runner(tiny, chosen) as runner:
        recording = LiveRecording(runner, tmp_path / "t.parquet", None, seed=0)
        recording.recorder.begin_sequence()
        text = generate(runner, PROSE, Sampling(max_new_tokens=12))
        recording.finish()
        assert runner.host_tier is not None
        reads, totals = runner.host_tier.reads, runner.session.totals
    with Runner(tiny, replace(chosen, host_bytes=None)) as runner:
        assert generate(runner, PROSE, Sampling(max_new_tokens=12)) == text
    disk = Disk(1e9, host_bytes=20 * tiny.record_bytes)
    machine = Machine("m", "", "measured", LinkProfile(1e9), Compute(layer_s=1e-4), disk)
    trace = open_trace(tmp_path / "t.parquet")
    workload = load_workload(trace, logits=True)
    sizes = sizes_of(trace.meta, tiny.record_bytes, low.record_bytes)
    _, clock = simulate_with(
        workload,
        chosen.policy,
        runner.context,
        costs_of(workload, machine, sizes, predicting=False),
        compilations=Compilations(),
        timeline=True,
    )
    simulated = sum(segment.lane == DISK_LANE for segment in clock.segments or ())
    assert 0 < totals.low_loads < totals.loads
    assert reads == simulated < totals.loads


@pytest.mark.parametrize("host_records", [None, 20])
def test_a_disk_that_fails_while_text_is_generated_is_named(
    tiny: ExpertStore, host_records: int | None
) -> None:
    host_bytes = None if host_records is None else host_records * tiny.record_bytes
    chosen = Settings(
        find_policy("lru-spec"), slots=1, streams=2, host_bytes=host_bytes, cold=host_bytes is None
    )
    with Runner(tiny, chosen) as runner:
        layers = iter(range(1000))

        def cut(layer: int, _gate: object) -> None:
            if next(layers) == 5 * tiny.n_layers:
                os.truncate(tiny.location(6 * tiny.n_experts).path, 8192)

        runner.session.gate_observers.append(cut)
        outcome: list[BaseException] = []

        def answer() -> None:
            try:
                generate(runner, PROSE, Sampling(max_new_tokens=60, stop=False))
            except RunError as error:
                outcome.append(error)

        thread = threading.Thread(target=answer)
        thread.start()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    (error,) = outcome
    assert "of layer 6 is cut off after" in str(error)
    assert "experts-00006.safetensors" in str(error)


def test_host_memory_for_less_than_the_copies_under_way_is_refused(tiny: ExpertStore) -> None:
    chosen = Settings(find_policy("lru"), streams=2, host_bytes=tiny.record_bytes)
    with pytest.raises(RunError, match=r"hold 1 expert .* give --host-memory 393216 \(bytes\)"):
        Runner(tiny, chosen)


def test_host_memory_that_is_not_there_is_refused(
    tiny: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moerun.links import host_memory

    monkeypatch.setattr(host_memory, "free_bytes", lambda _: 10 * tiny.record_bytes)
    chosen = Settings(find_policy("lru"), host_bytes=11 * tiny.record_bytes)
    with pytest.raises(RunError, match="of host memory, of which this machine has"):
        Runner(tiny, chosen)
