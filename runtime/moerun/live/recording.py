"""What a live run leaves behind: its trace, and the journal from which a replay repeats it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from moepolicy import Event, Journal
from moepolicy.outputs import written_whole
from moeroute.schema import DECODE, PROMPT
from numpy.typing import NDArray

from moerun.errors import RunError
from moerun.format.precision import NATIVE, PLAIN, PRECISIONS
from moerun.live.session import Session
from moerun.offload.gate import Gate
from moerun.store.index import StoreIndex
from moerun.versions import run_packages

if TYPE_CHECKING:
    from moeroute import Rows, TraceMeta, TraceWriter

    from moerun.live.runner import Runner


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
        self._n_layers = session.context.n_layers
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
        assert self._session.cache.journal is not None
        return self._session.cache.journal[: self.calls]

    @property
    def decisions(self) -> list[Event]:
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


class LiveRecording:
    """The files a live run leaves: its trace, its journal, or both.

    Nothing is written while tokens are being decoded, and no file is there until ``finish`` has
    made it whole.
    """

    def __init__(self, runner: Runner, trace: Path | None, journal: Path | None, seed: int) -> None:
        """Raises TraceError or RunError when a file could not be written there."""
        if journal is not None and not journal.parent.is_dir():
            raise RunError(f"{journal}: the folder {journal.parent} does not exist")
        self._runner = runner
        self._trace, self._journal = trace, journal
        self._writer: TraceWriter | None = None
        if trace is not None:
            from moeroute import TraceWriter

            self._writer = TraceWriter(trace, live_meta(runner, seed))
        self.recorder = PassRecorder(runner.model, runner.session)

    def finish(self) -> None:
        """Write all whole passes so far; a run without one leaves nothing."""
        self.recorder.detach()
        passes = self.recorder.take()
        if self._writer is not None:
            if not passes:
                self._writer.discard()
                return
            self._writer.write(rows_of(passes, self._runner.settings.predicts))
            self._writer.close()
        if self._journal is not None:
            document = journal_document(self.recorder, self._runner, self._trace)
            with written_whole(self._journal) as unfinished:
                text = json.dumps(document, separators=(",", ":"))
                unfinished.write_text(text, encoding="utf-8")

    def discard(self) -> None:
        """Leave nothing behind."""
        self.recorder.detach()
        if self._writer is not None:
            self._writer.discard()


def live_meta(runner: Runner, seed: int) -> TraceMeta:
    """The metadata of a trace of this runner's model, as it is run."""
    from moeroute import TraceMeta

    index, context, predictor = runner.store.index, runner.context, runner.predictor
    return TraceMeta(
        source="live",
        model=index.model,
        revision=index.revision,
        n_layers=context.n_layers,
        n_experts=context.n_experts,
        top_k=context.top_k,
        n_shared_experts=index.n_shared_experts,
        expert_bytes=expert_bytes(index),
        expert_params=index.shape.n_weights,
        layer_bytes=index.layer_bytes,
        token_bytes=index.token_bytes,
        dense_precision=dense_label(index),
        prediction=predictor.method if predictor else None,
        horizon=predictor.horizon if predictor else 0,
        tokenizer=index.model,
        seed=seed,
        packages=run_packages(),
        notes={
            "policy": runner.settings.policy.label,
            "slots": str(context.slots),
            "scope": context.scope,
            "device": str(runner.settings.device),
            **({"low": low.index.precision} if (low := runner.settings.low) else {}),
        },
    )


def expert_bytes(index: StoreIndex) -> dict[str, int]:
    """Bytes of one expert's record by precision, the store's own first."""
    own = index.precision
    if own == NATIVE:
        own = plain_name(index.layout.parts[0].dtype)
    sizes = {own: index.layout.record_bytes}
    for precision in PRECISIONS:
        try:
            sizes.setdefault(precision, index.shape.record(precision).record_bytes)
        except RunError:  # this expert's shape does not divide so
            continue
    if own != NATIVE:
        del sizes[NATIVE]
    return sizes


def dense_label(index: StoreIndex) -> str:
    """What the dense weights' sizes in a trace count them as."""
    own = index.dense_precision
    if own == NATIVE:
        own = plain_name(index.shape.params[0].dtype)
    attention = index.attention_precision
    return own if attention in (NATIVE, own) else f"{own}, attention {attention}"


def plain_name(dtype: Any) -> str:
    """A dtype as traces name it; "native" for one that has no name there."""
    return next((name for name, plain in PLAIN.items() if plain is dtype), NATIVE)


def journal_document(recorder: PassRecorder, runner: Runner, trace: Path | None) -> dict[str, Any]:
    """The calls and decisions of a run: enough, with its trace, to repeat it exactly."""
    context = runner.session.cache.context  # from which the calls of the journal lead on
    return {
        "policy": runner.settings.policy.label,
        "n_layers": context.n_layers,
        "n_experts": context.n_experts,
        "top_k": context.top_k,
        "slots": context.slots,
        "scope": context.scope,
        "trace": str(trace) if trace else None,
        "calls": recorder.journal,
        "events": [[int(e.kind), e.step, e.key, e.other] for e in recorder.decisions],
    }
