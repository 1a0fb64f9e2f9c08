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

from moepolicy.compiled import allow_memory
from moepolicy.guard import guarded
from moepolicy.kinds import HIT, LATE, MISS
from moepolicy.machine import begin, consume, end, finish, start
from moepolicy.pointers import Missing, engine, link, missing, pointed
from moepolicy.policy import Policy
from moepolicy.resize import resize
from moepolicy.routing import RoutingBuffers, reroute
from moepolicy.state import Cache
from moepolicy.steps import Step, TokenRows


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


# Plain integers for compiled code, and for calls that are made often.
BEGIN, START, FINISH = int(Call.BEGIN), int(Call.START), int(Call.FINISH)
CONSUME, END, RESIZE = int(Call.CONSUME), int(Call.END), int(Call.RESIZE)


class Calls:
    """The state machine of one cache and policy, as Python runs it."""

    def __init__(self, cache: Cache, policy: Policy) -> None:
        self.cache = cache
        self.policy = policy
        self._asked = guarded(policy)
        # A view takes single entries in half the time that the array does.
        self._backlog, self._counters = cache.backlog.data, cache.counters.data
        consumed: Any = cache.consumed.data
        self._consumed = cache._replace(consumed=consumed)
        self._outcome = np.zeros(cache.n_experts, np.int8)

    def begin(self, step: Step) -> NDArray[np.int8]:
        """What becomes of each key; the step's backlog and counts are the cache's now."""
        outcome = self._outcome[: len(step.experts)]
        begin(self.cache, self._asked, self._informed(step), outcome)
        return outcome

    def _informed(self, step: Step) -> Step:
        counters = self._counters
        return step._replace(
            backlog=self._backlog[0],
            hits=counters[HIT],
            late=counters[LATE],
            misses=counters[MISS],
        )

    def reroute(self, step: Step, rows: TokenRows, routing: RoutingBuffers) -> int:
        """Ask the policy which experts each row gets (see `moepolicy.routing.reroute`)."""
        return reroute(self.cache, self._asked, self._informed(step), rows, routing)

    def start(self) -> int:
        """The key whose copy is to start now; -1 where none can."""
        return start(self.cache, self._asked)

    def finish(self, key: int) -> None:
        """The copy of ``key`` has arrived."""
        finish(self.cache, self._asked, key)

    def consume(self, key: int) -> None:
        """Note that the step's compute has finished with ``key``.

        Compiled or not: to resume compiled code takes longer than to set an entry."""
        consume(self._consumed, key)

    def end(self) -> None:
        """End the step: its pins drop, and bypassed experts leave their buffers."""
        end(self.cache, self._asked)

    def resize(self, slots: int) -> None:
        """Give the cache ``slots`` slots a layer, as soon as what it loses can go."""
        resize(self.cache, self._asked, slots)


# Entries of Mail.slip: the call and what it is about, then the rest of a step.
SLIP_CALL = 0
SLIP_ABOUT = 1  # the step's number, a key or slots; on return what the call gave
SLIP_LAYER = 2
SLIP_N_EXPERTS = 3  # that the step demands
SLIP_TOKENS = 4
SLIP_N_LOGITS = 5
SLIP_HORIZON = 6
SLIP_N_TOKEN_IDS = 7
SLIP_BEGINS_PASS = 8
SLIP_BEGINS_SEQUENCE = 9
SLIP_ENTRIES = 10


class Mail(NamedTuple):
    """What passes between Python and the compiled generator."""

    slip: NDArray[np.int64]  # [SLIP_ENTRIES]
    experts: NDArray[np.int32]  # [n_experts] a step's arrays, in their first entries
    weights: NDArray[np.float32]  # [n_experts]
    logits: NDArray[np.float32]  # [n_experts]
    predicted: NDArray[np.float32]  # [horizon, n_experts]
    token_ids: NDArray[np.int32]  # [tokens] of a step, in its first entries
    outcome: NDArray[np.int8]  # [n_experts]


def new_mail(n_experts: int, horizon: int) -> Mail:
    """Room for a step of at most so many experts and rows of predictions."""
    return Mail(
        slip=np.zeros(SLIP_ENTRIES, np.int64),
        experts=np.zeros(n_experts, np.int32),
        weights=np.zeros(n_experts, np.float32),
        logits=np.zeros(n_experts, np.float32),
        predicted=np.zeros((horizon, n_experts), np.float32),
        token_ids=np.zeros(1, np.int32),
        outcome=np.zeros(n_experts, np.int8),
    )


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
                cache.backlog[0],
                mail.token_ids[: slip[SLIP_N_TOKEN_IDS]],
                slip[SLIP_BEGINS_PASS] != 0,
                slip[SLIP_BEGINS_SEQUENCE] != 0,
                cache.counters[HIT],
                cache.counters[LATE],
                cache.counters[MISS],
            )
            begin(cache, policy, step, mail.outcome)
        elif call == START:
            slip[SLIP_ABOUT] = start(cache, policy)
        elif call == FINISH:
            finish(cache, policy, slip[SLIP_ABOUT])
        elif call == RESIZE:
            resize(cache, policy, slip[SLIP_ABOUT])
        else:
            end(cache, policy)


class CompiledCalls(Calls):
    """The same calls compiled; the state stays in the same arrays."""

    def __init__(self, cache: Cache, policy: Policy, horizon: int) -> None:
        """``horizon`` is the most rows of predictions a step has; any more are left out. Raises
        NotCompilable, or numba's own errors, where the policy is beyond compiling."""
        super().__init__(cache, policy)
        self._mail = new_mail(cache.n_experts, horizon)
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
        self._linked = link(self.cache, self.policy)
        self._pointed = pointed(self._mail)
        serve = engine(answer_mail, self._linked)
        self._resume = serve(*self._linked, self._pointed).__next__
        self._resume()

    def begin(self, step: Step) -> NDArray[np.int8]:
        """Copy the step in, and begin it; the outcome of each key is there until the next."""
        mail = self._mail
        n = len(step.experts)
        mail.experts[:n] = step.experts
        mail.weights[:n] = step.weights
        if n_logits := len(step.logits):
            mail.logits[:] = step.logits
        if horizon := len(step.predicted):
            horizon = min(horizon, len(mail.predicted))
            mail.predicted[:horizon] = step.predicted[:horizon]
        if n_ids := len(step.token_ids):
            mail = self._with_room_for(n_ids)
            mail.token_ids[:n_ids] = step.token_ids
        slip = self._slip
        slip[SLIP_CALL] = BEGIN
        slip[SLIP_ABOUT] = step.number
        slip[SLIP_LAYER] = step.layer
        slip[SLIP_N_EXPERTS] = n
        slip[SLIP_TOKENS] = step.tokens
        slip[SLIP_N_LOGITS] = n_logits
        slip[SLIP_HORIZON] = horizon
        slip[SLIP_N_TOKEN_IDS] = n_ids
        slip[SLIP_BEGINS_PASS] = step.begins_pass
        slip[SLIP_BEGINS_SEQUENCE] = step.begins_sequence
        self._resume()
        return mail.outcome[:n]

    def start(self) -> int:
        """The key whose copy is to start now; -1 where none can."""
        slip = self._slip
        slip[SLIP_CALL] = START
        self._resume()
        return slip[SLIP_ABOUT]

    def finish(self, key: int) -> None:
        """The copy of ``key`` has arrived."""
        self._call(FINISH, key)

    def end(self) -> None:
        """Resume the compiled code for the end of a step."""
        self._call(END, -1)

    def resize(self, slots: int) -> None:
        """Resume the compiled code for a change to ``slots`` slots a layer."""
        self._call(RESIZE, slots)

    def _with_room_for(self, n_ids: int) -> Mail:
        """The mail, with room for so many token ids: a longer array needs another generator."""
        if n_ids > len(self._mail.token_ids):
            self._mail = self._mail._replace(token_ids=np.zeros(2 * n_ids, np.int32))
            self._serve()
        return self._mail

    def _call(self, call: int, about: int) -> None:
        slip = self._slip
        slip[SLIP_CALL] = call
        slip[SLIP_ABOUT] = about
        self._resume()


def lacking_calls(cache: Cache, policy: Policy) -> Missing:
    """What of these calls an earlier run has not left compiled on disk. Raises NotCompilable."""
    return missing(answer_mail, cache, policy)
