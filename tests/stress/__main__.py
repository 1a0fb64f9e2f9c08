"""``python -m stress CAMPAIGN``: the campaigns, from the folder tests."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moepolicy.tables import Table

from stress import bad_files, policies
from stress import fuzz as fuzzing
from stress.campaign import Campaign, jobs
from stress.faults import Faults
from stress.kills import Kills
from stress.limits import Limits
from stress.long import Long
from stress.pairs import Pairs
from stress.plans import Plans
from stress.powercuts import PowerCuts
from stress.schedules import main as run_schedules
from stress.server import run as load_server

ALONE = ("server", "schedules", "pairs", "limits")  # which no workers share
UNNAMED = ("plans", "server", "schedules")  # of which none has a name
SHARES = {"files": bad_files.SHARES, "policies": policies.SHARES}


def small_jobs(arguments: argparse.Namespace) -> int:
    """Run a campaign of small jobs as far as the time goes; 1 where one found a fault."""
    kind = arguments.kind
    campaign = Campaign(arguments.out, arguments.seed, kind)
    campaign.run(
        jobs(arguments.count, arguments.seed, SHARES[kind], tuple(arguments.only)),
        workers=arguments.workers,
        minutes=arguments.minutes,
    )
    _print(campaign.rows())
    for fault in campaign.faults:
        told = fault.told.strip().splitlines() or [""]
        print(f"{fault.outcome}: {fault.case} {fault.number}: {told[-1][:300]}", file=sys.stderr)
    return int(bool(campaign.faults))


def kills(arguments: argparse.Namespace) -> int:
    """Kill commands as long as the time goes; 1 where one did not end as if undisturbed."""
    campaign = Kills(arguments.out, arguments.seed)
    names, workers = tuple(arguments.only), arguments.workers
    campaign.run(arguments.count, minutes=arguments.minutes, names=names, workers=workers)
    return _told(campaign, lambda ended: f"{ended.work} {ended.number}: {ended.fault.strip()}")


def faults(arguments: argparse.Namespace) -> int:
    """Let calls fail by number; 1 where one was neither refused in one line nor borne."""
    campaign = Faults(arguments.out, arguments.seed)
    names, workers = tuple(arguments.only), arguments.workers
    campaign.run(arguments.count, minutes=arguments.minutes, names=names, workers=workers)
    return _told(
        campaign,
        lambda failed: (
            f"{failed.work} {failed.number}, {failed.kind} {failed.path} {failed.way}: "
            f"{failed.told.strip()}"
        ),
    )


def powercuts(arguments: argparse.Namespace) -> int:
    """Cut the power at every call; 1 where something was lost or half there."""
    campaign = PowerCuts(arguments.out, arguments.seed)
    names, workers = tuple(arguments.only), arguments.workers
    campaign.run(arguments.count, minutes=arguments.minutes, names=names, workers=workers)
    return _told(campaign, lambda cut: f"{cut.work} {cut.number} {cut.model}: {cut.fault.strip()}")


def plans(arguments: argparse.Namespace) -> int:
    """Run random memory plans; 1 where one took more than its budget."""
    campaign = Plans(arguments.out, arguments.seed)
    campaign.run(arguments.count, minutes=arguments.minutes, workers=arguments.workers)
    _print(campaign.rows())
    for planned in campaign.faults:
        what = planned.told or f"{planned.peak_bytes} of {planned.budget_bytes} bytes"
        print(f"{planned.ended} {planned.number}: {what}", file=sys.stderr)
        print(f"  {' '.join(planned.command)}", file=sys.stderr)
    return int(bool(campaign.faults))


def schedules(arguments: argparse.Namespace) -> int:
    """Run random schedules; 1 where one computed something wrong, or hung."""
    campaign = run_schedules(arguments.out, arguments.seed, arguments.count, arguments.minutes)
    return _told(campaign, lambda ran: f"seed {ran.seed}, {ran.failing} fails: {ran.fault}")


def pairs(arguments: argparse.Namespace) -> int:
    """Run commands two at a time; 1 where they got into each other's way."""
    campaign = Pairs(arguments.out, arguments.seed)
    campaign.run(arguments.count, minutes=arguments.minutes, names=tuple(arguments.only))
    return _told(campaign, lambda paired: f"{paired.work} {paired.number}: {paired.fault.strip()}")


def limits(arguments: argparse.Namespace) -> int:
    """Run commands under limits of memory; 1 where one ended in another way than in one line."""
    campaign = Limits(arguments.out, arguments.seed)
    campaign.run(arguments.count, minutes=arguments.minutes, names=tuple(arguments.only))
    return _told(
        campaign, lambda limited: f"{limited.work}, {limited.limit_mib} MiB: {limited.told.strip()}"
    )


def server(arguments: argparse.Namespace) -> int:
    """Load a server; 1 where a request was lost, or something else was wrong."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    seen, figures = load_server(
        arguments.out.resolve(), arguments.seed, minutes=arguments.minutes, crowd=arguments.count
    )
    _print([{name: str(value) for name, value in figures.items()}])
    for fault in seen.faults:
        print(fault, file=sys.stderr)
    return int(bool(seen.faults))


def long(arguments: argparse.Namespace) -> int:
    """Run long simulations, and the bundled model for long; 1 where something was wrong."""
    campaign = Long(arguments.out, arguments.seed)
    if "live" not in arguments.only:
        campaign.simulated(arguments.count, minutes=arguments.minutes)
    if "simulated" not in arguments.only:
        campaign.live(arguments.live_tokens, arguments.piece, minutes=arguments.minutes)
    return _told(campaign, lambda ran: f"{ran.what}: {ran.fault.strip()[-500:]}")


def fuzz(arguments: argparse.Namespace) -> int:
    """Fuzz our own parsers; 1 where one failed in another way than a refusal."""
    rows = fuzzing.run(
        arguments.out, tuple(arguments.only), minutes=arguments.minutes, seed=arguments.seed
    )
    _print(rows)
    return int(any(row["faults"] for row in rows))


def _told(campaign: Any, say: Callable[[Any], str]) -> int:
    """Print a campaign's rows, and on stderr its faults; 1 where there are any."""
    _print(campaign.rows())
    for fault in campaign.faults:
        print(say(fault), file=sys.stderr)
    return int(bool(campaign.faults))


def _print(rows: list[dict[str, str | int]]) -> None:
    first, *others = rows[0]
    table = Table([first], others)
    for row in rows:
        table.add_row(*map(str, row.values()))
    print(table.render())


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m stress", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, run, what, count in (
        ("files", small_jobs, "give every command wrong files to read", 10_000),
        ("policies", small_jobs, "run policies that misbehave", 5_000),
        ("kills", kills, "kill commands and take them up", 1_000),
        ("faults", faults, "let every call on a file fail", 1_000_000),
        ("powercuts", powercuts, "cut the power at every call, and run on", 500),
        ("plans", plans, "run random memory plans", 1_000),
        ("fuzz", fuzz, "change bytes by what code of ours they reach (atheris)", 0),
        ("limits", limits, "run commands under limits of memory", 500),
        ("schedules", schedules, "serve and resize under random schedules", 10_000),
        ("pairs", pairs, "run commands two at a time on the same files", 200),
        ("server", server, "load a server; COUNT clients stall at once", 1_000),
        ("long", long, "simulate many tokens, and generate many", 1_000_000),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--out", type=Path, required=True, help="folder of the journal")
        command.add_argument("--count", type=int, default=count, help="how many in all")
        command.add_argument("--minutes", type=float, default=60.0, help="the time budget")
        command.add_argument("--seed", type=int, default=0)
        if name not in ALONE:
            command.add_argument("--workers", type=int, default=os.cpu_count() or 1)
        if name == "long":
            command.add_argument("--live-tokens", type=int, default=100_000)
            command.add_argument("--piece", type=int, default=4_000, help="live tokens a process")
        if name not in UNNAMED:
            command.add_argument("--only", action="append", default=[], help="a case, by name")
        command.set_defaults(run=run, kind=name)
    arguments = parser.parse_args()
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
