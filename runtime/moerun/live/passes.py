"""The forward passes of a live run, collected whole, and the trace rows that they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from moepolicy import Event, Journal
from moeroute.schema import DECODE, PROMPT
from numpy.typing import NDArray

from moerun.live.session import Session
from moerun.offload.gate import Gate

if TYPE_CHECKING:
    from moeroute import Rows


class Pass(NamedTuple):
    """One forward pass: the tokens it took and what each layer's gate decided for them."""

    sequence: int
    position: int  # of the first token
    phase: int
    token_ids: NDArray[Any]  # [tokens]
    gates: list[Gate]  # by layer


class PassRecorder:
    """Collects whole forward passes of a model that a session serves.

    A pass that was interrupted is not among them, and neither are the calls that it made: the
    journal is cut where the last whole pass ended. Attach it before the first pass.
    """

    def __init__(self, model: Any, session: Session) -> None:
        self.passes: list[Pass] = []
        self.calls = 0
        self.events = 0
        self._session = session
        self._sequence = -1
        self._position = 0
        self._phase = PROMPT
        self._gates: list[Gate] = []
        self._token_ids: NDArray[Any] = np.empty(0, np.int64)
        self._log = EventLog()
        session.reset(journal=[], observers=[self._log])
        session.gate_observers.append(self._on_gate)
        self._hooks = [
            model.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            model.register_forward_hook(self._after_pass),
        ]

    @property
    def journal(self) -> Journal:
        """Calls of the state machine up to the end of the last whole pass."""
        assert self._session.cache.journal is not None
        return self._session.cache.journal[: self.calls]

    @property
    def decisions(self) -> list[Event]:
        """Events of the cache up to the end of the last whole pass."""
        return self._log.events[: self.events]

    def begin_sequence(self) -> None:
        """The next pass begins a text of its own."""
        self._sequence += 1
        self._position = 0
        self._phase = PROMPT

    def detach(self) -> None:
        """Leave the model and the session as they were."""
        for hook in self._hooks:
            hook.remove()
        self._session.gate_observers.remove(self._on_gate)

    def take(self) -> list[Pass]:
        """The passes collected since the last call."""
        taken, self.passes = self.passes, []
        return taken

    def _before_pass(
        self, _model: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        ids = keywords["input_ids"] if "input_ids" in keywords else arguments[0]
        if ids.shape[0] != 1:
            raise AssertionError(f"a batch of {ids.shape[0]} sequences cannot be recorded")
        self._token_ids = ids[0].cpu().numpy()
        self._gates = []

    def _on_gate(self, layer: int, gate: Gate) -> None:
        self._gates.append(gate)

    def _after_pass(self, *_: object) -> None:
        phase = DECODE if len(self._token_ids) == 1 else PROMPT
        if self._phase == PROMPT:
            phase, self._phase = PROMPT, DECODE
        done = Pass(self._sequence, self._position, phase, self._token_ids, self._gates)
        self._position += len(self._token_ids)
        self.passes.append(done)
        with self._session.lock:
            self.calls = len(self._session.cache.journal or ())
            self.events = len(self._log.events)


class EventLog:
    """An observer that keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        """Keep ``event``."""
        self.events.append(event)


def rows_of(passes: list[Pass], horizon: int) -> Rows:
    """Trace rows of whole passes, in order: a prediction goes to the row of the layer it is for."""
    from moeroute.schema import rows_from_columns

    parts = [_columns(done, horizon) for done in passes]
    return rows_from_columns(
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    )


def _columns(done: Pass, horizon: int) -> dict[str, NDArray[Any]]:
    n_tokens, n_layers = len(done.token_ids), len(done.gates)
    n = n_tokens * n_layers
    ids = np.stack([gate.ids for gate in done.gates], axis=1).reshape(n, -1)
    weights = np.stack([gate.weights for gate in done.gates], axis=1).reshape(n, -1)
    order = np.argsort(-weights, axis=1, kind="stable")
    position = done.position + np.arange(n_tokens)
    columns: dict[str, NDArray[Any]] = {
        "sequence": np.full(n, done.sequence, np.uint32),
        "position": np.repeat(position, n_layers).astype(np.uint32),
        "phase": np.full(n, done.phase, np.uint8),
        "token_id": np.repeat(done.token_ids, n_layers).astype(np.uint32),
        "layer": np.tile(np.arange(n_layers), n_tokens).astype(np.uint16),
        "experts": np.take_along_axis(ids, order, axis=1).astype(np.uint16),
        "weights": np.take_along_axis(weights, order, axis=1).astype(np.float32),
    }
    logits = [gate.logits for gate in done.gates if gate.logits is not None]
    if logits:
        columns["router_logits"] = np.stack(logits, axis=1).reshape(n, -1).astype(np.float16)
    for ahead in range(1, horizon + 1):
        columns[f"predicted_logits_{ahead}"] = _predicted(done.gates, ahead).reshape(n, -1)
    return columns


def _predicted(gates: list[Gate], ahead: int) -> NDArray[np.float16]:
    """float16[tokens, layers, experts]: made ``ahead`` layers before; NaN for the first ones."""
    made = [gate.predicted for gate in gates]
    none = np.full_like(made[0][0], np.nan)  # type: ignore[index]
    rows = [none if i < ahead else made[i - ahead][ahead - 1] for i in range(len(gates))]  # type: ignore[index]
    return np.stack(rows, axis=1)
