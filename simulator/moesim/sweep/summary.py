"""The best policy of each setting of a sweep, as a table for people or rows for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepolicy.amounts import cache_of
from moepolicy.lossy import CHANGES, MARKED, OPEN_LOOP, changed, marked
from moepolicy.tables import Table, wrapped

from moesim.machine.unknown import size_notes
from moesim.report import per_second, percent

SETTING = ("trace_path", "scope", "precision", "expert_bytes", "machine", "memory_bytes")

Row = dict[str, Any]


def best(rows: Sequence[Row]) -> list[Row]:
    """For each setting the policy with the most tokens/s, and the runner-up. Where there are no
    times, because the size of an expert is unknown, the policy with the fewest loads.

    Policies that know the future cannot be chosen: ``clairvoyant_tokens_per_s`` shows the best of
    them. A policy that changes what the model computes is named only where there is no other.
    """
    settings: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            # With a budget, the slots are what the policy's staging leaves of it.
            slots = row["slots"] if row["memory_bytes"] is None else None
            settings.setdefault((*(row[name] for name in SETTING), slots), []).append(row)
    return [_best_of(group) for group in settings.values()]


def _best_of(rows: list[Row]) -> Row:
    timed = all(row["tokens_per_s"] is not None for row in rows)
    ranked = sorted(rows, key=lambda row: -row["tokens_per_s"] if timed else row["loads"])
    clairvoyant = [row for row in ranked if row["needs_future"]]
    live = [row for row in ranked if not row["needs_future"]]
    exact = [row for row in live if not row["lossy"]]
    first, *others = exact or live or ranked
    second = others[0] if others else None
    return {
        **{name: first[name] for name in SETTING},
        "slots": first["slots"],
        "policy": first["policy"],
        "lossy": first["lossy"],
        **{name: first.get(name) for name in CHANGES},
        "tokens_per_s": first["tokens_per_s"],
        "time_is_lower_bound": first["time_is_lower_bound"],
        "layer_bytes": first["layer_bytes"],
        "token_bytes": first["token_bytes"],
        "hit_ratio": first["hit_ratio"],
        "loads": first["loads"],
        "limit_loads": first["limit_loads"],
        "limit_tokens_per_s": first["limit_tokens_per_s"],
        "share_of_limit": first["share_of_limit"],
        "gap_closed_time": first.get("gap_closed_time"),
        "second": second and second["policy"],
        "second_lossy": second and second["lossy"],
        "second_tokens_per_s": second and second["tokens_per_s"],
        "clairvoyant_tokens_per_s": clairvoyant[0]["tokens_per_s"] if clairvoyant else None,
    }


def table(rows: Sequence[Row]) -> str:
    """The rows of ``best`` for people; columns with one value throughout go into the title."""
    shown = {
        "trace_path": "trace",
        "machine": "machine",
        "precision": "precision",
        "scope": "scope",
        "memory_bytes": "memory",
        "slots": "slots",
    }
    varied = [name for name in shown if len({row[name] for row in rows}) > 1 or name == "slots"]
    fixed = [
        cache_of(value) if name == "scope" else f"{shown[name]} {_cell(name, value)}"
        for name, value in ((name, rows[0][name]) for name in shown)
        if name not in varied and value is not None
    ]
    names = ["best policy", "tokens/s", "hit %", "x limit", "limit %", "gap %", "second", "by %"]
    result = Table(
        [shown[name] for name in varied],
        names,
        left=["best policy", "second"],
        right=["slots", "memory"],
    )
    for row in rows:
        result.add_row(*(_cell(name, row[name]) for name in varied), *_scores(row))
    title = f"Best simulated tokens/s: {', '.join(fixed)}."
    notes = _changes(rows) + size_notes(rows)
    if any(row["tokens_per_s"] is None for row in rows):
        notes.append("  (there the best policy is that with the fewest loads)")
    return f"{wrapped([title])}\n{result.render()}{wrapped(notes)}"


def _changes(rows: Sequence[Row]) -> list[str]:
    """What the marks of policies stand for, and the range of what each of the best changed."""
    if not any(row["lossy"] or row["second_lossy"] for row in rows):
        return []
    notes = [MARKED]
    lossy = [row for row in rows if row["lossy"]]
    for policy in dict.fromkeys(row["policy"] for row in lossy):
        own = [row for row in lossy if row["policy"] == policy]
        most = {name: max(row[name] or 0.0 for row in own) for name in CHANGES}
        notes.append(f"  {_short(policy)}: {changed(most)}" + " at most" * (len(own) > 1))
        if most["rerouted_share"]:
            notes.append(f"  {_short(policy)}: {OPEN_LOOP}")
    return notes


def _scores(row: Row) -> list[str]:
    lead = ""
    if row["second"] and row["tokens_per_s"] is not None:
        lead = f"{100 * (row['tokens_per_s'] / row['second_tokens_per_s'] - 1):.1f}"
    limit, share = row["limit_loads"], row["share_of_limit"]
    return [
        marked(_short(row["policy"]), row["lossy"]),
        per_second(row["tokens_per_s"]),
        f"{100 * row['hit_ratio']:.1f}",
        f"{row['loads'] / limit:.2f}" if limit else "",
        "" if share is None else f"{100 * share:.1f}",
        percent(row["gap_closed_time"]),
        marked(_short(row["second"] or ""), bool(row["second_lossy"])),
        lead,
    ]


def _short(policy: str) -> str:
    """A policy from a file without the file's folder."""
    path, mark, rest = policy.rpartition(".py:")
    return f"{Path(path).name}{mark}{rest}"


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{value / 2**30:.2f} GiB" if name == "memory_bytes" else str(value)
