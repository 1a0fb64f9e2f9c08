"""How the layers share a cache's slots: equally, or as a policy's class says (`share_slots`)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepolicy.blame import broken
from moepolicy.guard import no_quitting, shown_context
from moepolicy.kinds import WrongAnswer
from moepolicy.policy import (
    NEEDS,
    Context,
    Policy,
    PolicyError,
    PolicyFailed,
    PolicyUsageError,
    defines,
    shares_slots,
)

# What a policy may require of a context: the entries that have it, and what they are without it.
_ENTRIES: dict[str, dict[str, Any]] = {
    "counts": {"counts": None},
    "future": {"next_use": None, "offsets": None, "demands": None},
    "speed": {"copy_over_layer": math.nan, "gates_over_layer": math.nan},
    "bytes": {"expert_bytes": None, "low_bytes": None},
}


def given(
    context: Context,
    requires: frozenset[str],
    name: str,
    welcomes: frozenset[str] = frozenset(),
) -> Context:
    """``context`` with what is required of it, what is welcome where it is known, and no more.

    PolicyError, with the policy's ``name``, where something required is not there.
    """
    for need, entries in _ENTRIES.items():
        first = getattr(context, next(iter(entries)))
        if need not in requires | welcomes:
            context = context._replace(**entries)
        elif need not in requires:
            continue
        elif first is None or (isinstance(first, float) and math.isnan(first)):
            raise PolicyError(f"policy '{name}' needs {NEEDS[need]}")
    return shown_context(context)


def slots_in_all(context: Context) -> int:
    """Slots of all layers together; more than there are experts would never be filled.

    PolicyUsageError for a negative number of slots.
    """
    if context.slots < 0:
        raise PolicyUsageError(f"slots must be 0 or more, not {context.slots}")
    return min(context.slots, context.n_experts) * context.n_layers


def sharing_class(policy: Policy) -> type[Policy] | None:
    """The class that says how slots are shared: the policy's own, or that of one of its parts;
    None where they are shared equally."""
    if policy.only:
        whole: Policy | None = getattr(policy, "whole", None)
        return sharing_class(whole) if whole and shares_slots(type(policy)) else None
    if defines(type(policy), "share_slots"):
        return type(policy)
    parts: tuple[Policy, ...] = getattr(policy, "parts", ())
    found = (sharing_class(part) for part in parts)
    return next((each for each in found if each is not None), None)


def shares_of(policy: Policy, context: Context, name: str) -> NDArray[np.int64] | None:
    """int64[n_layers]: the slots of each layer; None where the policy leaves them equal, or the
    layers have one cache together.

    PolicyFailed, with the policy's ``name``, for an answer that no cache can have.
    """
    cls = sharing_class(policy)
    if cls is None or context.scope != "layer":
        return None
    total = slots_in_all(context)
    try:
        of = given(context, cls.requires - {"future"}, name, cls.welcomes)
        with no_quitting():
            answer = cls.share_slots(total, of)
        return None if answer is None else _checked(answer, total, context)
    except WrongAnswer as error:
        raise PolicyFailed(f"policy '{name}': {error}") from error
    except PolicyError:
        raise
    except Exception as error:
        found = broken(name, cls, error)
        if found is error:
            raise
        raise found from error


def _checked(answer: Any, total: int, context: Context) -> NDArray[np.int64]:
    try:
        shares = np.asarray(answer)
    except ValueError:
        shares = np.empty(0)
    if shares.shape != (context.n_layers,) or not np.issubdtype(shares.dtype, np.integer):
        raise WrongAnswer(
            f"share_slots must answer a whole number for each of {context.n_layers} layers, and "
            f"answered {_shown(answer)}"
        )
    wrong = np.flatnonzero((shares < 0) | (shares > context.n_experts))
    if len(wrong):
        raise WrongAnswer(
            f"share_slots gives layer {wrong[0]} {shares[wrong[0]]} slots, and a layer has 0 to "
            f"{context.n_experts}"
        )
    if shares.sum() != total:
        raise WrongAnswer(f"share_slots gives out {shares.sum()} slots, and there are {total}")
    return shares.astype(np.int64)


def _shown(answer: Any) -> str:
    text = " ".join(repr(answer).split())
    return text if len(text) < 60 else text[:57] + "..."


def domain_slots(policy: Policy, context: Context, name: str) -> NDArray[np.int64]:
    """int64[n_domains]: the slots of each domain, which is a layer or the one cache of all.

    Raises PolicyUsageError for a cache that there cannot be, PolicyError for shares that there
    cannot be.
    """
    total = slots_in_all(context)
    if context.scope == "global":
        return np.array([total], np.int64)
    if context.scope != "layer":
        raise PolicyUsageError(f"unknown scope '{context.scope}': it is 'layer' or 'global'")
    shares = shares_of(policy, context, name)
    if shares is None:
        return np.full(context.n_layers, total // context.n_layers, np.int64)
    return shares
