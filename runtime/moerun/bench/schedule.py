"""What a bench is asked to run: which policies, for how many tokens, how often."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moepolicy import WEIGHT_RULES, PolicyError, PolicySpec
from moepolicy.refusals import Refusals

from moerun.bench.routing import ForcedRouting
from moerun.policies import refuse_beyond, refuse_unservable, require_some
from moerun.ranges import check_counts


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

    def check(self, *, low: bool = False, machine: bool = False) -> None:
        """Raises UsageError or PolicyError naming what is out of range, or that a policy needs the
        experts at a lower precision (``low``), or a machine profile (``machine``), and there is
        none."""
        check_counts(self.tokens, self.warm_up, self.rounds)
        for policy in self.policies:
            refuse_unservable(policy, low=low, machine=machine)

    def within(self, routing: ForcedRouting, refused: Refusals) -> BenchSchedule:
        """The schedule without the policies that ``routing`` lacks something for, which join
        ``refused``. PolicyError where none is left."""
        fit = []
        for policy in self.policies:
            try:
                refuse_beyond(policy, routing.horizon, f"routing '{routing.source}'")
                _refuse_lacking(policy, routing)
            except PolicyError as error:
                refused[policy.label] = str(error)
            else:
                fit.append(policy)
        require_some(fit, refused)
        return replace(self, policies=tuple(fit))

    @property
    def n_steps(self) -> int:
        """Steps of which a bench tells: warming up, then in each round the link and compute, each
        policy, and the released engine."""
        return 1 + self.rounds * (1 + len(self.policies) + self.released)

    @property
    def spares(self) -> bool:
        """Whether a policy may have experts computed elsewhere than on the device, or nowhere."""
        return any(policy.policy.lossy or "cpu" in policy.requires for policy in self.policies)


def _refuse_lacking(policy: PolicySpec, routing: ForcedRouting) -> None:
    """PolicyError where ``policy`` reads logits or token ids or gives tokens other experts, and
    ``routing`` has none or does not show how its gates make weights."""
    if "logits" in policy.requires and routing.logits is None:
        raise PolicyError(
            f"policy '{policy.label}' reads the gates' logits, and routing '{routing.source}' has "
            "none: give --routing a trace with the column router_logits"
        )
    if "tokens" in policy.requires and routing.token_ids is None:
        raise PolicyError(
            f"policy '{policy.label}' reads the tokens' ids, and routing '{routing.source}' has "
            "none: give --routing a trace with the column token_id"
        )
    if policy.routes and routing.weight_rule is None:
        raise PolicyError(
            f"policy '{policy.label}' gives tokens other experts, and the gates of routing "
            f"'{routing.source}' make their weights by none of the rules known: "
            f"{', '.join(WEIGHT_RULES)}"
        )
