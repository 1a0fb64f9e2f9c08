"""One suite of checks that every policy is put through, built-in or not.

`moesim check NAME` prints what comes of it. In pytest:

    from moesim.conformance import CHECKS, assert_conforms

    @pytest.mark.parametrize("check", CHECKS)
    def test_mine(check):
        assert_conforms(Mine, check)

CHECKS  the checks by name; the docstring of each says what must hold
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesim.conformance.suite import CHECKS as CHECKS
    from moesim.conformance.suite import CheckResult as CheckResult
    from moesim.conformance.suite import Status as Status
    from moesim.conformance.suite import assert_conforms as assert_conforms
    from moesim.conformance.suite import check_policy as check_policy

__all__ = ["CHECKS", "CheckResult", "Status", "assert_conforms", "check_policy"]

# The names of CHECKS, in their order, for a help that imports none of them.
CHECK_NAMES = (
    *("rules", "repeats", "resize", "engines", "live", "limit", "memory", "time", "compiled"),
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moesim.conformance import suite

    return getattr(suite, name)
