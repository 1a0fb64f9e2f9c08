"""What a live run leaves behind: its trace, and the journal from which a replay repeats it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepolicy.outputs import written_whole

from moerun.errors import RunError
from moerun.format.precision import NATIVE, PLAIN, PRECISIONS
from moerun.live.passes import Pass, PassRecorder, rows_of
from moerun.store.index import StoreIndex
from moerun.versions import run_packages

if TYPE_CHECKING:
    from moeroute import TraceMeta, TraceWriter

    from moerun.live.runner import Runner


class LiveRecording:
    """The files a live run leaves: its trace, its journal, or both.

    No file is there until ``finish`` has made it whole. Until then passes are kept in memory, or
    those of texts that have ended on disk, where ``write_ended`` is called.
    """

    def __init__(
        self, runner: Runner, trace: Path | None, journal: Path | None, seed: int | None
    ) -> None:
        """``seed``: None where each text has its own. Raises TraceError or RunError when a file
        could not be written there."""
        if journal is not None and not journal.parent.is_dir():
            raise RunError(f"{journal}: the folder {journal.parent} does not exist")
        self._runner = runner
        self._trace, self._journal = trace, journal
        self._discarded = False
        self._writer: TraceWriter | None = None
        if trace is not None:
            from moeroute import TraceWriter

            self._writer = TraceWriter(trace, live_meta(runner, seed), counts_missing=True)
        self.recorder = PassRecorder(runner.model, runner.session, journal=journal is not None)

    def write_ended(self) -> None:
        """Bring what has been recorded of texts that have ended to disk, as far as the file's
        order of texts allows. Raises TraceError or OSError, after which there is no recording."""
        passes = self.recorder.take_ended()
        if self._writer is None or not passes:
            return
        try:
            self._writer.write(rows_of(passes, self._runner.settings.predicts))
        except BaseException:
            self.discard()
            raise

    def finish(self) -> list[Path]:
        """Write all whole passes; the files that are there now. A run without a pass leaves none.

        Where the policy failed and LRU went on, no journal could repeat the run: none is written.
        Where one of the files cannot be written, neither is left.
        """
        if self._discarded:
            return []
        self.recorder.detach()
        passes = self.recorder.take()
        try:
            return self._write(passes)
        except BaseException:
            if self._writer is not None:
                self._writer.discard()
            raise

    def _write(self, passes: list[Pass]) -> list[Path]:
        written: list[Path] = []
        writer = self._writer
        if writer is not None and passes:
            writer.write(rows_of(passes, self._runner.settings.predicts))
        if writer is not None and not writer.n_rows:
            writer.discard()
            return written
        before = _inode(self._journal)
        try:
            with ExitStack() as stack:
                if self._journal is not None and self._runner.session.policy_failure is None:
                    # Written before there is a trace, and named after that.
                    unfinished = stack.enter_context(written_whole(self._journal))
                    document = journal_document(self.recorder, self._runner, self._trace)
                    text = json.dumps(document, separators=(",", ":"))
                    unfinished.write_text(text, encoding="utf-8")
                    written.append(self._journal)
                if writer is not None:
                    writer.close()
                    written.insert(0, writer.path)
        except BaseException:
            if writer is not None and writer.has_name:  # and nobody may know of the journal's
                writer.path.unlink(missing_ok=True)
            if self._journal is not None and _inode(self._journal) != before:
                self._journal.unlink(missing_ok=True)
            raise
        return written

    def discard(self) -> None:
        """Leave nothing behind."""
        if self._discarded:
            return
        self._discarded = True
        self.recorder.detach()
        if self._writer is not None:
            self._writer.discard()


def live_meta(runner: Runner, seed: int | None) -> TraceMeta:
    """The metadata of a trace of this runner's model, as it is run.

    The trace holds the gates' own choice, also where a policy's routing gives tokens other experts:
    such a policy is asked again when the trace is replayed.
    """
    from moeroute import TraceMeta

    index, context, predictor = runner.store.index, runner.context, runner.predictor
    rule = runner.weight_rule
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
        weight_rule=rule.name if rule else None,
        weight_scale=rule.scale if rule else None,
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
    own = index.expert_format
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


def _inode(path: Path | None) -> int | None:
    """What tells a file from one that takes its place; None where there is none."""
    return path.stat().st_ino if path is not None and path.exists() else None


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
