"""Which policies a live run can serve."""

from __future__ import annotations

from moepolicy import PolicyError, PolicySpec

NOT_LIVE = {"future": "the future of a recorded trace"}


def unserved(policy: PolicySpec) -> str | None:
    """What the policy needs and a live run does not have; None where it can run."""
    return next((what for need, what in NOT_LIVE.items() if need in policy.requires), None)


def refuse_unservable(policy: PolicySpec, *, low: bool = False) -> None:
    """PolicyError for a policy that needs what a live run does not have.

    ``low``: this one has a second store, of lower precision.
    """
    if (what := unserved(policy)) is not None:
        raise PolicyError(f"policy '{policy.label}' needs {what}: it runs in moesim, not live")
    if "low" in policy.requires and not low:
        raise PolicyError(
            f"policy '{policy.label}' loads experts at a lower precision: name one, or a store of "
            "one, with --low"
        )
