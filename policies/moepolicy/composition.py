"""Specs of policies made of others: ``lru+gate(n=2)`` and ``adaptive(A, B, when=late>0.2)``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moepolicy.adaptive import OF_BACKLOG, OF_HITS, OF_LATE, OF_MISSES, adaptive_class
from moepolicy.aspects import ASPECTS, aspects_of
from moepolicy.composite import composite_class, only_class
from moepolicy.fitted import Fitted
from moepolicy.policy import Context, Policy, PolicyError, PolicyUsageError
from moepolicy.spec import PolicySpec

METRICS = {
    "hit": OF_HITS,
    "late": OF_LATE,
    "miss": OF_MISSES,
    "backlog": OF_BACKLOG,
}
"""What a condition may compare: shares of the demanded experts, and the copies that wait."""


@dataclass(frozen=True)
class _MadeOf(PolicySpec):
    """A policy made of others, ``parts``."""

    parts: tuple[PolicySpec, ...] = ()

    @property
    def requires(self) -> frozenset[str]:
        """What any part needs."""
        return frozenset().union(*(part.requires for part in self.parts))

    @property
    def welcomes(self) -> frozenset[str]:
        """What any part uses where it is known."""
        return frozenset().union(*(part.welcomes for part in self.parts))

    @property
    def routes(self) -> bool:
        """Whether any part routes."""
        return any(part.routes for part in self.parts)

    @property
    def fits(self) -> tuple[Fitted, ...]:
        """What any part was fitted with."""
        return tuple(fitted for part in self.parts for fitted in part.fits)

    @property
    def horizon(self) -> int:
        """As many layers ahead as the part that reads furthest."""
        return max(part.horizon for part in self.parts)


@dataclass(frozen=True)
class ComposedSpec(_MadeOf):
    """Policies of which each decides an aspect."""

    @property
    def label(self) -> str:
        """The spec as typed on a command line."""
        return self.name

    def build(self, context: Context) -> Policy:
        """Each part, and from the first on the policy that it makes with the next."""
        made = self.parts[0].build(context)
        for part in self.parts[1:]:
            other = part.build(context)
            made = composite_class(_class(made), _class(other))(made, other)
        return made


@dataclass(frozen=True)
class OnlySpec(_MadeOf):
    """One aspect of a policy that decides more."""

    def build(self, context: Context) -> Policy:
        """The whole policy, and what lets one aspect of it through."""
        whole = self.parts[0].build(context)
        return only_class(_class(whole), self.policy.only)(whole)


@dataclass(frozen=True)
class Condition:
    """When an adaptive policy is its second one: ``metric`` above or below a number."""

    metric: str
    above: bool
    than: float
    window: int

    @classmethod
    def read(cls, when: str, window: int) -> Condition:
        """From ``late>0.2``. PolicyUsageError where it is no condition."""
        for sign in "<>":
            metric, found, than = when.partition(sign)
            if found:
                break
        try:
            number = float(than)
        except ValueError:
            number = float("nan")
        if metric.strip() not in METRICS or math.isnan(number):
            raise PolicyUsageError(
                f"adaptive: when is '{when}', and must be one of {', '.join(METRICS)} with > or < "
                "and a number, as late>0.2"
            )
        if window < 1:
            raise PolicyUsageError(f"adaptive: window must be 1 step or more, not {window}")
        return cls(metric.strip(), sign == ">", number, window)


@dataclass(frozen=True)
class AdaptiveSpec(_MadeOf):
    """A policy, and another that decides while a condition holds."""

    condition: Condition = field(default_factory=lambda: Condition("late", True, 0.2, 256))

    @property
    def label(self) -> str:
        """The spec as typed on a command line."""
        return self.name

    def build(self, context: Context) -> Policy:
        """Both policies and what chooses between them."""
        base, other = (part.build(context) for part in self.parts)
        of = self.condition
        cls = adaptive_class(_class(base), _class(other))
        return cls(base, other, METRICS[of.metric], of.above, of.than, of.window)


def parts_of(spec: PolicySpec) -> list[PolicySpec]:
    """The policies that ``spec`` is made of; itself where it is made of none."""
    if not isinstance(spec, _MadeOf):
        return [spec]
    return [one for part in spec.parts for one in parts_of(part)]


def compose(parts: Sequence[PolicySpec]) -> PolicySpec:
    """The policy in which each part decides what it has hooks for.

    PolicyUsageError where two decide the same, or none which expert goes.
    """
    taken: dict[str, PolicySpec] = {}
    for part in parts:
        aspects = aspects_of(part.policy)
        if not aspects:
            raise PolicyUsageError(f"policy '{part.label}' decides nothing, and can be no part")
        for aspect in sorted(aspects):
            if aspect in taken:
                raise PolicyUsageError(
                    f"'{taken[aspect].label}' and '{part.label}' both decide {aspect}: a "
                    "composition has one part for each aspect"
                )
            taken[aspect] = part
    if "eviction" not in taken:
        labels = " and ".join(f"'{part.label}'" for part in parts)
        raise PolicyUsageError(f"none of {labels} decides eviction: begin with one, as lru+...")
    first = taken["eviction"]
    ordered = (first, *(part for part in parts if part is not first))
    cls: Any = ordered[0].policy
    for part in ordered[1:]:
        of_part: Any = part.policy
        cls = composite_class(cls, of_part)
    return ComposedSpec("+".join(map(_as_part, ordered)), cls, {}, ordered)


def restrict(spec: PolicySpec, aspect: str) -> PolicySpec:
    """What ``spec`` decides of one aspect. PolicyUsageError where that is nothing."""
    aspects = aspects_of(spec.policy)
    if aspect not in aspects:
        raise PolicyUsageError(
            f"policy '{spec.label}' decides {' and '.join(sorted(aspects)) or 'nothing'}, and not "
            f"'{aspect}'; the aspects are {', '.join(ASPECTS)}"
        )
    whole: Any = spec.policy
    cls = only_class(whole, aspect)
    return OnlySpec(f"{spec.name}.{aspect}", cls, dict(spec.parameters), (spec,))


def adapt(parts: Sequence[PolicySpec], condition: Condition, given: dict[str, Any]) -> PolicySpec:
    """The policy that is the first of two ``parts``, or the second while ``condition`` holds.

    ``given`` are the parameters as they were written. PolicyUsageError where the two cannot be
    exchanged while they run.
    """
    if len(parts) != 2:
        raise PolicyUsageError(f"adaptive chooses between 2 policies, and is given {len(parts)}")
    for part in parts:
        if "eviction" not in aspects_of(part.policy):
            raise PolicyUsageError(
                f"'{part.label}' does not decide eviction: give lru+{part.label}"
            )
        if "sharing" in aspects_of(part.policy):
            raise PolicyUsageError(
                f"adaptive: '{part.label}' shares the slots out among the layers, and "
                "shares cannot be exchanged while a policy runs"
            )
    classes: list[Any] = [part.policy for part in parts]
    ahead = [part for part in parts if "prefetching" in aspects_of(part.policy)]
    if len({_stages(part) for part in ahead}) > 1:
        raise PolicyError(
            f"adaptive: one of '{parts[0].label}' and '{parts[1].label}' sends prefetched experts "
            "to staging buffers, the other to slots; both must do the same"
        )
    written = [_as_part(part) for part in parts] + [
        f"{key}={value}" for key, value in given.items()
    ]
    first, second = classes
    cls = adaptive_class(first, second)
    return AdaptiveSpec(f"adaptive({','.join(written)})", cls, {}, tuple(parts), condition)


def _class(policy: Policy) -> Any:
    return type(policy)


def _stages(spec: PolicySpec) -> bool:
    if isinstance(spec, _MadeOf):
        return next(_stages(p) for p in spec.parts if "prefetching" in aspects_of(p.policy))
    return spec.policy.stage_prefetches


def _as_part(spec: PolicySpec) -> str:
    """A spec as it stands within another, whose own commas separate."""
    given = ",".join(f"{key}={value}" for key, value in spec.parameters.items())
    return f"{spec.name}({given})" if given else spec.name
