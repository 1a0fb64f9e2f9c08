"""Recording a model that somebody's own script runs."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from moeroute import DECODE, PROMPT, Rows, TraceError, TraceMeta, TraceWriter
from moeroute.schema import rows_from_columns
from moeroute.weight_rules import detect_weight_rule
from moerun.errors import RunError
from numpy.typing import NDArray
from torch import Tensor, nn

from moetrace import model as describe
from moetrace.capture import Routing, RoutingCapture
from moetrace.record import flat


class _Tokens(NamedTuple):
    """The tokens of a forward pass that are no filling, row by row of the batch."""

    row: NDArray[np.int64]  # [n] of the batch
    position: NDArray[np.int64]  # [n] in its sequence
    phase: NDArray[np.uint8]  # [n]
    ids: NDArray[np.int64] | None  # [n]
    pass_id: int


class LiveRecorder:
    """A context manager under which every forward pass of `model` is recorded.

    A pass without a filled key-value cache begins new sequences, one a row of its batch; a pass
    with one goes on with them. All tokens of a sequence's first pass are prompt, and those of
    later passes of more than one token; single ones are decode. Tokens that the attention mask
    leaves out, and those after a sequence's end-of-text token, are not recorded. The trace keeps
    which rows made one forward pass.

    It writes when sequences end: what a batch of them routed is in memory until then. Left by an
    exception it leaves no file. Raises RunError for a model or a pass that cannot be recorded,
    TraceError where the trace cannot be written or no pass ran.
    """

    def __init__(
        self, model: Any, out: str | Path, *, horizon: int, prediction: str | None, name: str | None
    ) -> None:
        self.model, self.out, self.name = model, Path(out), name
        if not self.out.absolute().parent.is_dir():
            raise TraceError(f"{out}: the folder {self.out.parent} does not exist")
        self.capture = RoutingCapture(model, horizon, prediction)
        self._body: nn.Module = getattr(model, "base_model", model)
        self._writer: TraceWriter | None = None
        self._hooks: list[Any] = []
        self._held: list[tuple[_Tokens, Routing]] = []
        self._next = np.empty(0, np.int64)  # next position of each row of the batch
        self._ended = np.empty(0, np.bool_)
        self._first_sequence = 0
        self._passes = 0
        self._tokens: _Tokens | None = None
        self._wanted: Tensor | None = None
        settings = getattr(model, "generation_config", None)
        ends = getattr(settings, "eos_token_id", None)
        self._ends = np.array([] if ends is None else np.atleast_1d(ends), np.int64)

    def __enter__(self) -> Self:
        self.capture.__enter__()
        self._hooks = [
            self._body.register_forward_pre_hook(self._before, with_kwargs=True),
            self._body.register_forward_hook(self._after),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self.capture.__exit__(kind, error, trace)
        if error is not None:
            if self._writer is not None:
                self._writer.discard()
            return
        try:
            self._flush()
            if self._writer is None:
                raise TraceError(f"{self.out}: not written: no forward pass of the model ran")
            self._writer.close()
        except BaseException:
            if self._writer is not None:
                self._writer.discard()
            raise

    def _before(self, _body: nn.Module, arguments: tuple[Any, ...], keywords: Any) -> None:
        self.capture.reset()  # what an interrupted pass has left
        ids = keywords.get("input_ids", arguments[0] if arguments else None)
        given = ids if ids is not None else keywords.get("inputs_embeds")
        if given is None:
            raise RunError("a forward pass without input_ids or inputs_embeds cannot be recorded")
        n_rows, width = given.shape[:2]
        cache = keywords.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            self._begin(n_rows)
        elif len(self._next) != n_rows:
            raise RunError(
                f"a forward pass goes on with {len(self._next)} sequences, but has {n_rows}: "
                "a batch whose rows change (beam search) cannot be recorded"
            )
        real = _unmasked(keywords.get("attention_mask"), n_rows, width)
        self._note(real, None if ids is None else ids.detach().cpu().numpy(), width)

    def _begin(self, n_rows: int) -> None:
        self._flush()
        self._next = np.zeros(n_rows, np.int64)
        self._ended = np.zeros(n_rows, np.bool_)

    def _note(self, real: NDArray[np.bool_], ids: NDArray[Any] | None, width: int) -> None:
        """Work out which of the pass's tokens are recorded, and as what."""
        real = real & ~self._ended[:, None]
        position = self._next[:, None] + np.cumsum(real, axis=1) - 1
        decode = (self._next > 0) & (width == 1)
        row, column = np.nonzero(real)
        self._tokens = _Tokens(
            row,
            position[row, column],
            np.where(decode[row], DECODE, PROMPT).astype(np.uint8),
            None if ids is None else ids[row, column],
            self._passes,
        )
        self._wanted = None if real.all() else torch.from_numpy(real.ravel())
        if ids is not None and width == 1:
            self._ended |= decode & np.isin(ids[:, 0], self._ends)
        self._next = self._next + real.sum(axis=1)

    def _after(self, *_: Any) -> None:
        tokens, wanted = self._tokens, self._wanted
        assert tokens is not None
        if wanted is not None:
            wanted = wanted.to(self.capture.device)
        routing = self.capture.take(wanted)
        if len(tokens.row):
            self._held.append((tokens, routing))
            self._passes += 1

    def _flush(self) -> None:
        """Write the sequences that have ended, in a trace's order."""
        if not self._held:
            return
        parts = [_columns(tokens, routing, self._first_sequence) for tokens, routing in self._held]
        if len({frozenset(part) for part in parts}) > 1:
            raise RunError("token ids are known of some forward passes alone: give all input_ids")
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort((joined["layer"], joined["position"], joined["sequence"]))
        rows = rows_from_columns({name: column[order] for name, column in joined.items()})
        if self._writer is None:
            self._writer = TraceWriter(self.out, self._meta(rows))
        self._writer.write(rows)
        self._first_sequence = int(rows.sequence[-1]) + 1
        self._held = []

    def _meta(self, rows: Rows) -> TraceMeta:
        """The trace's metadata, from the model and from the first rows."""
        model, capture = self.model, self.capture
        assert rows.router_logits is not None
        assert rows.weights is not None
        stored = model.dtype
        dense = describe.dense_sizes_of(model, stored)
        rule = detect_weight_rule(rows.router_logits, rows.weights, rows.experts)
        name = self.name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        return TraceMeta(
            source="recorded",
            model=name,
            n_layers=len(capture.routers),
            n_experts=rows.router_logits.shape[1],
            top_k=rows.experts.shape[1],
            n_shared_experts=describe.shared_experts(model),
            expert_bytes=describe.expert_bytes(model, stored),
            expert_params=describe.expert_params(model, stored),
            layer_bytes=dense.layer_bytes if dense else None,
            token_bytes=dense.token_bytes if dense else None,
            dense_precision=describe.precision_name(stored) if dense else None,
            prediction=capture.predictor.method if capture.predictor else None,
            horizon=capture.horizon,
            weight_rule=rule.name if rule else None,
            weight_scale=rule.scale if rule else None,
            packages=describe.package_versions(),
            notes={"recorded_by": "moetrace.recording in a script"},
        )


def _unmasked(mask: Any, n_rows: int, width: int) -> NDArray[np.bool_]:
    """Which tokens of a pass the attention mask [rows, past and new tokens] lets in."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return np.ones((n_rows, width), np.bool_)
    found: NDArray[np.bool_] = mask[:, -width:].detach().cpu().numpy().astype(np.bool_)
    return found


def _columns(tokens: _Tokens, routing: Routing, first_sequence: int) -> dict[str, NDArray[Any]]:
    """A pass's trace columns, token by token and layer by layer."""
    n_layers = routing.experts.shape[1]
    of_token: dict[str, NDArray[Any]] = {
        "sequence": (first_sequence + tokens.row).astype(np.uint32),
        "position": tokens.position.astype(np.uint32),
        "phase": tokens.phase,
        "pass_id": np.full(len(tokens.row), tokens.pass_id, np.uint32),
    }
    if tokens.ids is not None:
        of_token["token_id"] = tokens.ids.astype(np.uint32)
    found = {name: np.repeat(column, n_layers) for name, column in of_token.items()}
    found["layer"] = np.tile(np.arange(n_layers, dtype=np.uint16), len(tokens.row))
    found |= {
        "experts": flat(routing.experts),
        "weights": flat(routing.weights),
        "router_logits": flat(routing.router_logits),
        "input_norm": routing.input_norm.reshape(-1),
    }
    for ahead, predicted in enumerate(routing.predicted, 1):
        found[f"predicted_logits_{ahead}"] = flat(predicted)
    return found
