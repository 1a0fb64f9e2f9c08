"""Traces from foreign formats: what fits the schema is kept, what does not is told in the notes.

To add a format, add a module that reads a file into a Recording, and its row to `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moeroute.foreign import PARQUET, Source
from moeroute.importers import bigmoe, npz
from moeroute.importers.recording import Recording
from moeroute.schema import TraceError
from moeroute.sizes import NO_SIZES, GivenSizes
from moeroute.trace import Trace, is_trace

__all__ = ["FORMATS", "ForeignFormat", "import_bigmoe_csv", "import_foreign", "import_npz"]


@dataclass(frozen=True)
class ForeignFormat:
    """A format that can be imported."""

    name: str
    detect: Callable[[Source], bool]
    read: Callable[[Source, str | None], Recording]
    """Reads a file whose model the caller names, or None. Raises TraceError."""


FORMATS = (
    ForeignFormat("routing .npz (arrays ids, seq, pos, phase)", npz.detect, npz.read),
    ForeignFormat(
        f"BigMoeOnEdge route CSV (first line {bigmoe.TITLE!r})", bigmoe.detect, bigmoe.read
    ),
)


def import_foreign(
    path: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    sizes: GivenSizes = NO_SIZES,
    tell: Callable[[str], None] | None = None,
) -> Trace:
    """Import a file of any known format, told by its content, and open the result.

    `tell` is called with one line for each thing that the import changed, dropped or could not
    know; the trace's notes hold them, too. `model` defaults to what the file says, or its name;
    `sizes` are what its recorder did not say of the model.
    Raises TraceError if the format is none of FORMATS, or naming the place of what is wrong.
    """
    source = Source(Path(path))
    for known in FORMATS:
        if known.detect(source):
            return _write(known.read(source, model), out, sizes, tell)
    if source.kind == PARQUET and not source.is_packed and is_trace(source.path):
        raise TraceError(f"{path}: is a trace already and needs no import")
    raise TraceError(
        f"{path}: {source.described}: not a format that can be imported; there are: "
        + "; ".join(known.name for known in FORMATS)
    )


def import_npz(
    path: str | Path, out: str | Path, *, model: str | None = None, sizes: GivenSizes = NO_SIZES
) -> Trace:
    """Import an .npz of routing (see `npz.read`) and open the result. Raises TraceError."""
    return _write(npz.read(Source(Path(path)), model), out, sizes)


def import_bigmoe_csv(
    path: str | Path, out: str | Path, *, model: str | None = None, sizes: GivenSizes = NO_SIZES
) -> Trace:
    """Import a BigMoeOnEdge route CSV (see `bigmoe.read`) and open it. Raises TraceError."""
    return _write(bigmoe.read(Source(Path(path)), model), out, sizes)


def _write(
    recording: Recording,
    out: str | Path,
    sizes: GivenSizes,
    tell: Callable[[str], None] | None = None,
) -> Trace:
    if Path(out).exists() and recording.path.samefile(out):
        raise TraceError(f"{out}: is the file to import; give --out another name")
    recording.meta = sizes.on(recording.meta)
    for name, note in recording.meta.notes.items():
        recording.findings.note(name, note)
    trace = recording.write(out)
    if tell is not None:
        for line in recording.findings.lines():
            tell(line)
    return trace
