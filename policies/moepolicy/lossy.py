"""How tables show policies that change what the model computes, and what those policies changed."""

from __future__ import annotations

from collections.abc import Mapping

MARKED = "* changes what the model computes"  # under a table with marked names
OPEN_LOOP = (
    "gave tokens other experts; on a recorded trace the hidden states do not answer: open-loop"
)
CHANGES = {
    "skipped_share": "left out",
    "substituted_share": "computed by another expert",
    "low_share": "computed at the lower precision",
    "rerouted_share": "routed to another expert",
}
"""The columns that tell what a policy changed, shares of the gates' weights, and their words."""


def marked(policy: str, lossy: bool) -> str:
    """A policy's name in a table: with a mark where the policy is lossy."""
    return f"{policy}*" if lossy else policy


def changed(shares: Mapping[str, float]) -> str:
    """What was changed, in words, of the shares in ``shares``; other columns there are left alone.

    "of the gates' weight nothing" where all are 0.
    """
    found = [f"{100 * shares[name]:.1f} % {what}" for name, what in CHANGES.items() if shares[name]]
    return f"of the gates' weight {', '.join(found) or 'nothing'}"


def change_cells(shares: Mapping[str, float]) -> str:
    """All shares in one cell, in % and in the order that `CHANGE_LEGEND` has."""
    return " | ".join(f"{100 * shares[name]:.1f}" for name in CHANGES)


CHANGE_HEADING = "changed %"
CHANGE_LEGEND = f"{CHANGE_HEADING}: of the gates' weight, what was {' | '.join(CHANGES.values())}"
