"""The forward passes of a live run, collected whole, and the trace rows that they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from moepolicy import Event, Journal
from moeroute.schema import DECODE, PROMPT
from numpy.typing import NDArray

from moerun.live.session import Session
from moerun.live.step import by_weight
from moerun.live.texts import Text
from moerun.offload.gate import Gate

if TYPE_CHECKING:
    from moeroute import Rows


class Pass(NamedTuple):
    """The part of a forward pass that is of one text: its tokens, and what the gates decided.

    The gates are of the whole pass, whose rows ``row``, row + 1, ... are this text's. They are
    fewer than there are layers where the pass ended early.
    """

    number: int  # of the forward pass, in order of time
    sequence: int
    position: int  # of the first token
    phase: NDArray[np.uint8]  # [tokens]
    token_ids: NDArray[Any]  # [tokens]
    gates: list[Gate]  # by layer
    row: int = 0


class PassRecorder:
    """Collects the forward passes of a model that a session serves.

    A pass that was interrupted is not among them, and neither are the calls that it made: the
    journal is cut where the last whole pass ended. A pass that ended early, between two layers,
    and was followed by another is there as far as it went. Where the session starts over, after an
    error, the recording ends. Attach it before the first pass.
    """

    def __init__(self, model: Any, session: Session, *, journal: bool = True) -> None:
        """``journal``: keep calls and decisions, too, which grow with each step."""
        self.passes: list[Pass] = []
        self.calls = 0
        self.events = 0
        self.ended = False
        """Whether the session has started over, which no trace can tell."""
        self._session = session
        self._sequences: dict[Text, int] = {}
        self._begun = 0  # sequences
        self._number = -1  # of the pass in progress
        self._rows: list[Pass] = []  # of the pass in progress
        self._gates: list[Gate] = []
        self._log = EventLog()
        self._journal: Journal = []
        session.reset(
            journal=self._journal if journal else None, observers=[self._log] if journal else ()
        )
        self._cache = session.cache
        session.gate_observers.append(self._on_gate)
        self._hooks = [
            model.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            model.register_forward_hook(self._after_pass),
        ]

    @property
    def journal(self) -> Journal:
        """Calls of the state machine up to the end of the last whole pass."""
        return self._journal[: self.calls]

    @property
    def decisions(self) -> list[Event]:
        """Events of the cache up to the end of the last whole pass."""
        return self._log.events[: self.events]

    def begin_sequence(self) -> None:
        """The next pass begins a text of its own, for a caller who runs passes by himself: a
        generation says so of its text."""
        texts = self._session.texts
        for text in texts.rows:
            texts.end(text)
        texts.rows = [texts.begin()]

    def detach(self) -> None:
        """Leave the model and the session as they were."""
        for hook in self._hooks:
            hook.remove()
        self._session.gate_observers.remove(self._on_gate)

    def take(self) -> list[Pass]:
        """The passes collected since the last call."""
        taken, self.passes = self.passes, []
        return taken

    def take_ended(self) -> list[Pass]:
        """The passes, not taken yet, of texts that have ended, up to the first that has not."""
        going_on = [
            number for text, number in self._sequences.items() if self._session.texts.has(text)
        ]
        first = min(going_on, default=self._begun)
        self._sequences = {t: number for t, number in self._sequences.items() if number >= first}
        taken = [part for part in self.passes if part.sequence < first]
        self.passes = [part for part in self.passes if part.sequence >= first]
        return taken

    def _before_pass(
        self, _model: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        if self._session.cache is not self._cache:
            # LRU goes on in the place of a policy that has failed, in the same pass.
            self.ended = self.ended or self._session.policy_failure is None
            self._cache = self._session.cache
        if self.ended:
            return
        if self._rows and self._gates:  # a pass that ended early
            self._keep()
        ids = keywords["input_ids"] if "input_ids" in keywords else arguments[0]
        texts = self._session.texts.rows
        if len(texts) != len(ids):
            raise AssertionError(f"a pass of {len(ids)} rows of {len(texts)} texts is recorded")
        self._number += 1
        self._gates = []
        self._rows = [
            self._part(text, row, given)
            for row, (text, given) in enumerate(zip(texts, ids.cpu().numpy(), strict=True))
        ]

    def _part(self, text: Text, row: int, ids: NDArray[Any]) -> Pass:
        if text not in self._sequences:
            self._sequences[text] = self._begun
            self._begun += 1
        position = text.tokens + np.arange(len(ids))
        prompt = text.tokens + len(ids) if text.prompt is None or len(ids) > 1 else text.prompt
        phase = np.where(position < prompt, PROMPT, DECODE).astype(np.uint8)
        sequence = self._sequences[text]
        return Pass(self._number, sequence, text.tokens, phase, ids, self._gates, row * len(ids))

    def _on_gate(self, layer: int, gate: Gate) -> None:
        self._gates.append(gate)

    def _after_pass(self, *_: object) -> None:
        if self.ended:
            return
        self._keep()
        with self._session.lock:
            self.calls = len(self._journal)
            self.events = len(self._log.events)

    def _keep(self) -> None:
        self.passes += [part._replace(gates=self._gates) for part in self._rows]
        self._rows, self._gates = [], []


class EventLog:
    """An observer that keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        """Keep ``event``."""
        self.events.append(event)


def rows_of(passes: list[Pass], horizon: int) -> Rows:
    """Trace rows of passes: a prediction goes to the row of the layer it is for."""
    from moeroute.schema import rows_from_columns

    ordered = sorted(passes, key=lambda part: (part.sequence, part.position))
    parts = [_columns(part, horizon) for part in ordered]
    return rows_from_columns(
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    )


def _columns(done: Pass, horizon: int) -> dict[str, NDArray[Any]]:
    n_tokens, n_layers = len(done.token_ids), len(done.gates)
    gates = [_cut(gate, done.row, done.row + n_tokens) for gate in done.gates]
    n = n_tokens * n_layers
    ids = np.stack([gate.ids for gate in gates], axis=1).reshape(n, -1)
    weights = np.stack([gate.weights for gate in gates], axis=1).reshape(n, -1)
    order = by_weight(weights)
    position = done.position + np.arange(n_tokens)
    columns: dict[str, NDArray[Any]] = {
        "sequence": np.full(n, done.sequence, np.uint32),
        "position": np.repeat(position, n_layers).astype(np.uint32),
        "phase": np.repeat(done.phase, n_layers).astype(np.uint8),
        "pass_id": np.full(n, done.number, np.uint32),
        "token_id": np.repeat(done.token_ids, n_layers).astype(np.uint32),
        "layer": np.tile(np.arange(n_layers), n_tokens).astype(np.uint16),
        "experts": np.take_along_axis(ids, order, axis=1).astype(np.uint16),
        "weights": np.take_along_axis(weights, order, axis=1).astype(np.float32),
    }
    logits = [gate.logits for gate in gates if gate.logits is not None]
    if logits:
        columns["router_logits"] = np.stack(logits, axis=1).reshape(n, -1).astype(np.float16)
    for ahead in range(1, horizon + 1):
        columns[f"predicted_logits_{ahead}"] = _predicted(gates, ahead).reshape(n, -1)
    return columns


def _cut(gate: Gate, first: int, last: int) -> Gate:
    """What a gate decided for tokens first..last-1 of a pass."""
    logits, predicted = gate.logits, gate.predicted
    return Gate(
        gate.ids[first:last],
        gate.weights[first:last],
        None if logits is None else logits[first:last],
        None if predicted is None else predicted[:, first:last],
    )


def _predicted(gates: list[Gate], ahead: int) -> NDArray[np.float16]:
    """float16[tokens, layers, experts]: made ``ahead`` layers before; NaN for the first ones."""
    made = [gate.predicted for gate in gates]
    none = np.full_like(made[0][0], np.nan)  # type: ignore[index]
    rows = [none if i < ahead else made[i - ahead][ahead - 1] for i in range(len(gates))]  # type: ignore[index]
    return np.stack(rows, axis=1)
