"""Which policies a live run can serve, and what they are made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from moepolicy import Context, PolicyError, PolicySpec
from numpy.typing import NDArray

from moerun.errors import RunError

if TYPE_CHECKING:  # commands import this module before they need torch
    from moerun.settings import Settings
    from moerun.store.expert_store import ExpertStore

Refusals = dict[str, str]  # by a policy's label: why it could not run

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
            f"policy '{policy.label}' loads experts at a lower precision: give --low a precision "
            "or the folder of a store"
        )


def refuse_beyond(policy: PolicySpec, horizon: int, source: str) -> None:
    """PolicyError where ``source`` has predictions less far ahead than ``policy`` reads them."""
    if policy.horizon > horizon:
        raise PolicyError(
            f"policy '{policy.label}' reads predictions {policy.horizon} layers ahead, and "
            f"{source} has predictions {horizon} ahead"
        )


def servable(
    policies: Sequence[PolicySpec], refused: Refusals, *, low: bool = False
) -> tuple[PolicySpec, ...]:
    """The policies that a live run can serve; ``refused`` gets the reasons of the others.

    Raises PolicyError where there are none.
    """
    fit = []
    for policy in policies:
        try:
            refuse_unservable(policy, low=low)
        except PolicyError as error:
            refused[policy.label] = str(error)
        else:
            fit.append(policy)
    require_some(fit, refused)
    return tuple(fit)


def require_some(left: Sequence[object], refused: Refusals) -> None:
    """PolicyError with every reason where no policy is left to run."""
    if left or not refused:
        return
    reasons = list(dict.fromkeys(refused.values()))
    before = "none of the policies could run: " if len(reasons) > 1 else ""
    raise PolicyError(before + "; ".join(reasons))


def refusal_notes(refused: Refusals) -> list[str]:
    """Lines for under a table."""
    return [f"{label}: could not run: {' '.join(why.split())}" for label, why in refused.items()]


def with_refused(rows: list[dict[str, Any]], refused: Refusals) -> list[dict[str, Any]]:
    """Rows for programs, each with ``refused``: None, or in rows of their own the reason."""
    whole = [row | {"refused": None} for row in rows]
    names = whole[0] if whole else {"policy": None, "refused": None}
    return whole + [
        dict.fromkeys(names) | {"policy": label, "refused": why} for label, why in refused.items()
    ]


CALIBRATION = "tiny"  # the trace in which experts are counted unless another is named


def plan_context(store: ExpertStore, settings: Settings, slots: int) -> Context:
    """The cache that a policy is made for."""
    counts = None
    if "counts" in settings.policy.requires:
        counts = calibration_counts(store, settings)
    return Context(
        n_layers=store.n_layers,
        n_experts=store.n_experts,
        top_k=store.index.top_k,
        slots=slots,
        scope=settings.scope,
        counts=counts,
    )


def calibration_counts(store: ExpertStore, settings: Settings) -> NDArray[np.int64]:
    """How often each expert is used in the calibration trace: int64[n_layers, n_experts]."""
    from moeroute import open_trace

    trace = open_trace(settings.calibration or CALIBRATION)
    meta = trace.meta
    if (meta.n_layers, meta.n_experts) != (store.n_layers, store.n_experts):
        hint = "give --calibration a trace of this model"
        raise RunError(
            f"policy '{settings.policy.label}' needs the expert counts of a trace, and "
            f"{trace.path} is of {meta.n_layers} layers of {meta.n_experts} experts, the model of "
            f"{store.n_layers} of {store.n_experts}: {hint}"
        )
    return trace.expert_counts()
