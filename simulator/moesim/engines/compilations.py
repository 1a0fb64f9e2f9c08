"""When a policy's code pays, and what a command has learnt of it while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from moepolicy import Policy, PolicySpec
from moepolicy.compiled import NotCompilable
from moepolicy.console import say

from moesim.engines.names import Engine
from moesim.engines.one_piece import Pieces

PREFIX = 256


@dataclass
class Compilations:
    """Which policies run compiled. A command makes one and passes it to all that it simulates.

    The interpreted loop does some ten thousand steps a second. Compiling what serves every policy
    takes some ten seconds, once; with that on disk, a policy's own code is one second away. Code
    is used once so many of a policy's steps were asked for.
    """

    worth_compiling: int = 100_000  # steps
    worth_loading: int = 20_000
    worth_one_piece: int = 50_000_000  # compile replay and policy into one piece
    expected: int = 0  # steps of all policies that are known to be asked for
    coming: tuple[PolicySpec, ...] = ()  # policies that are known to be asked for
    on_all_cores: bool = True  # where something is not compiled yet
    shared_out: bool = False  # what is not has been shared out among the cores
    prefix: int = PREFIX  # steps on which compiled code is held against its interpreted self
    interpreted: dict[type[Policy], str] = field(default_factory=dict)
    """The policies that do not compile, and why."""
    proven: set[tuple[Engine, type[Policy]]] = field(default_factory=set)
    """Those whose code did on a prefix what the interpreter does."""
    pieces: Pieces = field(default_factory=Pieces)
    _asked: Counter[tuple[Engine, type[Policy]]] = field(default_factory=Counter)

    @contextmanager
    def expecting(self, n_steps: int, policies: Sequence[PolicySpec] = ()) -> Iterator[None]:
        """Take it for known that so many steps will be asked for, of ``policies`` together."""
        self.expected, self.coming = n_steps, tuple(policies)
        self.shared_out = False
        try:
            yield
        finally:
            self.expected, self.coming = 0, ()

    def ask(self, engine: Engine, policy: PolicySpec, n_steps: int) -> int:
        """Note that so many steps are asked for; returns how many were or are to be."""
        self._asked[engine, policy.policy] += n_steps
        return max(self._asked[engine, policy.policy], self.expected)

    def pays(self, policy: PolicySpec, asked: int, is_compiled: Callable[[], bool]) -> bool:
        """Whether so many steps pay for code; ``is_compiled``: all but the policy's is on disk."""
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
        say(f"policy '{policy.name}' runs interpreted, some 100 times slower: {reason}")


OF_THIS_PROCESS = Compilations()
"""For the Python functions whose caller passes none: what they learn lasts as long as Python."""
