"""Writing and reading back; what is refused; what a kill leaves behind."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moeroute import Rows, Trace, TraceError, TraceMeta, TraceWriter, open_trace
from moeroute.naming import sha256_of
from support.tracekit import leave_unfinished, make_meta, make_rows, write

TESTS = Path(__file__).parents[1]


def assert_holds(trace: Trace, rows: Rows) -> None:
    columns = rows.columns()
    assert trace.columns == tuple(columns)
    assert trace.n_rows == len(rows)
    for name, column in columns.items():
        found = trace.array(name)
        assert found.dtype == column.dtype
        np.testing.assert_array_equal(found, column)


@st.composite
def traces(draw: st.DrawFn) -> tuple[TraceMeta, Rows, list[int]]:
    n_experts = draw(st.integers(1, 9))
    meta = make_meta(
        n_layers=draw(st.integers(1, 4)),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        horizon=draw(st.integers(0, 3)),
        notes=draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)),
        layer_bytes=draw(st.none() | st.integers(1, 10**12)),
    )
    rows = make_rows(
        meta, draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 9))
    )
    absent = draw(st.sets(st.sampled_from(["token_id", "weights", "router_logits", "input_norm"])))
    none: dict[str, Any] = dict.fromkeys(absent)
    rows = replace(rows, **none)
    if draw(st.booleans()):
        residency = (rows.experts % 3).astype(np.uint8)
        rows = replace(rows, residency=residency, loaded_bytes=rows.experts.astype(np.uint32) * 7)
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    return meta, rows, [0, *cuts, len(rows)]


@settings(max_examples=40, deadline=None)
@given(traces())
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[TraceMeta, Rows, list[int]]
) -> None:
    meta, rows, cuts = case
    path = tmp_path_factory.mktemp("trace") / "t.parquet"
    with TraceWriter(path, meta) as writer:
        for start, stop in pairwise(cuts):
            writer.write(rows.slice(start, stop))
            if start % 2:
                writer.flush()
    trace = open_trace(path)
    assert trace.meta == meta
    assert_holds(trace, rows)
    trace.validate()
    assert [entry.name for entry in path.parent.iterdir()] == ["t.parquet"]


def test_reads_only_the_rows_and_columns_asked_for(tmp_path: Path) -> None:
    meta = make_meta(horizon=1)
    rows = make_rows(meta)
    write(tmp_path / "t.parquet", meta, rows)
    part = open_trace(tmp_path / "t.parquet").arrays("layer", "experts", start=4, stop=9)
    assert list(part) == ["layer", "experts"]
    np.testing.assert_array_equal(part["experts"], rows.experts[4:9])


def _interrupt(path: Path, meta: TraceMeta, rows: Rows) -> None:
    with TraceWriter(path, meta) as writer:
        writer.write(rows)
        raise KeyboardInterrupt


def test_an_exception_leaves_what_was_written_to_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    meta = make_meta(horizon=2)
    first, second = make_rows(meta, 2), make_rows(meta, 2, first=2)
    with pytest.raises(KeyboardInterrupt):
        _interrupt(path, meta, first)
    assert not path.exists()
    with pytest.raises(TraceError, match=r"t\.parquet\.partial is an unfinished one"):
        open_trace(path)
    with TraceWriter(path, meta, resume=True) as writer:
        assert (writer.resumed_rows, writer.last_sequence, writer.last_position) == (30, 1, 4)
        writer.write(second)
    both = {n: np.concatenate([c, second.columns()[n]]) for n, c in first.columns().items()}
    for name, column in both.items():
        np.testing.assert_array_equal(open_trace(path).array(name), column)
    with pytest.raises(TraceError, match="nothing to resume"):
        TraceWriter(path, meta, resume=True)


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    leave_unfinished(path, make_meta(), make_rows(make_meta()))
    with pytest.raises(TraceError, match="begun with seed 7, not 8"):
        TraceWriter(path, make_meta(seed=8), resume=True)
    write(path, make_meta(seed=8), make_rows(make_meta(), 1))  # not resumed: starts over
    assert open_trace(path).n_rows == 15


def test_resuming_over_a_damaged_part_names_it(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    leave_unfinished(path, make_meta(), make_rows(make_meta()))
    part = next((tmp_path / "t.parquet.partial").glob("part-*"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(TraceError, match=part.name):
        TraceWriter(path, make_meta(), resume=True)


@pytest.mark.parametrize("change", ["a byte of a value", "bytes lost in the middle"])
def test_a_part_with_changed_values_or_offsets_is_refused_before_polars_reads_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], change: str
) -> None:
    """polars took changed values, and printed its own lines where offsets were wrong."""
    path = tmp_path / "t.parquet"
    leave_unfinished(path, make_meta(), make_rows(make_meta()))
    part = next((tmp_path / "t.parquet.partial").glob("part-*"))
    right = part.read_bytes()
    middle = len(right) // 2
    part.write_bytes(
        right[:middle] + bytes([right[middle] ^ 1]) + right[middle + 1 :]
        if change == "a byte of a value"
        else right[:middle] + right[middle + 64 :]
    )
    with pytest.raises(TraceError, match=rf"{part.name}: is damaged .*remove .*\.partial to start"):
        TraceWriter(path, make_meta(), resume=True)
    assert capfd.readouterr() == ("", "")


def test_a_part_of_an_earlier_moetrace_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    path, rows = tmp_path / "t.parquet", make_rows(make_meta())
    leave_unfinished(path, make_meta(), rows)
    part = next((tmp_path / "t.parquet.partial").glob("part-*"))
    part.rename(part.with_name("part-000000.arrow"))
    with TraceWriter(path, make_meta(), resume=True) as writer:
        assert writer.resumed_rows == len(rows)
    assert open_trace(path).n_rows == len(rows)


def test_a_part_that_is_missing_is_told(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    leave_unfinished(path, make_meta(), make_rows(make_meta()))
    part = next((tmp_path / "t.parquet.partial").glob("part-*"))
    part.rename(part.with_name(part.name.replace("000000", "000001")))
    with pytest.raises(TraceError, match=r"000001-.*: the part before it is missing"):
        TraceWriter(path, make_meta(), resume=True)


@pytest.mark.parametrize("meta", [b"\xff", b"{", b"[]", b'{"format_version": 1}', b"9" * 5000])
def test_resuming_over_a_damaged_description_says_what_to_do(tmp_path: Path, meta: bytes) -> None:
    path = tmp_path / "t.parquet"
    leave_unfinished(path, make_meta(), make_rows(make_meta()))
    (tmp_path / "t.parquet.partial/meta.json").write_bytes(meta)
    with pytest.raises(TraceError, match=r"cannot resume: meta\.json: .*; remove it to start over"):
        TraceWriter(path, make_meta(), resume=True)


def test_a_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "t.parquet.partial").mkdir()
    (tmp_path / "t.parquet.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(TraceError, match="in the way"):
        TraceWriter(tmp_path / "t.parquet", make_meta())
    assert (tmp_path / "t.parquet.partial" / "thesis.txt").read_text() == "mine"


def test_no_rows_make_no_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no rows"), TraceWriter(tmp_path / "t", make_meta()):
        pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(TraceError, match="does not exist"):
        TraceWriter(tmp_path / "gone" / "t", make_meta())


def _write_until_told(path: str, finish: str) -> None:
    """The child: one sequence after the other, each flushed, its number printed."""
    meta = make_meta(horizon=1, n_layers=8)
    with TraceWriter(path, meta, resume=True) as writer:
        for sequence in range(10**6 if finish == "never" else 300):
            writer.write(make_rows(meta, 1, 50, seed=sequence, first=sequence))
            if finish == "never":
                writer.flush()
                print(sequence, flush=True)
        print("closing", flush=True)


def _child(path: Path, finish: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(path), finish]
    modules = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": modules}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def test_a_killed_recording_resumes_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    child = _child(path, "never")
    assert child.stdout is not None
    while child.stdout.readline().strip() != "4":
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not path.exists()
    meta = make_meta(horizon=1, n_layers=8)
    with TraceWriter(path, meta, resume=True) as writer:
        last = writer.last_sequence
        assert last is not None
        assert last >= 4
        assert writer.resumed_rows == (last + 1) * 50 * 8
        writer.write(make_rows(meta, 1, 50, seed=last + 1, first=last + 1))
    trace = open_trace(path)
    trace.validate()
    expected = [make_rows(meta, 1, 50, seed=i, first=i).experts for i in range(last + 2)]
    np.testing.assert_array_equal(trace.array("experts"), np.concatenate(expected))


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.1])
def test_a_kill_while_closing_leaves_all_or_nothing(tmp_path: Path, delay_s: float) -> None:
    path = tmp_path / "t.parquet"
    child = _child(path, "soon")
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "closing"
    time.sleep(delay_s)
    child.kill()
    child.wait()
    if path.exists():
        open_trace(path).validate()
    else:
        with pytest.raises(TraceError, match="there is no such trace"):
            open_trace(path)


def _write_with_little_room(path: Path, limit_bytes: int) -> str:
    """What a process says that writes nine parts of about 13 kB and may fill no file further."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(TESTS)!r})
from support.tracekit import make_meta, make_rows
from moeroute import TraceError, TraceWriter
import polars
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, resource.RLIM_INFINITY))
try:
    with TraceWriter({str(path)!r}, make_meta()) as writer:
        for sequence in range(9):
            writer.write(make_rows(make_meta(), 1, 99, sequence, sequence))
            writer.flush()
except TraceError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_is_told_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    said = _write_with_little_room(tmp_path / "t.parquet", 4096)
    assert str(tmp_path / "t.parquet") in said
    assert "File too large" in said
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_at_the_end_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    assert "File too large" in _write_with_little_room(path, 20_000)
    assert not path.exists()
    assert not list(tmp_path.rglob("*.tmp"))
    write(path, make_meta(), resume=True)
    open_trace(path).validate()
    assert open_trace(path).n_rows == 9 * 99 * 3


if __name__ == "__main__":
    _write_until_told(*sys.argv[1:])


def test_one_process_at_a_time_writes_a_trace(tmp_path: Path) -> None:
    path, meta = tmp_path / "t.parquet", make_meta()
    rows = make_rows(meta)
    with TraceWriter(path, meta) as first:
        first.write(rows)
        first.flush()
        for resume in (False, True):
            with pytest.raises(
                TraceError, match=r"t\.parquet\.partial: another process is writing"
            ):
                TraceWriter(path, meta, resume=resume)
    assert_holds(open_trace(path), rows)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_trace_is_given_up_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed meanwhile, its beginning is what can be resumed."""
    path, meta = tmp_path / "t.parquet", make_meta()
    rows = make_rows(meta)
    half = len(rows) // 2 // meta.n_layers * meta.n_layers
    writer = TraceWriter(path, meta)
    for start, stop in ((0, half), (half, len(rows))):
        writer.write(rows.slice(start, stop))
        writer.flush()
    gone: list[str] = []
    unlink = Path.unlink

    def noted(self: Path, missing_ok: bool = False) -> None:
        gone.append(self.name)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", noted)
    writer.discard()
    assert [name[:11] for name in gone[:3]] == ["part-000001", "part-000000", "meta.json"]
    assert not list(tmp_path.iterdir())


def test_a_file_that_ends_while_its_digest_is_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.bin"
    path.write_bytes(b"x" * 100)
    assert sha256_of(path) == hashlib.sha256(b"x" * 100).digest()
    real = os.fstat

    def longer(fd: int) -> os.stat_result:
        found = list(real(fd))
        found[6] += 1  # the size
        return os.stat_result(found)

    monkeypatch.setattr("moeroute.naming.os.fstat", longer)
    with pytest.raises(TraceError, match=r"f\.bin: was cut off while it was read"):
        sha256_of(path)
