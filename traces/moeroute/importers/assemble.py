"""From a recording in its file's order to a trace: the steps that all importers share.

The rows are sorted, those that are there twice dropped, experts put into descending order of
weight, layers and experts that are none of the model's routed ones taken out, and all of it is
noted. Wide columns go through the disk: a recording may be larger than memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import moeroute.importers.order as ordering
from moeroute.importers.intake import BY_SLOT, Intake
from moeroute.importers.order import Ordered
from moeroute.importers.recording import Columns, ImportOptions, Recording
from moeroute.importers.telling import (
    WideTotals,
    tell_incomplete,
    tell_phases,
    tell_positions,
    tell_unknown,
)
from moeroute.naming import sha256_of
from moeroute.schema import (
    DECODE,
    NO_EXPERT,
    PREDICTED,
    PROMPT,
    TraceError,
    TraceMeta,
    rows_from_columns,
)
from moeroute.sizes import GivenSizes
from moeroute.trace import Trace, open_trace
from moeroute.weight_rules import detect_weight_rule
from moeroute.writer import TraceWriter

_BATCH_BYTES = 32 << 20
_TELLING_ROWS = 32  # in fewer, an expert may be in every row by chance
_RULE_ROWS = 4096  # that tell the rule of the weights


def write_recording(
    recording: Recording,
    out: str | Path,
    options: ImportOptions,
    sizes: GivenSizes,
    scratch: Path | None = None,
) -> Trace:
    """Write the trace, leaving nothing at `out` if a row is wrong, and open it.

    `scratch` as for `import_foreign`.
    Raises TraceError naming the file, the place in it, the column and the value.
    """
    folder = Path(out).absolute().parent
    if not folder.is_dir():
        raise TraceError(f"{out}: the folder {folder} does not exist")
    with ExitStack() as stack:
        if scratch is None:
            made = tempfile.TemporaryDirectory(prefix=f".{Path(out).name}-", dir=folder)
            scratch = Path(stack.enter_context(made))
        _Assembly(recording, scratch, options, sizes).write(Path(out))
    return open_trace(Path(out))


class _Assembly:
    """One recording on its way to a trace.

    The class is long because each pass over the rows needs what the passes before it found.
    """

    def __init__(
        self, recording: Recording, scratch: Path, options: ImportOptions, sizes: GivenSizes
    ) -> None:
        self.recording = recording
        self.options, self.sizes = options, sizes
        self.path, self.facts = recording.path, recording.facts
        self.findings = recording.findings
        self.intake = Intake(recording, scratch)
        if not self.intake.n_rows:
            why = f": {self.intake.dropped} rows, none with an expert" * bool(self.intake.dropped)
            raise TraceError(f"{self.path}: holds no routing: there is no row to import{why}")
        self.intake.uses[NO_EXPERT] = 0
        self.totals = WideTotals()
        self.shared: list[int] = []

    def write(self, out: Path) -> None:
        """The steps in their order."""
        self._tell_intake()
        keys = self.intake.keys()
        keep, n_layers = self._number_layers(keys)
        rows = ordering.sort(keys)
        if keep is not None:
            rows = rows.without(~keep[rows.order])
        rows = self._without_repeats(rows)
        self._find_phases(rows)
        rows = ordering.keep_time(rows, self.findings)
        tell_phases(rows.keys, self.findings)
        tell_positions(rows.keys, self.findings)
        meta = self._meta(rows, n_layers)
        names = {*rows.keys, *self.intake.names()}
        tell_unknown(meta, names, self.findings)
        for name, note in meta.notes.items():
            self.findings.note(name, note)
        self._write_rows(out, meta, rows)

    def _tell_intake(self) -> None:
        taken = self.intake
        dropped = int(taken.empty_of_layer[taken.rows_of_layer > 0].sum())
        self.findings.count(
            "dropped",
            dropped,
            "(token, layer) rows without any expert (tokens dropped, or filling a batch up)",
            of=taken.n_rows + dropped,
        )
        if taken.variable:
            self.findings.note("top_k", "varies: rows choose different numbers of experts")
        if taken.partial:
            self.findings.note("left_out", f"not in all rows: {', '.join(taken.partial)}")
        made = taken.numbering.made
        if "position" in made:
            self.findings.note(
                "tokens", "unknown: a token begins where the layers begin anew in the file"
            )

    def _number_layers(self, keys: Columns) -> tuple[NDArray[np.bool_] | None, int]:
        """Leave out layers without experts and number the others; which rows stay, and how many
        layers there are."""
        n_rows, alike = self.intake.rows_of_layer, self.intake.alike_of_layer
        filled = self.intake.empty_of_layer > 0
        dense = np.flatnonzero((alike == n_rows) & ((n_rows > 0) | filled))
        present = np.flatnonzero((n_rows > 0) & (alike < n_rows))
        if not len(present):
            raise TraceError(
                f"{self.path}: {self.intake.where(0)}, column experts: every row names one expert "
                "several times: no layer has experts"
            )
        said = self.facts.n_layers
        if said is not None and not len(dense):
            return None, said
        kept = [i for i in range(said) if i not in set(dense.tolist())] if said else present
        layers = np.asarray(kept)
        if len(dense):
            named = ", ".join(map(str, dense[:8])) + (", ..." if len(dense) > 8 else "")
            self.findings.note("dense_layers", f"layers without experts left out: {named}")
        if layers.tolist() != list(range(len(layers))):
            self.findings.keep("model_layers", layers.tolist())
            self.findings.note(
                "renumbered",
                f"layers {layers[0]} to {layers[-1]} of the file, {len(layers)} of which have "
                f"experts, are 0 to {len(layers) - 1} now",
            )
        keep = None
        if len(dense):
            keep = ~np.isin(keys["layer"], dense)
        keys["layer"] = np.searchsorted(layers, keys["layer"]).astype(np.uint16)
        return keep, len(layers)

    def _without_repeats(self, rows: Ordered) -> Ordered:
        again = ordering.repeated(rows)
        if not again.any():
            return rows
        now = np.flatnonzero(again)
        size = self._batch_rows()
        for start in range(0, len(now), size):
            some = now[start : start + size]
            self._refuse_contradictions(rows, some)
        self.findings.count("duplicates", len(now), "rows that repeat another: dropped")
        return rows.without(again)

    def _refuse_contradictions(self, rows: Ordered, now: NDArray[np.intp]) -> None:
        columns = {n: (rows.keys[n][now - 1], rows.keys[n][now]) for n in rows.keys}
        for name in self.intake.names():
            first, second = (self.intake.spool.rows(name, rows.order[at]) for at in (now - 1, now))
            columns[name] = first, second
        for name, pair in columns.items():
            wide, other = (part.reshape(len(now), -1) for part in pair)
            same = (wide == other) | (_is_nan(wide) & _is_nan(other))
            for i in np.flatnonzero(~same.all(axis=1))[:1]:
                where = [self.intake.where(int(rows.order[at])) for at in (now[i] - 1, now[i])]
                at = {n: int(rows.keys[n][now[i]]) for n in ("sequence", "position", "layer")}
                raise TraceError(
                    f"{self.path}: {where[0]} and {where[1]} are both "
                    + ", ".join(f"{n} {value}" for n, value in at.items())
                    + f", but differ in {name}"
                )

    def _find_phases(self, rows: Ordered) -> None:
        """Work out which tokens are prompt, where the file does not tell."""
        keys = rows.keys
        if "phase" in keys:
            if self.options.prompt_tokens is not None:
                self.findings.note("prompt_tokens", "not used: the file tells which are prompt")
            return
        n_tokens = len(ordering.begins(ordering.token_of(keys)))
        phase = np.full(len(rows.order), DECODE, np.uint8)
        first = self.options.prompt_tokens
        why = f"unknown ({self.facts.phase})"
        if first is not None:
            phase[keys["position"] < first] = PROMPT
            self.findings.note("phase", f"{why}: the first {first} of each sequence are prompt")
        elif "pass_id" in keys:
            one_layer = keys["layer"] == keys["layer"][0]
            _, of, tokens = np.unique(keys["pass_id"], return_inverse=True, return_counts=True)
            tokens = np.bincount(of[one_layer], minlength=len(tokens))
            phase[tokens[of] > tokens.min()] = PROMPT
            self.findings.note(
                "phase",
                f"{why}: passes of {tokens.min()} tokens, the smallest, count as decode, larger "
                "ones as prompt",
            )
        else:
            self.findings.note("phase", f"{why}: all {n_tokens} tokens are decode")
        keys["phase"] = phase

    def _meta(self, rows: Ordered, n_layers: int) -> TraceMeta:
        facts = self.facts
        width = self.intake.spool.files["experts"].width or 0
        n_experts = self._n_experts(width)
        may_have_shared = self.options.n_experts is None or n_experts > self.options.n_experts
        if 1 < width < n_experts and may_have_shared and self.intake.n_counted >= _TELLING_ROWS:
            n_experts, width = self._find_shared(n_experts, width)
        rule, scale = self._rule(rows)
        horizon = sum(name.startswith(PREDICTED) for name in self.intake.names())
        meta = TraceMeta(
            source="imported",
            model=self.options.model or facts.model,
            revision=facts.revision,
            n_layers=n_layers,
            n_experts=n_experts,
            top_k=width,
            n_shared_experts=facts.n_shared_experts + len(self.shared),
            variable_top_k=self.intake.variable,
            physical_to_logical=facts.physical_to_logical,
            expert_bytes=facts.expert_bytes,
            layer_bytes=facts.layer_bytes,
            token_bytes=facts.token_bytes,
            prediction=facts.prediction if horizon else None,
            horizon=horizon,
            weight_rule=rule,
            weight_scale=scale,
            missing_rows=tell_incomplete(rows.keys, n_layers, self.findings),
        )
        return self.sizes.on(meta)

    def _n_experts(self, width: int) -> int:
        said = self.facts.n_experts
        if said is not None:
            return said
        largest = int(np.flatnonzero(self.intake.uses)[-1])
        given = self.options.n_experts
        if given is not None and largest < given:
            return given
        if given is not None and not self._may_be_shared(given, largest):
            raise TraceError(
                f"{self.path}: has expert {largest}, and --experts or --like says that a layer has "
                f"{given}: 0 to {given - 1}"
            )
        self.findings.note(
            "n_experts",
            f"unknown ({self.facts.n_experts_unknown}): {largest + 1} guessed from the largest id",
        )
        return max(largest + 1, width)

    def _may_be_shared(self, given: int, largest: int) -> bool:
        """Whether the experts from ``given`` on may be fused shared ones: each is in every row."""
        uses = self.intake.uses[given : largest + 1]
        return bool((uses == self.intake.n_counted).all())

    def _find_shared(self, n_experts: int, width: int) -> tuple[int, int]:
        """Take the last experts out where each row has them: shared experts that were fused."""
        in_all = set(np.flatnonzero(self.intake.uses == self.intake.n_counted).tolist())
        while n_experts - 1 in in_all and len(self.shared) < width - 1:
            n_experts -= 1
            self.shared.append(n_experts)
            in_all.remove(n_experts)
            self.findings.note(
                "shared", f"expert {n_experts} is in every row: a shared expert, taken out"
            )
        for expert in sorted(in_all):
            self.findings.note("experts", f"expert {expert} is in every row: a shared expert?")
        return n_experts, width - len(self.shared)

    def _rule(self, rows: Ordered) -> tuple[str | None, float | None]:
        """The rule by which logits became weights, where the file has both."""
        if self.facts.weight_rule is not None:
            return self.facts.weight_rule, self.facts.weight_scale
        if {"weights", "router_logits"} - set(self.intake.names()) or self.intake.variable:
            return None, None
        some = rows.order[:: max(1, len(rows.order) // _RULE_ROWS)]
        found = detect_weight_rule(
            *(self.intake.spool.rows(n, some) for n in ("router_logits", "weights", "experts"))
        )
        return (found.name, found.scale) if found else (None, None)

    def _batch_rows(self) -> int:
        files = self.intake.spool.files.values()
        row_bytes = sum(max(1, file.width or 1) * file.dtype.itemsize for file in files)
        return max(1, _BATCH_BYTES // row_bytes)

    def _batches(self, rows: Ordered) -> Iterator[Columns]:
        size = self._batch_rows()
        for start in range(0, len(rows.order), size):
            cut = slice(start, start + size)
            batch = {name: column[cut] for name, column in rows.keys.items()}
            for name in self.intake.names():
                batch[name] = self.intake.spool.rows(name, rows.order[cut])
            self._take_shared_out(batch)
            self._by_weight(batch)
            if "residency" in batch:
                self.totals.residency(batch["residency"])
            yield batch

    def _take_shared_out(self, batch: Columns) -> None:
        if not self.shared:
            return
        routed = ~np.isin(batch["experts"], self.shared)
        for name in batch.keys() & set(BY_SLOT):
            batch[name] = batch[name][routed].reshape(len(routed), -1)
        for name in batch:
            if name == "router_logits" or name.startswith(PREDICTED):
                batch[name] = batch[name][:, : -len(self.shared)]

    def _by_weight(self, batch: Columns) -> None:
        """Put the experts of rows whose weights rise into descending order."""
        self.totals.rows += len(batch["layer"])
        weights = batch.get("weights")
        if weights is None:
            return
        finite = np.isfinite(weights).all(axis=1)
        none = batch["experts"] == NO_EXPERT
        rank = np.where(none, -np.inf, weights)  # what is none stays at the end
        rising = np.flatnonzero(finite & (rank[:, 1:] > rank[:, :-1]).any(axis=1))
        order = np.argsort(-rank[rising], axis=1, kind="stable")
        for name in batch.keys() & set(BY_SLOT):
            batch[name][rising] = np.take_along_axis(batch[name][rising], order, axis=1)
        self.totals.weights(len(rising), batch["weights"])

    def _write_rows(self, out: Path, meta: TraceMeta, rows: Ordered) -> None:
        origin = {"imported_from": _origin(self.path)}
        meta = replace(meta, notes=origin)
        writer = TraceWriter(
            out,
            meta,
            rows_of=str(self.path),
            row_name=lambda i: self.intake.where(int(rows.order[i])),
        )
        try:
            for batch in self._batches(rows):
                writer.write(rows_from_columns(batch))
            self.totals.tell(self.findings, meta.weight_scale)
            writer.note(**self.findings.as_notes())
            writer.close()
        except BaseException:
            writer.discard()
            raise


def _origin(path: Path) -> str:
    if not path.is_file():
        return f"{path.name}, a folder" if path.is_dir() else f"{path}, of a script"
    return f"{path.name}, sha256 {sha256_of(path).hex()}"


def _is_nan(values: NDArray[Any]) -> NDArray[np.bool_]:
    nan: NDArray[np.bool_] = (
        np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, np.bool_)
    )
    return nan
