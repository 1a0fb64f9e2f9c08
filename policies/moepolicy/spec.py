"""A policy that has been found by its name and not made yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moepolicy.blame import broken, told
from moepolicy.fitted import PARAMETER, Fitted, read_fitted
from moepolicy.guard import no_quitting
from moepolicy.interface import accepted, can_be_fitted
from moepolicy.overdue import watch_policy
from moepolicy.policy import Context, Policy, PolicyError
from moepolicy.sharing import given, shares_of

ROUTING_NEEDS = frozenset({"logits", "weights"})  # of every policy that routes


@dataclass(frozen=True)
class PolicySpec:
    """A policy that has been found but not made: its class and parameters."""

    name: str
    policy: type[Policy]
    parameters: dict[str, int | float | str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The spec as typed on a command line."""
        if not self.parameters:
            return self.name
        return f"{self.name}:" + ",".join(f"{k}={v}" for k, v in self.parameters.items())

    @property
    def requires(self) -> frozenset[str]:
        """What the policy needs of its context and its steps, by name."""
        return self.policy.requires | (ROUTING_NEEDS if self.routes else frozenset())

    @property
    def welcomes(self) -> frozenset[str]:
        """What of its context the policy uses where it is known, by name."""
        return self.policy.welcomes

    @property
    def routes(self) -> bool:
        """Whether the policy has a say in which experts a token gets."""
        return self.policy.route is not Policy.route

    @property
    def horizon(self) -> int:
        """How many layers ahead it reads predictions: its parameter ``horizon``, if it has one, or
        what its class declares; 0 where it reads none."""
        if "predictions" not in self.requires:
            return 0
        parameter = accepted(self.policy).get("horizon")
        default = self.policy.horizon if parameter is None else parameter.default
        return int(self.parameters.get("horizon", default))

    def build(self, context: Context) -> Policy:
        """A fresh policy for one cache, given what it requires of ``context`` and no more.

        PolicyError where its parameters do not fit, or ``context`` lacks what it requires.
        """
        try:
            of = given(context, self.requires, self.label, self.welcomes)
            with no_quitting(), watch_policy(self.label, self.policy):
                made = self.policy(of, **self._made_with(context))
        except PolicyError:
            raise
        except Exception as error:
            found = broken(self.label, self.policy, error)
            said = told(error)
            if isinstance(found, PolicyError):
                said = str(found).partition(" failed: ")[2] or said
            raise PolicyError(f"policy '{self.label}' could not be made: {said}") from error
        if not isinstance(made.staging, int):
            raise PolicyError(
                f"policy '{self.label}': staging must be a whole number, not {made.staging!r}"
            )
        return made

    def shares(self, context: Context) -> tuple[int, ...] | None:
        """The slots of each layer of ``context``; None where they are equal, or where the layers
        have one cache together. PolicyError for shares that no cache can have."""
        if context.scope != "layer":
            return None
        found = shares_of(self.build(context), context, self.label)
        return None if found is None else tuple(found.tolist())

    @cached_property
    def fitted(self) -> Fitted | None:
        """What the policy was fitted with, where its parameters name a file. PolicyError where
        that is damaged or another policy's."""
        path = self.parameters.get(PARAMETER)
        if path is None or not can_be_fitted(self.policy):
            return None
        return read_fitted(Path(str(path)), self.name)

    @property
    def fits(self) -> tuple[Fitted, ...]:
        """What this policy, or parts of it, were fitted with."""
        return () if self.fitted is None else (self.fitted,)

    def _made_with(self, context: Context) -> dict[str, Any]:
        """The parameters for ``__init__``."""
        if self.fitted is None:
            return dict(self.parameters)
        return self.parameters | {PARAMETER: self.fitted.given(context, self.label)}
