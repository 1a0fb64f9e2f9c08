"""The calls that drive the state machine, interpreted or compiled, for those who hold its clock.

A compiled function would unpack the arrays of cache and policy at every call, which takes longer
than the call itself. A compiled generator keeps them: a call fills a mailbox and resumes it.
"""

from __future__ import annotations

from collections.abc import Generator
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moepolicy import machine
from moepolicy.compiled import allow_memory, compiled, compiled_policy, is_compiled
from moepolicy.machine import begin, consume, end, finish, start
from moepolicy.policy import Policy
from moepolicy.resize import resize
from moepolicy.state import Cache
from moepolicy.steps import Step


class Call(IntEnum):
    """The calls that drive the state machine; a journal is a list of (call, key).

    The key of a BEGIN is the step's number, that of a START or END -1, that of a RESIZE the new
    slots a layer."""

    BEGIN = 0
    START = 1
    FINISH = 2
    CONSUME = 3
    END = 4
    RESIZE = 5


class Calls:
    """The state machine of one cache and policy, as Python runs it."""

    def __init__(self, cache: Cache, policy: Policy) -> None:
        self.cache = cache
        self.policy = policy

    def begin(self, step: Step, outcome: NDArray[np.int8]) -> None:
        """Write what becomes of each key; the step's backlog is the link's as it is now."""
        step = step._replace(backlog=self.cache.backlog.item())
        begin(self.cache, self.policy, step, outcome)

    def start(self) -> int:
        """The key whose copy is to start now; -1 where none can."""
        return start(self.cache, self.policy)

    def finish(self, key: int) -> None:
        """The copy of ``key`` has arrived."""
        finish(self.cache, self.policy, key)

    def consume(self, key: int) -> None:
        """Note that the step's compute has finished with ``key``."""
        consume(self.cache, key)

    def end(self) -> None:
        """End the step: its pins drop, and bypassed experts leave their buffers."""
        end(self.cache, self.policy)

    def resize(self, slots: int) -> None:
        """Give the cache ``slots`` slots a layer, as soon as what it loses can go."""
        resize(self.cache, self.policy, slots)


# Entries of Mail.slip: the call and what it is about, then the rest of a step.
SLIP_CALL = 0
SLIP_ABOUT = 1  # the step's number, a key or slots; on return what the call gave
SLIP_LAYER = 2
SLIP_N_EXPERTS = 3  # that the step demands
SLIP_TOKENS = 4
SLIP_BACKLOG = 5
SLIP_N_LOGITS = 6
SLIP_HORIZON = 7
SLIP_ENTRIES = 8

BEGIN, START, FINISH = int(Call.BEGIN), int(Call.START), int(Call.FINISH)
CONSUME, END, RESIZE = int(Call.CONSUME), int(Call.END), int(Call.RESIZE)


class Mail(NamedTuple):
    """What passes between Python and the compiled generator."""

    slip: NDArray[np.int64]  # [SLIP_ENTRIES]
    experts: NDArray[np.int32]  # [n_experts] a step's arrays, in their first entries
    weights: NDArray[np.float32]  # [n_experts]
    logits: NDArray[np.float32]  # [n_experts]
    predicted: NDArray[np.float32]  # [horizon, n_experts]
    outcome: NDArray[np.int8]  # [n_experts]


def answer_mail(cache: Cache, policy: Any, mail: Mail) -> Generator[int, None, None]:
    """Serve one call after another, for ever; a call that raises ends it."""
    slip = mail.slip
    while True:
        yield 0
        call = slip[SLIP_CALL]
        if call == BEGIN:
            n = slip[SLIP_N_EXPERTS]
            step = Step(
                slip[SLIP_ABOUT],
                slip[SLIP_LAYER],
                mail.experts[:n],
                mail.weights[:n],
                mail.logits[: slip[SLIP_N_LOGITS]],
                mail.predicted[: slip[SLIP_HORIZON]],
                slip[SLIP_TOKENS],
                slip[SLIP_BACKLOG],
            )
            begin(cache, policy, step, mail.outcome)
        elif call == START:
            slip[SLIP_ABOUT] = start(cache, policy)
        elif call == FINISH:
            finish(cache, policy, slip[SLIP_ABOUT])
        elif call == CONSUME:
            consume(cache, slip[SLIP_ABOUT])
        elif call == RESIZE:
            resize(cache, policy, slip[SLIP_ABOUT])
        else:
            end(cache, policy)


class CompiledCalls(Calls):
    """The same calls compiled together with the policy; the state stays in the same arrays."""

    def __init__(self, cache: Cache, policy: Policy, horizon: int) -> None:
        """``horizon`` is the most rows of predictions a step has; any more are left out. Raises
        NotCompilable, or numba's own errors, where the policy is beyond compiling."""
        super().__init__(cache, policy)
        n = cache.n_experts
        self._mail = Mail(
            slip=np.zeros(SLIP_ENTRIES, np.int64),
            experts=np.zeros(n, np.int32),
            weights=np.zeros(n, np.float32),
            logits=np.zeros(n, np.float32),
            predicted=np.zeros((horizon, n), np.float32),
            outcome=np.zeros(n, np.int8),
        )
        # A view takes single entries in half the time that the array does.
        self._slip = self._mail.slip.data
        # The generator refers to these arrays and counts no references: they must outlive it.
        try:
            self._serve()
        except Exception as error:
            if not allow_memory(policy, error):
                raise
            self._serve()

    def _serve(self) -> None:
        self._state = compiled_policy(self.policy)
        serve = compiled(answer_mail, self._state, omit=machine.unreachable(self.cache))
        self._resume = serve(self.cache, self._state, self._mail).__next__
        self._resume()

    def begin(self, step: Step, outcome: NDArray[np.int8]) -> None:
        """Copy the step in, begin the step, and copy the outcome of each key out."""
        mail = self._mail
        n = len(step.experts)
        mail.experts[:n] = step.experts
        mail.weights[:n] = step.weights
        n_logits, horizon = len(step.logits), min(len(step.predicted), len(mail.predicted))
        if n_logits:
            mail.logits[:] = step.logits
        if horizon:
            mail.predicted[:horizon] = step.predicted[:horizon]
        slip = self._slip
        slip[SLIP_CALL] = BEGIN
        slip[SLIP_ABOUT] = step.number
        slip[SLIP_LAYER] = step.layer
        slip[SLIP_N_EXPERTS] = n
        slip[SLIP_TOKENS] = step.tokens
        slip[SLIP_BACKLOG] = self.cache.backlog.item()
        slip[SLIP_N_LOGITS] = n_logits
        slip[SLIP_HORIZON] = horizon
        self._resume()
        outcome[:] = mail.outcome[:n]

    def start(self) -> int:
        """The key whose copy is to start now; -1 where none can."""
        slip = self._slip
        slip[SLIP_CALL] = START
        self._resume()
        return slip[SLIP_ABOUT]

    def finish(self, key: int) -> None:
        """The copy of ``key`` has arrived."""
        self._call(FINISH, key)

    def consume(self, key: int) -> None:
        """Resume the compiled code for the end of compute with ``key``."""
        self._call(CONSUME, key)

    def end(self) -> None:
        """Resume the compiled code for the end of a step."""
        self._call(END, -1)

    def resize(self, slots: int) -> None:
        """Resume the compiled code for a change to ``slots`` slots a layer."""
        self._call(RESIZE, slots)

    def _call(self, call: int, about: int) -> None:
        slip = self._slip
        slip[SLIP_CALL] = call
        slip[SLIP_ABOUT] = about
        self._resume()


def calls_are_compiled(cache: Cache, policy: Policy) -> bool:
    """Whether an earlier run has left these calls compiled on disk."""
    return is_compiled(answer_mail, policy, omit=machine.unreachable(cache))
