"""`moesim sweep`: every point of a grid, on all cores or a Ray cluster."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy.apps import Force
from moepolicy.completion import among, known_policies
from moepolicy.console import FAILED, CommandError, say
from moepolicy.outputs import Output, check_free
from moepolicy.progress import Bar
from moepolicy.tables import Format
from moeroute.options import SizeOptions

from moesim.commands.grid_options import AxisOptions, ExpertSizeAxes, RunOptions
from moesim.commands.plot import PlotOptions

if TYPE_CHECKING:
    from moesim.sweep.run import SweepReport

SHOWN_FAILURES = 10
LOG_EVERY_S = 60.0


def sweep(
    out: Annotated[
        str,
        typer.Option(
            help="Where to write the result, one row a point: a file whose suffix says the format "
            "(.parquet, .csv, .json), or a URL that polars can write Parquet to."
        ),
    ],
    policies: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="POLICY",
            help="Policies, as for compare. Every axis can also come from --grid; what is given "
            "on the command line takes its place.",
            show_default=False,
            autocompletion=among(known_policies),
        ),
    ] = None,
    *,
    axes: AxisOptions,
    running: RunOptions,
    plot: PlotOptions,
    force: Force = False,
    format: Annotated[Format, typer.Option(help="How to print the best policies.")] = Format.table,
    experts: ExpertSizeAxes,
    sizes: SizeOptions,
) -> None:
    """Simulate every combination of policies, cache sizes and machines.

    Try: moesim sweep lru lru-spec --param lru-spec:n=1,2 --slots 2,4,6 --machine t4,rtx3060 --out
    r.parquet

    Scopes, precisions, traces and policy parameters are axes, too. Finished points survive
    whatever happens: the same command with --resume goes on from them, also with another grid. The
    result does not depend on the number of workers.
    """
    from moesim.pictures.tables import swept
    from moesim.sweep.grid import load_grid, make_grid, merge
    from moesim.sweep.results import suffix_of
    from moesim.sweep.run import run_sweep

    flags = {"policies": policies, **axes.entries(), **experts.entries(), **asdict(sizes)}
    given = {name: value for name, value in flags.items() if value or value is False}
    grid = make_grid(merge(load_grid(axes.grid) if axes.grid else {}, given))
    suffix_of(out)
    plot.check(force=force)
    if not running.resume:
        _check_free(out, force=force)
    began = time.monotonic()
    with _Show() as show:
        report = run_sweep(grid, out, running.settings(), show.watcher)
    plot.write(lambda: swept(report.rows), "A sweep")
    _conclude(report, out, format, time.monotonic() - began)
    # A policy that cannot run on a trace or machine leaves its rows empty, as in a comparison.
    if len(report.failures) > report.refused:
        raise typer.Exit(FAILED)


def _check_free(out: str, *, force: bool) -> None:
    """CommandError where a finished sweep, or another file, would be replaced."""
    from moeroute.parquet import is_url

    from moesim.sweep.results import read_finished

    if not is_url(out):
        check_free(Path(out), force=force)
    elif not force and (points := len(read_finished(out))):
        raise CommandError(
            f"--out {out} exists already, a finished sweep of {points:,} points: --resume goes on "
            "from it, --force replaces it"
        )


class _Show:
    """How far a sweep is: a bar on a terminal. A log gets a line a minute, as a sweep runs for
    hours where nobody sees more of it than that."""

    def __init__(self) -> None:
        from moesim.sweep.loop import Watcher

        self.bar = Bar("simulating", 0, "point")
        self.watcher = Watcher(advance=self._advance, say=say)
        self._began = self._logged = time.monotonic()

    def __enter__(self) -> _Show:
        self.bar.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.__exit__(*exception)

    def _advance(self, done: int, total: int, workers: int) -> None:
        self.bar.update(done, total, f"simulating on {workers} workers")
        now = time.monotonic()
        if not self.bar.shown and now - self._logged > LOG_EVERY_S:
            self._logged = now
            left_s = (now - self._began) / done * (total - done) if done else None
            when = "" if left_s is None else f", {left_s / 60:.0f} min left"
            say(f"{done} of {total} points on {workers} workers{when}")


def _conclude(report: SweepReport, out: str, format: Format, took_s: float) -> None:
    """The best policies on stdout; on stderr what failed, and what there is now."""
    from moesim.sweep.summary import best, table

    if report.failures:
        say(f"{len(report.failures)} of {len(report.rows)} points failed:")
    for name, error in list(report.failures.items())[:SHOWN_FAILURES]:
        say(f"  {name}: {error}")
    if len(report.failures) > SHOWN_FAILURES:
        say(f"  and {len(report.failures) - SHOWN_FAILURES} more: see column error")
    earlier = f", {report.kept} finished before" if report.kept else ""
    say(f"{out}: {len(report.rows)} points; {report.ran} run in {took_s:.1f} s{earlier}")
    found = best(report.rows)
    if found:
        Output(format, None).deliver(found, lambda: table(found))
