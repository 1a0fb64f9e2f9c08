"""What a comparison shows: rows for programs, and a table for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

from moepolicy.amounts import counted
from moepolicy.counts import columns
from moepolicy.lossy import MARKED, OPEN_LOOP, changed, marked
from moepolicy.refusals import REFUSED, note, ran, refused_row
from moepolicy.tables import Table, wrapped

from moesim.gap import BASELINE, Gap, gap_of
from moesim.machine.unknown import size_notes
from moesim.result import Result


@dataclass(frozen=True)
class RefusedPoint:
    """A row of a policy that could not run on the trace, cache or machine, and why."""

    policy: str
    slots: int
    scope: str
    machine: str
    trace: str
    refused: str

    def row(self) -> dict[str, Any]:
        """The columns of a comparison, empty but for what was asked for and the reason."""
        asked = asdict(self)
        return refused_row(
            [*columns(Result), *Gap("", None, None).row()], asked, asked.pop(REFUSED)
        )


class Compared(NamedTuple):
    """A result and, where limits were asked for, its share of the gap between LRU and them."""

    result: Result
    gap: Gap | None

    @property
    def slots(self) -> int:
        """Slots a layer."""
        return self.result.slots

    def row(self) -> dict[str, Any]:
        """The result, the gaps it closes and no refusal, under the names that every output has."""
        gap = self.gap or Gap(self.result.policy, None, None)
        return ran(self.result.row() | gap.row())


def with_gaps(results: Sequence[Result], baseline: Callable[[int], Result]) -> list[Compared]:
    """Each result with the gap that it closes; ``baseline`` runs LRU at a number of slots."""
    bases = {result.slots: result for result in results if result.policy == BASELINE}
    for result in results:
        if result.slots not in bases:
            bases[result.slots] = baseline(result.slots)
    return [Compared(one, gap_of(bases[one.slots].row(), one.row())) for one in results]


def rows_of(
    results: Sequence[Compared | RefusedPoint], provenance: dict[str, Any]
) -> list[dict[str, Any]]:
    """The results for programs, each row with what it was made from."""
    return [one.row() | provenance for one in results]


def table(results: Sequence[Compared | RefusedPoint], title: str, notes: Sequence[str] = ()) -> str:
    """For people: a group of rows for each number of slots, which ends with what no policy can
    beat, and what there is to say under them, ``notes`` last."""
    limited = any(one.gap is not None for one in results if isinstance(one, Compared))
    names = ["hit %", "late %", "loads", "useless", "stall %", "tokens/s"]
    if limited:
        names.insert(names.index("loads") + 1, "x limit")
        names += ["limit %", "gap %"]
    shown = Table(["policy", "slots"], names, right=["slots"])
    for _, each in groupby(results, key=lambda one: one.slots):
        group = list(each)
        cells = [_cells(one) for one in group]
        ran = [one.result for one in group if isinstance(one, Compared)]
        cells += _limits(ran) if limited else []
        for row in cells:
            shown.add_row(*(row.get(name, "") for name in shown.headings))
        shown.end_section()
    under = wrapped([*_notes(results, limited), *notes])
    return f"{wrapped(title.splitlines())}\n{shown.render()}{under and chr(10)}{under}"


def _cells(one: Compared | RefusedPoint) -> dict[str, str]:
    if isinstance(one, RefusedPoint):
        return {"policy": one.policy, "slots": str(one.slots)}
    result = one.result
    cells = {
        "policy": marked(result.policy, result.lossy),
        "slots": str(result.slots),
        "hit %": f"{100 * result.hit_ratio:.1f}",
        "late %": f"{100 * result.late / result.requests:.1f}",
        "loads": f"{result.loads:,}",
        "useless": f"{result.useless_prefetches:,}",
        "stall %": percent(_stall_share(result)),
        "tokens/s": per_second(result.tokens_per_s),
    }
    if one.gap is not None:
        cells["x limit"] = f"{result.loads / result.limit_loads:.2f}" if result.limit_loads else "-"
        cells["limit %"] = percent(result.share_of_limit)
        cells["gap %"] = percent(one.gap.time)
    return cells


def _stall_share(result: Result) -> float | None:
    if result.stall_s is None or not result.time_s:
        return None
    return result.stall_s / result.time_s


def per_second(tokens_per_s: float | None) -> str:
    """tokens/s as a cell of a table; None is a run without times."""
    return "-" if tokens_per_s is None else f"{tokens_per_s:.2f}"


def percent(share: float | None) -> str:
    """Far below 0 where there is next to no gap: decimals would say nothing there."""
    if share is None:
        return "-"
    return f"{100 * share:.1f}" if abs(share) < 10 else f"{100 * share:.0f}"


def _limits(results: Sequence[Result]) -> list[dict[str, str]]:
    """A row for each limit there is: staging buffers may raise that of policies that have them, and
    a policy that shares the slots out among the layers has limits of its own."""
    return [
        {
            "policy": _limit_name(result),
            "slots": str(result.slots),
            "loads": f"{result.limit_loads:,}",
            "x limit": "1.00",
            "tokens/s": per_second(result.limit_tokens_per_s),
            "limit %": percent(result.limit_tokens_per_s and 1.0),
            "gap %": percent(result.limit_tokens_per_s and 1.0),
        }
        for result in _limiting(results)
    ]


def _limiting(results: Sequence[Result]) -> list[Result]:
    """A result for each limit that differs from the others, with the fewest buffers first."""
    found: dict[tuple[int, str, float | None], Result] = {}
    for result in sorted(results, key=lambda result: result.limit_buffers or 0):
        own = result.policy if result.shares_slots else ""
        found.setdefault((result.slots, own, result.limit_tokens_per_s), result)
    return list(found.values())


def _limit_name(result: Result) -> str:
    name = f"limit+{result.limit_buffers}" if result.limit_buffers else "limit"
    return f"{name} ({result.policy})" if result.shares_slots else name


def _notes(compared: Sequence[Compared | RefusedPoint], limited: bool) -> list[str]:
    results = [one.result for one in compared if isinstance(one, Compared)]
    notes = []
    if limited:
        kept = {
            (result.slots, result.policy if result.shares_slots else ""): result.limit_loads_kept
            for result in results
        }
        each = ", ".join(
            f"{loads:,} at {slots}" + f" ({policy})" * bool(policy)
            for (slots, policy), loads in sorted(kept.items())
        )
        notes = [
            "limit: the fewest loads and the least time that any policy could do with the slots, "
            f"knowing the future; without prefetch and bypass the fewest loads are {each}",
            f"gap %: a token takes longer under {BASELINE} than at the limit; the policy saves so "
            f"much of that time (0: as slow as {BASELINE}, 100: as fast as the limit)",
        ]
        shown = [result for result in _limiting(results) if result.limit_buffers]
        names = sorted(set(map(_limit_name, shown)))
        if names:
            notes.insert(
                1,
                f"  ({', '.join(names)}: the limit of policies that have so many staging buffers "
                "for prefetched experts, in addition to the slots)",
            )
        names = sorted({result.policy for result in results if result.shares_slots})
        if names:
            notes.insert(
                1, f"  (with the slots of each layer as the policy has them: {', '.join(names)})"
            )
        if all(result.policy != BASELINE for result in results):
            notes.append(f"  ({BASELINE} is not among the policies; it was simulated for this)")
    if any(result.lossy for result in results):
        notes.append(MARKED + ": the limit does not apply" * limited)
        notes += [_change_note(result) for result in results if result.lossy]
        notes += _open_loop_notes(results)
    notes += size_notes(result.row() for result in results)
    return notes + _refusals([one for one in compared if isinstance(one, RefusedPoint)])


def _refusals(refused: Sequence[RefusedPoint]) -> list[str]:
    """Why rows are empty: a line for each policy and reason."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for one in refused:
        sizes.setdefault((one.policy, one.refused), []).append(one.slots)
    return [
        note(f"{policy}, {', '.join(map(str, slots))} slot{'' if slots == [1] else 's'}", reason)
        for (policy, reason), slots in sizes.items()
    ]


def _change_note(result: Result) -> str:
    return f"  {result.policy}, {counted(result.slots, 'slot')}: {changed(result.shares)}"


def _open_loop_notes(results: Sequence[Result]) -> list[str]:
    """What a trace cannot answer of policies that gave tokens other experts."""
    routed = dict.fromkeys(result.policy for result in results if result.rerouted)
    return [f"  {policy}: {OPEN_LOOP}" for policy in routed]
