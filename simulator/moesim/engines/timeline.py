"""Timelines as Chrome trace events, which https://ui.perfetto.dev opens.

Each simulated run is a process; compute, every copy stream, the disk and every CPU worker are
its threads. Times are the simulated ones.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from moepolicy.outputs import written_whole

from moesim.engines.clock import COMPUTE_LANE, CPU_LANE, DISK_LANE, LINK_LANE, Segment

NAMES = {COMPUTE_LANE: "compute", LINK_LANE: "copy stream", DISK_LANE: "disk", CPU_LANE: "CPU"}
SUFFIXES = (".json", ".json.gz")
LANE_THREADS = 100  # thread numbers of a lane: more than it has units


def write_timeline(
    path: Path,
    runs: Iterable[tuple[str, list[Segment]]],
    *,
    n_experts: int,
    expert_bytes: int,
    piece_bytes: int,
    notes: Sequence[str] = (),
) -> None:
    """Write the segments of (name, segments) runs; gzipped if the name ends in .gz.

    ``piece_bytes`` is what a copy stream's segment carries (the last piece may carry less, and so
    may one of the lower precision). ``notes`` are what its times leave out, kept as metadata.
    """
    with written_whole(path) as partial, _opened(path, partial) as out:
        out.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
        separator = ""
        for process, (name, segments) in enumerate(runs):
            for event in _process(process, name, segments, n_experts, expert_bytes, piece_bytes):
                out.write(separator + json.dumps(event))
                separator = ",\n"
        about = {"notes": " ".join(note.strip() for note in notes)} if notes else {}
        out.write(f'\n], "otherData": {json.dumps(about)}}}\n')


def _opened(path: Path, partial: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(partial, "wt", encoding="utf-8")
    return partial.open("w", encoding="utf-8")


def _process(
    process: int,
    name: str,
    segments: list[Segment],
    n_experts: int,
    expert_bytes: int,
    piece_bytes: int,
) -> Iterator[dict[str, Any]]:
    yield _label("process_name", process, 0, name)
    for lane, unit in sorted({(s.lane, s.unit) for s in segments}):
        thread = lane * LANE_THREADS + unit
        numbered = f" {unit}" if lane in (LINK_LANE, CPU_LANE) else ""
        yield _label("thread_name", process, thread, NAMES[lane] + numbered)
        yield {
            "ph": "M",
            "name": "thread_sort_index",
            "pid": process,
            "tid": thread,
            "args": {"sort_index": thread},
        }
    carried = {LINK_LANE: piece_bytes, DISK_LANE: expert_bytes}
    for segment in segments:
        yield _event(process, segment, n_experts, carried.get(segment.lane))


def _label(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _event(process: int, segment: Segment, n_experts: int, n_bytes: int | None) -> dict[str, Any]:
    """One stretch of a lane; microseconds, with the nanoseconds as decimals."""
    event: dict[str, Any] = {
        "ph": "X",
        "pid": process,
        "tid": segment.lane * LANE_THREADS + segment.unit,
        "ts": segment.begins / 1000,
        "dur": (segment.ends - segment.begins) / 1000,
    }
    if segment.key < 0:
        layer = -1 - segment.key
        return event | {"name": f"layer {layer}", "cat": "layer", "args": {"layer": layer}}
    layer, expert = divmod(segment.key, n_experts)
    what = "demand" if segment.demand else "prefetch"
    arguments = {"layer": layer, "expert": expert}
    event |= {"name": f"expert {layer}.{expert}", "cat": "expert", "args": arguments}
    if n_bytes is not None:
        event |= {"name": f"{what} {layer}.{expert}", "cat": what}
        event["args"] = arguments | {"bytes": n_bytes, "class": what}
        # Reserved colour names of the trace viewer: wanted copies stand out from guesses.
        event["cname"] = "thread_state_running" if segment.demand else "thread_state_sleeping"
    return event
