"""What a bench is asked to run: which policies, for how many tokens, how often."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moepolicy import PolicyError, PolicySpec

from moerun.bench.routing import ForcedRouting
from moerun.errors import UsageError
from moerun.policies import Refusals, refuse_beyond, refuse_unservable, require_some


@dataclass(frozen=True)
class BenchSchedule:
    """What is to be run; token counts are of decoded tokens.

    policies  each runs in every round
    tokens    measured in each run
    warm_up   tokens before these, from a cold cache
    released  run the model of the released engine, too
    """

    policies: tuple[PolicySpec, ...]
    tokens: int
    warm_up: int
    rounds: int
    released: bool

    @property
    def forced_tokens(self) -> int:
        """Tokens that a run decodes: a first one stands for the prompt."""
        return 1 + self.warm_up + self.tokens

    def check(self, *, low: bool = False) -> None:
        """Raises UsageError or PolicyError naming what is out of range, or that a policy needs the
        experts at a lower precision, too, and there is none (``low``)."""
        for name, least in (("tokens", 1), ("warm_up", 0), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"{name.replace('_', '-')} must be {least} or more, not {getattr(self, name)}"
                )
        for policy in self.policies:
            refuse_unservable(policy, low=low)

    def within(self, routing: ForcedRouting, refused: Refusals) -> BenchSchedule:
        """The schedule without the policies that read predictions further ahead than ``routing``
        has them, which join ``refused``. PolicyError where none is left."""
        fit = []
        for policy in self.policies:
            try:
                refuse_beyond(policy, routing.horizon, f"routing '{routing.source}'")
            except PolicyError as error:
                refused[policy.label] = str(error)
            else:
                fit.append(policy)
        require_some(fit, refused)
        return replace(self, policies=tuple(fit))

    @property
    def spares(self) -> bool:
        """Whether a policy may have experts computed elsewhere than on the device, or nowhere."""
        return any(policy.policy.lossy or "cpu" in policy.requires for policy in self.policies)
