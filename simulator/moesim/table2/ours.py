"""What this project's engine would reach on the table's cards, and what nothing can beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moepolicy import PolicySpec

from moesim.engines.compilations import Compilations
from moesim.limits import min_time_ns
from moesim.machine.profile import NS_PER_S
from moesim.machine.speed import with_constants
from moesim.simulation import simulate
from moesim.sizes import sizes_of
from moesim.table2.fit import Fit
from moesim.table2.published import CARDS, PRECISIONS, Algorithm, Card, published
from moesim.table2.rows import Constants
from moesim.workload.steps import Workload


@dataclass(frozen=True)
class Reach:
    """Tokens/s of one card at one precision.

    policies       of each policy, with copies during compute and nothing written back
    best           the policy that is fastest without knowing the future; None if all know it
    limit          what no policy can beat with these slots and buffers
    compute_limit  if every expert were always there
    """

    gpu: str
    precision: str
    published: float  # the paper's fastest row
    policies: dict[str, float]
    best: str | None
    limit: float
    compute_limit: float


def reach(
    workload: Workload,
    policies: Sequence[PolicySpec],
    fits: dict[str, Fit],
    sizes: dict[str, int],
    compilations: Compilations,
) -> list[Reach]:
    """Each card and precision under each policy, with the card's fitted constants."""
    return [
        _reach(
            workload,
            policies,
            card,
            precision,
            fits[card.name].constants,
            sizes[precision],
            compilations,
        )
        for precision in PRECISIONS
        for card in CARDS
    ]


def _reach(
    workload: Workload,
    policies: Sequence[PolicySpec],
    card: Card,
    precision: str,
    constants: Constants,
    expert_bytes: int,
    compilations: Compilations,
) -> Reach:
    machine = constants.machine(write_back=False)
    found = {
        policy.label: simulate(
            workload,
            policy,
            machine,
            slots=card.slots,
            expert_bytes=expert_bytes,
            limits=False,
            compilations=compilations,
        ).speed
        for policy in policies
    }
    blind = {policy.label for policy in policies if "future" not in policy.requires}
    sizes = sizes_of(workload.meta, expert_bytes)
    context = with_constants(workload.context(card.slots, "layer"), machine, sizes)
    least_ns = min(
        min_time_ns(
            workload,
            machine,
            sizes,
            card.slots,
            "layer",
            buffers=max((policy.build(context).staging for policy in policies), default=0),
            shares=shares,
        )
        # No policy can beat what is the least of equal slots and of every policy's shares.
        for shares in {None, *(policy.shares(context) for policy in policies)}
    )
    tokens = workload.n_decoded
    return Reach(
        gpu=card.name,
        precision=precision,
        published=published(precision, Algorithm.full, card),
        policies=found,
        best=max(blind, key=lambda name: found[name], default=None),
        limit=tokens * NS_PER_S / least_ns,
        compute_limit=1 / (workload.meta.n_layers * constants.layer_s),
    )
