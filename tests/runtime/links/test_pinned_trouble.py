"""The link of a GPU on a device of threads: what fails, is lost or is closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.links import HostTier, Throttle
from moerun.links.arena import Arena
from moerun.links.bus import Pieces
from moerun.links.pinned import PinnedLink
from moerun.store.pack import pack
from support.links import MemoryRecords
from support.pinned import (
    CHUNK,
    N_KEYS,
    RECORD,
    Form,
    Reports,
    Rig,
    dual_slot,
    full_records,
)
from support.thread_device import PATIENCE_S, ThreadDevice


@pytest.mark.parametrize("chunk_bytes", [0, CHUNK])
def test_a_record_whose_checksum_fails_never_arrives(chunk_bytes: int) -> None:
    records = full_records(broken=frozenset({3}))
    with Rig(records, n_bytes=2 * RECORD, chunk_bytes=chunk_bytes) as rig:
        rig.link.submit(3, 0)
        key, error = rig.reports.get(timeout=PATIENCE_S)
        assert key == 3
        assert isinstance(error, RunError)
        assert "expert 3 in store.safetensors" in str(error)
        assert (0, 3) not in rig.queued  # its end has not even crossed
        rig.link.submit(4, 0)
        assert rig.wait() == 4
        rig.check(0, 4)()
        assert rig.link.statistics.copies == 1


@pytest.mark.parametrize("chunk_bytes", [0, CHUNK])
def test_a_read_that_fails_in_the_middle_hands_the_disk_on(chunk_bytes: int) -> None:
    class Failing(MemoryRecords):
        def read_into(
            self, key: int, buffer: torch.Tensor, *, pieces: Pieces | None = None
        ) -> None:
            def cut(n_bytes: int) -> Iterator[slice]:
                assert pieces is not None
                for piece in pieces(n_bytes):
                    if key == 3 and piece.start == 2 * CHUNK:
                        raise RunError("expert 3 could not be read (Input/output error)")
                    yield piece

            super().read_into(key, buffer, pieces=cut)

    records = Failing(N_KEYS, record_bytes=RECORD)
    with Rig(records, n_bytes=2 * RECORD, chunk_bytes=chunk_bytes, streams=2) as rig:
        rig.link.submit(3, 0)
        rig.link.submit(4, 1)
        found = dict(rig.reports.get(timeout=PATIENCE_S) for _ in range(2))
        assert found[4] is None
        assert "Input/output error" in str(found[3])
        rig.check(1, 4)()
        rig.link.submit(5, 0)
        assert rig.wait() == 5
        rig.check(0, 5)()


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_file_is_named_though_its_start_has_crossed(tmp_path: Path, damage: str) -> None:
    store = pack(resolve("tiny"), tmp_path / "tiny")
    where = store.location(9)
    if damage == "flip":
        with where.path.open("r+b") as file:
            file.seek(where.offset + 5)
            file.write(b"\x7f")
    else:
        os.truncate(where.path, where.offset + 8192)
    device = ThreadDevice()
    slots = [Form(torch.zeros(store.record_bytes, dtype=torch.uint8))]
    tier = HostTier(store, 2 * store.record_bytes, read_bytes=CHUNK)
    link = PinnedLink(tier, slots, device)
    reports: Reports = SimpleQueue()
    link.start(lambda key, error, _ended_s: reports.put((key, error)))
    link.submit(9, 0)
    key, error = reports.get(timeout=PATIENCE_S)
    assert (key, type(error)) == (9, RunError)
    assert "expert 1 of layer 1" in str(error)
    assert where.path.name in str(error)
    link.submit(0, 0)
    assert reports.get(timeout=PATIENCE_S) == (0, None)
    expected = torch.empty(store.record_bytes, dtype=torch.uint8)
    store.read_into(0, expected)
    assert torch.equal(slots[0].memory, expected)
    link.close()
    device.end()


@pytest.mark.parametrize(("chunk_bytes", "failing"), [(0, 1), (CHUNK, 4), (CHUNK, 6), (CHUNK, 7)])
def test_a_copy_that_fails_is_reported_once_and_the_link_goes_on(
    chunk_bytes: int, failing: int
) -> None:
    device = ThreadDevice(failing=frozenset({failing}))
    with Rig(full_records(), device=device, chunk_bytes=chunk_bytes) as rig:
        for key, fails in ((1, False), (2, True), (3, False)):
            rig.link.submit(key, 0)
            found, error = rig.reports.get(timeout=PATIENCE_S)
            assert (found, error is not None) == (key, fails)
        rig.check(0, 3)()
        assert rig.reports.empty()
        assert rig.link.statistics.copies == 2


@pytest.mark.parametrize("chunk_bytes", [0, CHUNK])
def test_a_slot_that_cannot_take_its_record_is_reported_and_the_link_goes_on(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rig(full_records(), chunk_bytes=chunk_bytes) as rig:

        def copy(*_: object) -> None:
            raise RunError("copying an expert to cuda:0 failed")

        with monkeypatch.context() as patch:
            patch.setattr(rig.link._streams[0], "copy", copy)
            rig.link.submit(1, 0)
            key, error = rig.reports.get(timeout=PATIENCE_S)
            assert (key, str(error)) == (1, "copying an expert to cuda:0 failed")
        rig.link.submit(2, 0)
        assert rig.wait() == 2
        rig.check(0, 2)()


def test_a_link_that_never_started_can_be_closed() -> None:
    device = ThreadDevice()
    link = PinnedLink(HostTier(full_records()), Arena(dual_slot, 1), device)
    link.close()
    device.end()
    assert device.pinned == []


def test_a_link_whose_device_is_lost_gives_up_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: object) -> None:
        raise RunError("the device is lost")

    monkeypatch.setattr(ThreadDevice, "synchronize", lost)
    rig = Rig(full_records(), n_bytes=2 * RECORD)
    with pytest.raises(RunError, match="lost"):
        rig.link.close()
    assert rig.device.pinned == []
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("link", "reader"))]
    rig.device.end()
    monkeypatch.setattr(ThreadDevice, "new_stream", lost)
    device = ThreadDevice()
    with pytest.raises(RunError, match="lost"):
        PinnedLink(HostTier(full_records()), Arena(dual_slot, 1), device)
    device.end()
    assert device.pinned == []


@pytest.mark.parametrize("n_bytes", [None, 2 * RECORD])
def test_closing_ends_everything_after_the_copies_under_way(n_bytes: int | None) -> None:
    rig = Rig(full_records(), n_bytes=n_bytes, streams=2)
    rig.link.submit(3, 0)
    rig.link.submit(4, 1)
    rig.link.close()
    rig.link.close()
    rig.device.end()
    assert sorted(rig.reports.get_nowait() for _ in range(2)) == [(3, None), (4, None)]
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("link", "reader"))]
    assert rig.device.pinned == []


def test_a_capped_copy_is_not_waited_for_when_closing() -> None:
    rig = Rig(full_records(), throttle=Throttle(bytes_per_s=1.0))  # hours
    rig.link.submit(3, 0)
    rig.link.close()
    rig.device.end()
    assert rig.reports.get_nowait() == (3, None)


def test_memory_that_cannot_be_pinned_or_filled_is_given_back() -> None:
    device = ThreadDevice()
    tier = HostTier(full_records(broken=frozenset({5})))
    with pytest.raises(RunError, match="expert 5 in store"):
        PinnedLink(tier, Arena(dual_slot, 1), device)
    assert device.pinned == []
    device.end()
