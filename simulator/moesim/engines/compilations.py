"""When a policy's code pays, and what a command has learnt of it while it runs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from moepolicy import Policy, PolicySpec
from moepolicy.compiled import NotCompilable


class Engine(StrEnum):
    """What replays a workload. All give the same results: SimPy slowly, with an event for each
    decision, the replay fast. "auto" takes the replay where nothing observes the events."""

    auto = "auto"
    simpy = "simpy"
    replay = "replay"


@dataclass
class Compilations:
    """Which policies run compiled. A command makes one and passes it to all that it simulates.

    Compiling takes seconds, loading what an earlier run compiled one; the interpreted loop does
    some ten thousand steps in each. Code is used once so many of a policy's steps were asked for.
    """

    worth_compiling: int = 100_000  # steps
    worth_loading: int = 20_000
    prefix: int = 256  # steps on which compiled code is held against its interpreted self
    interpreted: dict[type[Policy], str] = field(default_factory=dict)
    """The policies that do not compile, and why."""
    proven: set[tuple[Engine, type[Policy]]] = field(default_factory=set)
    """Those whose code did on a prefix what the interpreter does."""
    _asked: Counter[tuple[Engine, type[Policy]]] = field(default_factory=Counter)

    def ask(self, engine: Engine, policy: PolicySpec, n_steps: int) -> int:
        """Note that so many steps are asked for; returns how many were until now, these too."""
        self._asked[engine, policy.policy] += n_steps
        return self._asked[engine, policy.policy]

    def pays(self, policy: PolicySpec, asked: int, is_compiled: Callable[[], bool]) -> bool:
        """Whether so many steps pay for code; ``is_compiled`` says whether it lies on disk."""
        if policy.policy in self.interpreted:
            return False
        if asked >= self.worth_compiling:
            return True
        try:
            return asked >= self.worth_loading and is_compiled()
        except NotCompilable:
            return False

    def interpret(self, policy: PolicySpec, reason: str) -> None:
        """Run a policy's class interpreted from now on, and say why."""
        self.interpreted[policy.policy] = reason
        print(
            f"policy '{policy.name}' runs interpreted, some 100 times slower: {reason}",
            file=sys.stderr,
        )


OF_THIS_PROCESS = Compilations()
"""For the Python functions whose caller passes none: what they learn lasts as long as Python."""
