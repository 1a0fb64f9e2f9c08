"""Whether a class is the policy that its author meant: its hooks, its declarations, its __init__.

Python passes over a misspelt hook and a declaration of the wrong type; both are told here before
anything runs.
"""

from __future__ import annotations

import difflib
import inspect
from types import CodeType
from typing import Any

from moepolicy.aspects import aspects_of
from moepolicy.near import meant
from moepolicy.policy import CONSTANTS, HOOKS, NEEDS, Policy, PolicyError

DECLARATIONS = frozenset(
    {
        *("requires", "horizon", "always_evicts", "lossy", "staging", "stage_prefetches"),
        "fills_slots",
        *("same_as", "fit", "learned", "welcomes", "share_slots", "made_of", "only"),
    }
)
_ALIKE = 0.8  # of 1, by difflib: on_hits and prefetchs are, a helper of one's own is not


def check_class(name: str, policy: type[Policy], *, part: bool = False) -> None:
    """PolicyError, in one line, where ``policy`` breaks the rules of the interface.

    A ``part`` of a composition need not choose victims."""
    if inspect.isabstract(policy):
        abstract: frozenset[str] = getattr(policy, "__abstractmethods__", frozenset())
        missing = ", ".join(sorted(abstract))
        raise PolicyError(f"policy '{name}' leaves {missing} abstract: define it")
    _check_names(name, policy)
    for hook in sorted(HOOKS):
        _check_hook(name, policy, hook)
    if policy.victim is Policy.victim and not part:
        as_part = f"; or give it as a part of another policy, lru+{name}"
        raise PolicyError(
            f"policy '{name}' has no victim: define victim(self, layer, incoming, candidates), "
            "which answers one of the candidates, or -1 to decline"
            f"{as_part if aspects_of(policy) else ''}"
        )
    _check_declarations(name, policy)
    _check_share_slots(name, policy)
    if policy.route is not Policy.route and not policy.lossy:
        raise PolicyError(
            f"policy '{name}' has route, which changes what the model computes: declare "
            "lossy = True"
        )
    _check_init(name, policy)
    if can_be_fitted(policy) and "params" not in accepted(policy):
        raise PolicyError(
            f"policy '{name}' has fit, whose arrays its __init__ must take: add params=None"
        )


def can_be_fitted(policy: type[Policy]) -> bool:
    """Whether a class has a ``fit`` of its own."""
    own: Any = policy.fit
    none: Any = Policy.fit
    return own.__func__ is not none.__func__


def _own(policy: type[Policy]) -> dict[str, Any]:
    """What the class and those between it and Policy define, in their order of precedence."""
    found: dict[str, Any] = {}
    for cls in policy.__mro__:
        if issubclass(cls, Policy) and cls is not Policy:
            for key, value in vars(cls).items():
                found.setdefault(key, value)
    return found


def _check_names(name: str, policy: type[Policy]) -> None:
    own = _own(policy)
    used = set().union(*(_names_in(v.__code__) for v in own.values() if inspect.isfunction(v)))
    for key, value in own.items():
        known = HOOKS if callable(value) else DECLARATIONS
        if key.startswith("_") or key in HOOKS | DECLARATIONS or key in used:
            continue
        close = difflib.get_close_matches(_plain(key), known, n=1, cutoff=_ALIKE)
        if close and close[0] not in own:
            kind = "hook" if callable(value) else "declaration"
            raise PolicyError(
                f"policy '{name}' has '{key}', which nothing calls: did you mean the {kind} "
                f"'{close[0]}'? (a helper's name may begin with _)"
            )


def _plain(name: str) -> str:
    """onHit and OnHit are on_hit."""
    parts = (f"_{c.lower()}" if c.isupper() else c for c in name)
    return "".join(parts).lstrip("_")


def _names_in(code: CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def _check_hook(name: str, policy: type[Policy], hook: str) -> None:
    given = inspect.getattr_static(policy, hook)
    meant = list(inspect.signature(getattr(Policy, hook)).parameters)
    form = f"{hook}({', '.join(meant)})"
    if not callable(given) and not isinstance(given, (staticmethod, classmethod)):
        raise PolicyError(f"policy '{name}': {hook} is a {type(given).__name__}, not {form}")
    function = given if inspect.isfunction(given) else getattr(policy, hook)
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise PolicyError(f"policy '{name}': {hook} must return its answer, not await or yield")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # code without one
        return
    n_given = len(meant) if inspect.isfunction(given) else len(meant) - 1
    try:
        signature.bind(*range(n_given))
    except TypeError:
        raise PolicyError(
            f"policy '{name}': {hook} is called as {form}, and is defined as {hook}{signature}"
        ) from None


def _check_declarations(name: str, policy: type[Policy]) -> None:
    _check_needs(name, "requires", policy.requires, frozenset(NEEDS), "predictions")
    _check_needs(name, "welcomes", policy.welcomes, CONSTANTS, "speed")
    if not isinstance(policy.lossy, bool):
        raise PolicyError(f"policy '{name}': lossy is {policy.lossy!r}, and must be True or False")
    if not isinstance(policy.only, str) or not _are_policies(policy.made_of):
        raise PolicyError(
            f"policy '{name}': made_of and only are for compositions alone: leave out"
        )
    horizon = inspect.getattr_static(policy, "horizon")
    if not isinstance(horizon, int) or isinstance(horizon, bool) or horizon < 1:
        raise PolicyError(
            f"policy '{name}': horizon is {horizon!r}, and must be the number of layers ahead "
            "that the policy reads predictions, 1 or more"
        )


def _are_policies(classes: Any) -> bool:
    return isinstance(classes, tuple) and all(
        isinstance(cls, type) and issubclass(cls, Policy) for cls in classes
    )


def _check_share_slots(name: str, policy: type[Policy]) -> None:
    given = inspect.getattr_static(policy, "share_slots")
    try:
        inspect.signature(policy.share_slots).bind("total", "context")
        fits = isinstance(given, classmethod)
    except TypeError:
        fits = False
    if not fits:
        raise PolicyError(
            f"policy '{name}': share_slots is asked of the class, before there is a policy: define "
            "it as @classmethod share_slots(cls, total, context)"
        )


def _check_init(name: str, policy: type[Policy]) -> None:
    try:
        inspect.signature(policy).bind(None, **dict.fromkeys(required(policy)))
    except TypeError:
        signature = inspect.signature(policy.__init__)
        raise PolicyError(
            f"policy '{name}': __init__ takes the context first, then parameters by keyword, as "
            f"__init__(self, context, n=2); it is defined as __init__{signature}"
        ) from None


def accepted(policy: type[Policy]) -> dict[str, inspect.Parameter]:
    """The parameters that a spec may give, by name."""
    parameters = list(inspect.signature(policy).parameters.values())
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [p for p in parameters if p.kind in by_keyword]
    first = parameters[0] if parameters else None
    return {p.name: p for p in named if p is not first}


def required(policy: type[Policy]) -> list[str]:
    """The parameters that a spec must give."""
    return [name for name, p in accepted(policy).items() if p.default is p.empty]


def _check_needs(name: str, what: str, given: Any, known: frozenset[str], example: str) -> None:
    """PolicyError unless ``given``, a class's ``requires`` or ``welcomes``, is a set of names."""
    if not isinstance(given, (set, frozenset)):
        raise PolicyError(
            f"policy '{name}': {what} is {given!r}, and must be a set of names, as "
            f'frozenset({{"{example}"}})'
        )
    for need in sorted(map(str, given - known)):
        raise PolicyError(
            f"policy '{name}' {what} '{need}': {meant(need, known)}there are: "
            f"{', '.join(sorted(known))}"
        )
