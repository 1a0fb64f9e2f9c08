"""Which policies a live run can serve, and what they are made from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from moepolicy import Context, PolicyError, PolicySpec
from moepolicy.policy import NEEDS
from moepolicy.refusals import Refusals
from numpy.typing import NDArray

from moerun.errors import RunError
from moerun.simulation import speed_of

if TYPE_CHECKING:  # commands import this module before they need torch
    from moerun.settings import Settings
    from moerun.store.expert_store import ExpertStore
    from moerun.store.index import StoreIndex

NOT_LIVE = {"future": "the future of a recorded trace"}
OPTIONS = {"low": "low", "speed": "machine"}  # of moerun, that give what a policy needs


def unserved(policy: PolicySpec) -> str | None:
    """What the policy needs and a live run does not have; None where it can run."""
    return next((what for need, what in NOT_LIVE.items() if need in policy.requires), None)


class RunsLive(NamedTuple):
    """Whether a policy runs in a live run, and what it needs for that or lacks."""

    runs: bool
    why: str | None

    @property
    def shown(self) -> str:
        """The cell of a table."""
        return f"{'yes' if self.runs else 'no'}{f', {self.why}' if self.why else ''}"


def live_needs(needs: Collection[str]) -> RunsLive:
    """What policies with these ``needs`` (see `moepolicy.policy.NEEDS`) come to in a live run."""
    if absent := sorted(NOT_LIVE.keys() & set(needs)):
        return RunsLive(False, f"needs {', '.join(absent)}")
    options = [f"--{option}" for need, option in OPTIONS.items() if need in needs]
    return RunsLive(True, f"with {' and '.join(options)}" if options else None)


def refuse_unservable(policy: PolicySpec, *, low: bool = False, machine: bool = False) -> None:
    """PolicyError for a policy that needs what a live run does not have.

    ``low``: this one has a second store, of lower precision. ``machine``: a profile says how fast
    this one's machine is.
    """
    if (what := unserved(policy)) is not None:
        raise PolicyError(f"policy '{policy.label}' needs {what}: it runs in moesim, not live")
    if "low" in policy.requires and not low:
        raise PolicyError(
            f"policy '{policy.label}' loads experts at a lower precision: give --low a precision "
            "or the folder of a store"
        )
    if "speed" in policy.requires and not machine:
        raise PolicyError(
            f"policy '{policy.label}' needs {NEEDS['speed']}: give --machine a profile of this "
            "machine, which 'moerun profile' writes"
        )


def missed_constants(policy: PolicySpec, *, machine: bool) -> str | None:
    """What a policy welcomes and a live run does not know unless an option says it, as a note;
    None where nothing is missing. ``machine``: a profile says how fast this one's machine is."""
    if machine or "speed" not in policy.welcomes - policy.requires:
        return None
    return (
        f"policy '{policy.label}' welcomes 'speed' ({NEEDS['speed']}) and runs without it: give "
        f"--{OPTIONS['speed']} a profile of this machine, or a machine's name"
    )


def refuse_beyond(policy: PolicySpec, horizon: int, source: str) -> None:
    """PolicyError where ``source`` has predictions less far ahead than ``policy`` reads them."""
    if policy.horizon > horizon:
        raise PolicyError(
            f"policy '{policy.label}' reads predictions {policy.horizon} layers ahead, and "
            f"{source} has predictions {horizon} ahead"
        )


def servable(
    policies: Sequence[PolicySpec],
    refused: Refusals,
    *,
    low: bool = False,
    machine: bool = False,
) -> tuple[PolicySpec, ...]:
    """The policies that a live run can serve; ``refused`` gets the reasons of the others.

    Raises PolicyError where there are none.
    """
    fit = []
    for policy in policies:
        try:
            refuse_unservable(policy, low=low, machine=machine)
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


CALIBRATION = "tiny"  # the trace in which experts are counted unless another is named


def plan_context(store: ExpertStore, settings: Settings, slots: int) -> Context:
    """The cache that a policy is made for."""
    counts = None
    if "counts" in settings.policy.requires:
        counts = calibration_counts(store, settings)
    context = Context(
        n_layers=store.n_layers,
        n_experts=store.n_experts,
        top_k=store.index.top_k,
        slots=slots,
        scope=settings.scope,
        counts=counts,
    )
    low_bytes = settings.low.record_bytes if settings.low else None
    return with_constants(context, store.index, low_bytes, settings.machine, [settings.policy])


def with_constants(
    context: Context,
    index: StoreIndex,
    low_bytes: int | None,
    machine: str | None,
    policies: Sequence[PolicySpec],
) -> Context:
    """``context`` with the constants of these experts and, where one of ``policies`` asks for it,
    of ``machine``, a profile. RunError for a profile that cannot be read."""
    context = context._replace(expert_bytes=index.layout.record_bytes, low_bytes=low_bytes)
    if machine is None or not any("speed" in p.requires | p.welcomes for p in policies):
        return context
    found = speed_of(
        machine,
        expert_bytes=index.layout.record_bytes,
        expert_params=index.shape.n_weights,
        layer_bytes=index.layer_bytes,
        top_k=index.top_k,
    )
    return context._replace(**found._asdict())


def calibration_counts(store: ExpertStore, settings: Settings) -> NDArray[np.int64]:
    """How often each expert is used in the calibration trace: int64[n_layers, n_experts]."""
    from moeroute.uses import uses_of

    told = uses_of(settings.calibration or CALIBRATION)
    if (told.n_layers, told.n_experts) != (store.n_layers, store.n_experts):
        hint = "give --calibration a trace of this model"
        raise RunError(
            f"policy '{settings.policy.label}' needs the expert counts of a trace, and "
            f"{told.path} is of {told.n_layers} layers of {told.n_experts} experts, the model of "
            f"{store.n_layers} of {store.n_experts}: {hint}"
        )
    return told.counts
