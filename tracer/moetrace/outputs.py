"""Where a trace can be written."""

from __future__ import annotations

from pathlib import Path

from moepolicy.console import NOTHING_KEPT
from moepolicy.outputs import check_free, check_suffix


def check_out(out: Path, *, resume: bool, force: bool) -> None:
    """CommandError where no trace can be written to ``out``, before any work is done for it.

    What there is to be resumed, or that there is nothing, is for the writer to tell.
    """
    from moeroute.parquet import partial_folder

    check_suffix(out, [".parquet"])
    unfinished = partial_folder(out).is_dir()
    check_free(out, force=force or (resume and not unfinished))


def unfinished(out: Path) -> str:
    """What an interrupted recording to ``out`` leaves."""
    from moeroute.parquet import partial_folder

    if not partial_folder(out).is_dir():
        return NOTHING_KEPT
    return f"{out} is unfinished: the same command with --resume goes on"
