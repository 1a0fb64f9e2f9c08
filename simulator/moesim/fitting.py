"""Fitting a policy on some of a trace's sequences, and keeping it from being scored on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from moepolicy import PolicyError, PolicySpec, Step
from moepolicy.blame import broken
from moepolicy.fitted import PARAMETER, Arrays, FittedOn, checked_arrays
from moepolicy.guard import no_quitting, shown
from moepolicy.interface import can_be_fitted
from moepolicy.library import BUILT_IN
from moepolicy.policy import PolicyUsageError
from moepolicy.versions import installed
from moeroute import Trace

from moesim.errors import SimulationError, UsageError
from moesim.simulation import workload_for
from moesim.workload.steps import Workload


@dataclass(frozen=True)
class Fitting:
    """The arrays of a fit, and what they were fitted on."""

    arrays: Arrays
    of: FittedOn

    @property
    def held_out(self) -> int:
        """Sequences of the trace that were not fitted on."""
        return self.of.n_sequences - len(self.of.sequences)


def fit(policy: PolicySpec, trace: Trace, *, share: float = 0.5, seed: int = 0) -> Fitting:
    """FittedOn ``policy`` on ``share`` of the sequences of ``trace``, drawn by ``seed``; 1: on all.

    Raises PolicyError where the policy cannot be fitted or fails, TraceError or SimulationError
    where the trace is not to be fitted on.
    """
    if not can_be_fitted(policy.policy):
        fittable = ", ".join(name for name, cls in BUILT_IN.items() if can_be_fitted(cls))
        raise PolicyUsageError(
            f"policy '{policy.label}' has nothing that is fitted; these have: {fittable}, and "
            "a class of your own with a method fit"
        )
    if PARAMETER in policy.parameters:
        raise PolicyError(f"policy '{policy.label}' is fitted already: leave {PARAMETER} out")
    workload = workload_for(trace, [policy]).shown_to(policy)
    chosen = draw_sequences(len(workload.starts), share, seed)
    part = workload.only(chosen)
    context = part.context(part.meta.n_experts, "layer")
    try:
        with no_quitting():
            arrays = policy.policy.fit(context, _steps(part), np.random.default_rng(seed))
    except Exception as error:
        raise broken(policy.label, policy.policy, error) from error
    arrays = checked_arrays(policy.label, "fit", arrays)
    meta = trace.meta
    of = FittedOn(
        policy=policy.name,
        model=meta.model,
        n_layers=meta.n_layers,
        n_experts=meta.n_experts,
        top_k=meta.top_k,
        trace=trace.digest,
        sequences=tuple(chosen),
        n_sequences=len(workload.starts),
        seed=seed,
        versions=installed(("numpy",)),
    )
    return Fitting(arrays, of)


def draw_sequences(n: int, share: float, seed: int) -> list[int]:
    """So many of ``n`` sequences by number, ascending: at least one, and not all but for 1."""
    if not 0 < share <= 1:
        raise UsageError.of("share", f"must be above 0, and 1 at most, not {share}")
    if share == 1:
        return list(range(n))
    if n == 1:
        raise SimulationError(
            "the trace is one sequence, of which none would be left to score on: give --share 1 "
            "to fit on it, and score on another trace"
        )
    wanted = min(max(round(n * share), 1), n - 1)
    return sorted(np.random.default_rng(seed).permutation(n)[:wanted].tolist())


def fitted_sequences(trace: Trace, policies: Iterable[PolicySpec]) -> dict[int, str]:
    """The sequences of ``trace`` that a policy was fitted on, and which policy."""
    found: dict[int, str] = {}
    for policy in policies:
        for fitted in policy.fits:
            if fitted.of.trace == trace.digest:
                found.update(dict.fromkeys(fitted.of.sequences, policy.label))
    return found


COMPARED = "--held-out replays the others only, --fitted-too all of them"
ELSEWHERE = "give a trace that it was not fitted on, or score it by 'moesim compare --held-out'"


def refuse_fitted(
    trace: Trace, policies: Sequence[PolicySpec], *, instead: str = ELSEWHERE
) -> None:
    """SimulationError where a policy would be scored on sequences that it was fitted on, with what
    to do ``instead``."""
    fitted = fitted_sequences(trace, policies)
    if fitted:
        first = next(iter(fitted.values()))
        raise SimulationError(
            f"policy '{first}' was fitted on {len(fitted)} sequences of {trace.title}: {instead}"
        )


def held_out(workload: Workload, trace: Trace, policies: Sequence[PolicySpec]) -> Workload:
    """The sequences that no policy was fitted on. SimulationError where there are none,
    UsageError where no policy was fitted on anything."""
    if not any(policy.fits for policy in policies):
        raise UsageError(
            "held-out leaves out the sequences that policies were fitted on, and none of these "
            "policies was fitted: leave it out, or name one as POLICY:params=FILE (moesim fit)"
        )
    fitted = fitted_sequences(trace, policies)
    left = [i for i in range(len(workload.starts)) if i not in fitted]
    if not left:
        raise SimulationError(
            f"the policies were fitted on all sequences of {trace.title}: none is held out"
        )
    return workload.only(left) if fitted else workload


def _steps(workload: Workload) -> Iterator[Step]:
    return (shown(workload.step(number)) for number in range(workload.n_steps))
