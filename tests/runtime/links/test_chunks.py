"""Experts that travel in pieces: demand overtakes prefetch between two of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moepolicy import Context, ExpertCache, find_policy, replay_journal
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.links import DiskLink, HostTier, Throttle
from moerun.links.arena import Arena
from moerun.links.bus import Pieces
from moerun.live.passes import EventLog
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.live.session import Session
from moerun.settings import Settings
from moerun.store.pack import pack
from runtime.live.test_session import drive, random_passes, trace_of
from support.links import MemoryRecords, MemorySlot
from support.runs import generate

CHUNK = 4096
RECORD = 3 * CHUNK
PATIENCE_S = 30.0


class LoggedRecords:
    """Notes every piece as it moves; the first of ``gate``'s waits for the word to go on."""

    n_keys = 4
    record_bytes = RECORD

    def __init__(self, gate: int) -> None:
        self.gate = gate
        self.log: list[tuple[int, int]] = []
        self.reached, self.go_on = threading.Event(), threading.Event()

    def read_into(self, key: int, buffer: torch.Tensor, *, pieces: Pieces | None = None) -> None:
        assert pieces is not None
        for piece in pieces(RECORD):
            self.log.append((key, piece.start // CHUNK))
            if (key, piece.start) == (self.gate, 0):
                self.reached.set()
                assert self.go_on.wait(PATIENCE_S)
            buffer[piece] = key


class Slot:
    def __init__(self) -> None:
        self.landing: torch.Tensor | None = torch.zeros(RECORD, dtype=torch.uint8)

    def arrive(self, record: torch.Tensor) -> None:
        assert record is self.landing


Reports = SimpleQueue[tuple[int, Exception | None]]


def wait_for(happened: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.fixture
def gated() -> Iterator[tuple[LoggedRecords, DiskLink, Reports]]:
    records, reports = LoggedRecords(gate=1), Reports()
    link = DiskLink(records, [Slot() for _ in range(4)], streams=2, chunk_bytes=CHUNK)
    link.start(lambda key, error, _ended_s: reports.put((key, error)))
    yield records, link, reports
    link.close()


Gated = tuple[LoggedRecords, DiskLink, Reports]


def test_a_demand_overtakes_a_prefetch_at_the_end_of_its_piece(gated: Gated) -> None:
    records, link, reports = gated
    link.submit(1, 0, demand=False)
    assert records.reached.wait(PATIENCE_S)
    link.submit(2, 1, demand=False)
    link.submit(3, 2, demand=True)
    wait_for(lambda: link._bus.n_waiting == 2)
    records.go_on.set()
    assert [reports.get(timeout=PATIENCE_S)[0] for _ in range(3)] == [3, 1, 2]
    # What was submitted first goes first among guesses.
    assert records.log == [(1, 0), (3, 0), (3, 1), (3, 2), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]


def test_a_guess_that_turns_out_right_travels_as_demand(gated: Gated) -> None:
    records, link, reports = gated
    link.submit(1, 0, demand=False)
    assert records.reached.wait(PATIENCE_S)
    link.submit(2, 1, demand=False)
    wait_for(lambda: link._bus.n_waiting == 1)
    link.want(2)
    records.go_on.set()
    assert [reports.get(timeout=PATIENCE_S)[0] for _ in range(2)] == [2, 1]


def test_a_copy_that_fails_in_the_middle_hands_the_bus_on(gated: Gated) -> None:
    records, link, reports = gated

    def fail(key: int, buffer: torch.Tensor, *, pieces: Pieces | None = None) -> None:
        assert pieces is not None
        for piece in pieces(RECORD):
            if key == 0 and piece.start == CHUNK:
                raise RunError("expert 0 is cut off")
            buffer[piece] = key

    records.read_into = fail  # type: ignore[method-assign]
    kept = []  # as a session keeps it, with all that its traceback refers to
    link.submit(0, 0)
    kept.append(reports.get(timeout=PATIENCE_S))
    assert isinstance(kept[0][1], RunError)
    link.submit(2, 1)
    assert reports.get(timeout=PATIENCE_S) == (2, None)


def test_a_capped_link_takes_as_long_for_the_pieces_as_for_the_whole() -> None:
    reports: Reports = Reports()
    records = LoggedRecords(gate=-1)
    throttle = Throttle(bytes_per_s=1e6)
    link = DiskLink(records, [Slot()], throttle=throttle, chunk_bytes=CHUNK)
    link.start(lambda key, error, _ended_s: reports.put((key, error)))
    for key in range(3):
        link.submit(key, 0)
        reports.get(timeout=PATIENCE_S)
    link.close()
    assert link.statistics.busy_s >= 0.999 * 3 * RECORD / 1e6


@pytest.mark.parametrize("chunk", [-4096, 1000])
def test_chunks_that_cannot_be_are_refused(chunk: int) -> None:
    with pytest.raises(RunError, match="a chunk must be a multiple of 4096 bytes"):
        DiskLink(MemoryRecords(2), [MemorySlot()], chunk_bytes=chunk)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    slots=st.integers(0, 6),
    n=st.integers(1, 2),
    staging=st.integers(1, 4),
    streams=st.integers(1, 3),
    tier=st.sampled_from([None, 6, 18]),
    scope=st.sampled_from(["layer", "global"]),
    seed=st.integers(0, 10**6),
)
def test_a_live_run_in_pieces_repeats_from_its_journal(
    tmp_path: Path,
    slots: int,
    n: int,
    staging: int,
    streams: int,
    tier: int | None,
    scope: str,
    seed: int,
) -> None:
    context = Context(3, 6, 2, slots, scope)
    passes = random_passes(seed, 3, 6, 2, 2, [5, 0, 0, 0, 3, 0, 0])
    policy = find_policy(f"lru-spec:n={n},staging={staging}")
    records = MemoryRecords(context.n_keys)
    source = records if tier is None else HostTier(records, tier * records.record_bytes)
    live, again = EventLog(), EventLog()
    with Session(
        context,
        policy,
        lambda n_slots: DiskLink(
            source, Arena(MemorySlot, n_slots), streams=streams, chunk_bytes=CHUNK
        ),
        record_bytes=records.record_bytes,
        journal=[],
        observers=[live],
    ) as session:
        drive(session, passes)
        journal = session.cache.journal
        assert session._live._streams.guesses == set()
    assert journal is not None
    workload = trace_of(tmp_path / "live.parquet", passes, context, 2)
    cache = ExpertCache(context, policy.build(context), observers=[again])
    replay_journal(cache, map(workload.step, range(workload.n_steps)), journal)
    assert again.events == live.events


@pytest.mark.slow
def test_text_does_not_depend_on_how_experts_travel(tmp_path: Path) -> None:
    store = pack(resolve("tiny"), tmp_path / "store")
    policy, texts = find_policy("lru-spec"), set()
    for host_records, chunk_bytes in ((64, 0), (64, 65536), (4, 40960), (30, 0), (None, 40960)):
        host_bytes = None if host_records is None else host_records * store.record_bytes
        chosen = Settings(
            policy, slots=2, streams=2, host_bytes=host_bytes, chunk_bytes=chunk_bytes
        )
        with Runner(store, chosen) as runner:
            texts.add(generate(runner, "It was the best", Sampling(max_new_tokens=12)))
    assert len(texts) == 1
