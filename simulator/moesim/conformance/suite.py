"""The checks by name, one policy put through them, and what came of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from moepolicy import Policy, PolicyError, PolicySpec, find_policy

from moesim.conformance.checks import (
    Remark,
    Violation,
    compiles,
    engines_agree,
    keeps_the_rules,
    live_is_simulated,
    never_beats_the_limit,
    repeats,
    resizes,
)
from moesim.conformance.costs import keeps_its_size, takes_little_time
from moesim.conformance.runs import CheckedPolicy
from moesim.errors import UsageError

CHECKS: dict[str, Callable[[CheckedPolicy], str]] = {
    "rules": keeps_the_rules,
    "repeats": repeats,
    "resize": resizes,
    "engines": engines_agree,
    "live": live_is_simulated,
    "limit": never_beats_the_limit,
    "memory": keeps_its_size,
    "time": takes_little_time,
    "compiled": compiles,
}


class Status(StrEnum):
    """What came of a check. A remark is no failure: the check does not apply, or says why not."""

    ok = "ok"
    remark = "remark"
    failed = "FAILED"


@dataclass(frozen=True)
class CheckResult:
    """One check of one policy: what came of it, and what there is to say."""

    policy: str
    check: str
    status: Status
    said: str


def check_policy(
    policy: str | type[Policy] | PolicySpec, checks: Sequence[str] = tuple(CHECKS), *, seed: int = 0
) -> Iterator[CheckResult]:
    """Put a policy through the checks, one after the other, on routing by ``seed``.

    ``policy`` is a name, a spec such as "mine.py:Mine:n=2", or a class. Raises PolicyError where
    there is no such policy, UsageError where there is no such check.
    """
    if unknown := [name for name in checks if name not in CHECKS]:
        raise UsageError(f"no check '{unknown[0]}'; there are: {', '.join(CHECKS)}")
    checked = CheckedPolicy(_spec(policy), seed)
    for name in checks:
        yield _result(checked, name)


def assert_conforms(
    policy: str | type[Policy] | PolicySpec, check: str = "rules", *, seed: int = 0
) -> None:
    """For pytest: AssertionError with what was found where the policy fails the check.

    @pytest.mark.parametrize("check", CHECKS)
    def test_mine(check):
        assert_conforms(Mine, check)
    """
    (result,) = check_policy(policy, [check], seed=seed)
    assert result.status is not Status.failed, f"{result.check}: {result.said}"


def _result(checked: CheckedPolicy, name: str) -> CheckResult:
    try:
        status, said = Status.ok, CHECKS[name](checked)
    except Remark as remark:
        status, said = Status.remark, str(remark)
    except (Violation, PolicyError) as error:
        status, said = Status.failed, str(error)
    except AssertionError as error:  # the state machine's own check
        status, said = Status.failed, f"an invariant of the cache is broken: {error}"
    return CheckResult(checked.spec.label, name, status, " ".join(said.split()))


def _spec(policy: str | type[Policy] | PolicySpec) -> PolicySpec:
    if isinstance(policy, PolicySpec):
        return policy
    return find_policy(policy) if isinstance(policy, str) else PolicySpec(policy.__name__, policy)
