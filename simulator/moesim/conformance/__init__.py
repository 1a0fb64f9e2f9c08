"""One suite of checks that every policy is put through, built-in or not.

`moesim check NAME` prints what comes of it. In pytest:

    from moesim.conformance import CHECKS, assert_conforms

    @pytest.mark.parametrize("check", CHECKS)
    def test_mine(check):
        assert_conforms(Mine, check)

CHECKS  the checks by name; the docstring of each says what must hold
"""

from moesim.conformance.suite import CHECKS, CheckResult, Status, assert_conforms, check_policy

__all__ = ["CHECKS", "CheckResult", "Status", "assert_conforms", "check_policy"]
