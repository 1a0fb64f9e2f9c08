"""The points of a comparison: what ran, and what could not and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moepolicy import Context, PolicyError, PolicySpec, Same
from moepolicy.blame import is_failure
from moepolicy.console import WrongUsage
from moeroute import Trace, TraceError

from moesim.errors import SimulationError, UsageError
from moesim.report import Compared, RefusedPoint, with_gaps
from moesim.result import Result
from moesim.simulation import check_needs

EXPECTED = (PolicyError, SimulationError, TraceError)


class Points:
    """Runs points one after another and keeps their results, or the errors they ended with."""

    def __init__(self, trace: str, scope: str, machine: str) -> None:
        self._where = {"trace": trace, "scope": scope, "machine": machine}
        self._unfit: dict[str, Exception] = {}  # by a policy's label: the trace lacks what it needs
        self._found: list[Result | RefusedPoint] = []
        self._errors: list[Exception] = []
        self.failed = False
        """Whether a policy's own code failed, in addition to those that lacked something."""

    def admits(self, trace: Trace, policy: PolicySpec) -> bool:
        """Whether ``trace`` has what ``policy`` needs; its points are refused if not."""
        try:
            check_needs(trace, policy)
        except TraceError as error:
            self._unfit[policy.label] = error
        return policy.label not in self._unfit

    def run(self, policy: PolicySpec, slots: int, simulate: Callable[[], Result]) -> bool:
        """Whether ``simulate`` gave a result. Raises UsageError: that is of no policy."""
        try:
            if policy.label in self._unfit:
                raise self._unfit[policy.label]
            self._found.append(simulate())
        except UsageError:
            raise
        except EXPECTED as error:
            self._errors.append(error)
            self.failed |= is_failure(error)
            reason = " ".join(str(error).split())
            self._found.append(RefusedPoint(policy.label, slots, **self._where, refused=reason))
            return False
        return True

    def compared(self, baseline: Callable[[int], Result] | None) -> list[Compared | RefusedPoint]:
        """All points in their order, each result with its gap to the limit where there is a
        ``baseline``. Raises what stopped them where none could run."""
        results = [found for found in self._found if isinstance(found, Result)]
        if not results and self._errors:
            raise none_ran(self._errors)
        if baseline is None:
            with_gap = iter([Compared(result, None) for result in results])
        else:
            with_gap = iter(with_gaps(results, baseline))
        return [next(with_gap) if isinstance(f, Result) else f for f in self._found]


def none_ran(errors: Sequence[Exception]) -> Exception:
    """What to raise where every policy was refused."""
    reasons = list(dict.fromkeys(str(error) for error in errors))
    if len(reasons) == 1:
        return errors[0]
    usage = all(isinstance(error, WrongUsage) for error in errors)
    kind = UsageError if usage else SimulationError
    return kind(f"none of the policies could run: {'; '.join(reasons)}")


def same_figures(
    policies: Sequence[PolicySpec], context: Context, sizes: Sequence[int]
) -> list[str]:
    """A line for each of ``policies`` that cannot differ from another one, with these ``sizes`` of
    the cache that ``context`` is of."""
    found: dict[tuple[Same, tuple[int, ...]], list[str]] = {}
    for policy in policies:
        at: dict[Same, list[int]] = {}
        for slots in sizes:
            same = policy.policy.same_as(context._replace(slots=slots))
            if same is not None and same.policy != policy.name:
                at.setdefault(same, []).append(slots)
        for same, its in at.items():
            found.setdefault((same, tuple(its)), []).append(policy.label)
    lines = []
    for (same, slots_of), names in found.items():
        where = f" at {', '.join(map(str, slots_of))} slots" if len(slots_of) < len(sizes) else ""
        lines.append(f"{', '.join(names)}{where} cannot differ from {same.policy}: {same.why}")
    return lines
