"""What a policy learns while a model runs, kept in a file for the next run to begin with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moepolicy import Policy, PolicySpec
from moepolicy.blame import broken
from moepolicy.fitted import PARAMETER, FittedOn, checked_arrays, write_fitted
from moepolicy.guard import no_quitting
from moepolicy.policy import defines

from moerun.errors import UsageError
from moerun.store.expert_store import ExpertStore
from moerun.versions import run_packages

LIVE = "a live run"  # in the place of a trace's digest


def begin_with(policy: PolicySpec, file: Path) -> PolicySpec:
    """``policy``, given what ``file`` holds if it is there.

    Raises UsageError for a policy that learns nothing or begins with another file, PolicyError for
    a file that is damaged or another policy's.
    """
    if not defines(policy.policy, "learned"):
        raise UsageError(
            f"--learned {file}: policy '{policy.label}' learns nothing that can be kept; "
            "'foresight' and its kin do"
        )
    if PARAMETER in policy.parameters:
        raise UsageError(
            f"--learned {file}: policy '{policy.label}' begins with a params file: give one of them"
        )
    if not file.parent.is_dir():
        raise UsageError(f"--learned {file}: there is no folder {file.parent}")
    if not file.exists():
        return policy
    found = replace(policy, parameters=policy.parameters | {PARAMETER: str(file)})
    assert found.fitted is not None  # read now, before anything is loaded
    return found


def keep(file: Path, policy: Policy, spec: PolicySpec, store: ExpertStore) -> None:
    """Write what ``policy`` has learned to ``file``, whole or not at all. PolicyFailed where that
    is nothing that can be kept."""
    try:
        with no_quitting():
            arrays = policy.learned()
    except Exception as error:
        raise broken(spec.label, type(policy), error) from error
    arrays = checked_arrays(spec.label, "learned", arrays)
    of = FittedOn(
        policy=spec.name,
        model=store.index.model,
        n_layers=store.n_layers,
        n_experts=store.n_experts,
        top_k=store.index.top_k,
        trace=LIVE,
        sequences=(),
        n_sequences=0,
        seed=0,
        versions=run_packages(),
    )
    write_fitted(file, arrays, of)
