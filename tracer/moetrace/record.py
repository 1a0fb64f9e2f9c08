"""Recording: windows of text through the stock model, its gates' decisions into a trace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from moeroute import DECODE, PROMPT, Rows, TraceMeta, TraceWriter
from moeroute.weight_rules import detect_weight_rule
from moerun.errors import RunError
from torch import Tensor

from moetrace import model as describe
from moetrace.capture import Routing, RoutingCapture
from moetrace.corpus import Windows, cut_windows, read_documents
from moetrace.model import Checkpoint

LONGEST_DEFAULT = 2048  # tokens of a sequence, where the model could take more
PROBE_TOKENS = 16  # that tell what the gates give: shapes, and the rule of their weights


@dataclass(frozen=True)
class Settings:
    """What to record. `prompt_tokens` of each sequence are marked as prompt (None: none of a
    teacher-forced one, all that is not generated of a generated one)."""

    horizon: int = 3
    prediction: str | None = None
    sequence_length: int | None = None  # tokens, generated ones included
    max_tokens: int | None = None
    prompt_tokens: int | None = None
    generate: int = 0
    temperature: float = 0.0
    seed: int = 0
    field: str | None = None
    batch_tokens: int = 2048

    def length(self, context: int) -> int:
        """Tokens of a sequence. Raises RunError where it does not fit the model or the prompt."""
        length = self.sequence_length or min(context, LONGEST_DEFAULT)
        if length > context:
            raise RunError(f"sequence length {length}: the model was made for {context} at most")
        if self.generate >= length:
            raise RunError(
                f"generate {self.generate}: leaves no room for a prompt in a sequence of {length}"
            )
        if self.generate and self.prompt_tokens == 0:
            raise RunError("prompt tokens 0: there is nothing to generate from")
        if self.generate and self.prompt_tokens is not None:
            return min(length, self.prompt_tokens + self.generate)
        return length


def open_windows(checkpoint: Checkpoint, corpus: list[Path], settings: Settings) -> Windows:
    """The token sequences to feed: whole windows, or the prompts of generated ones."""
    length = settings.length(checkpoint.context) - settings.generate
    documents = read_documents(corpus, settings.field)
    return cut_windows(documents, checkpoint.tokenizer, length, settings.max_tokens)


def describe_recording(
    checkpoint: Checkpoint, windows: Windows, settings: Settings, capture: RoutingCapture
) -> TraceMeta:
    """The trace's metadata; a few tokens go through the model to learn what its gates give."""
    with torch.inference_mode():
        ids = torch.tensor([windows.sequences[0][:PROBE_TOKENS]], device=checkpoint.model.device)
        checkpoint.model(input_ids=ids, use_cache=False)
    _, n_layers, top_k = (probe := capture.take()).experts.shape
    rule = detect_weight_rule(
        *(flat(part) for part in (probe.router_logits, probe.weights, probe.experts))
    )
    model, stored = checkpoint.model, checkpoint.stored
    predictor = capture.predictor
    dense = describe.dense_sizes_of(model, stored)
    notes = {
        "text": f"{settings.generate} tokens generated a prompt, temperature {settings.temperature}"
        if settings.generate
        else "teacher-forced",
        "sequence_length": str(settings.length(checkpoint.context)),
        "prompt_tokens": "all not generated"
        if settings.generate
        else str(settings.prompt_tokens or 0),
        "run_as": f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}",
    }
    return TraceMeta(
        source="recorded",
        model=checkpoint.name,
        revision=checkpoint.revision,
        n_layers=n_layers,
        n_experts=probe.router_logits.shape[-1],
        top_k=top_k,
        n_shared_experts=describe.shared_experts(model),
        expert_bytes=describe.expert_bytes(model, stored, checkpoint.published),
        expert_params=describe.expert_params(model, stored),
        layer_bytes=dense.layer_bytes if dense else None,
        token_bytes=dense.token_bytes if dense else None,
        dense_precision=describe.precision_name(stored) if dense else None,
        prediction=predictor.method if predictor else None,
        horizon=settings.horizon,
        weight_rule=rule.name if rule else None,
        weight_scale=rule.scale if rule else None,
        corpus_digest=windows.digest,
        tokenizer=describe.tokenizer_digest(checkpoint.tokenizer),
        seed=settings.seed if settings.temperature else None,
        packages=describe.package_versions(),
        notes=notes,
    )


def record(
    checkpoint: Checkpoint,
    windows: Windows,
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    on_tokens: Callable[[int, bool], None] = lambda *_: None,
) -> None:
    """Write the trace of `windows` to `out`; `on_tokens` is told of more tokens that are done, and
    whether an earlier, interrupted recording did them.

    Interrupted, it leaves what `resume` goes on from. Raises RunError, TraceError and OSError.
    """
    steps = generated if settings.generate else teacher_forced
    with (
        torch.inference_mode(),
        RoutingCapture(checkpoint.model, settings.horizon, settings.prediction) as capture,
    ):
        meta = describe_recording(checkpoint, windows, settings, capture)
        with TraceWriter(out, meta, resume=resume) as writer:
            first = 0 if writer.last_sequence is None else writer.last_sequence + 1
            on_tokens(writer.resumed_rows // meta.n_layers, True)
            for rows in steps(checkpoint, windows, settings, capture, first):
                writer.write(rows)
                on_tokens(len(rows) // meta.n_layers, False)


class Batch(NamedTuple):
    """Whole sequences that share a forward pass, the shorter ones filled up on the right."""

    sequences: list[tuple[int, list[int]]]  # number and tokens of each
    ids: Tensor  # [sequences, longest]
    wanted: Tensor | None  # [sequences * longest] which are no filling; None: all are


def batches(
    windows: Windows, batch_tokens: int, device: torch.device, first: int = 0
) -> Iterator[Batch]:
    """The sequences from number `first` on, as many at a time as make up `batch_tokens`."""
    size = max(1, batch_tokens // max(map(len, windows.sequences)))
    numbered = itertools.islice(enumerate(windows.sequences), first, None)
    while batch := list(itertools.islice(numbered, size)):
        lengths = [len(sequence) for _, sequence in batch]
        width = max(lengths)
        ids = torch.tensor([seq + [0] * (width - len(seq)) for _, seq in batch], device=device)
        wanted = None
        if min(lengths) < width:
            ends = torch.tensor(lengths, device=device)
            wanted = (torch.arange(width, device=device) < ends[:, None]).flatten()
        yield Batch(batch, ids, wanted)


def teacher_forced(
    checkpoint: Checkpoint,
    windows: Windows,
    settings: Settings,
    capture: RoutingCapture,
    first: int = 0,
) -> Iterator[Rows]:
    """Rows of sequences `first` on, a batch of whole sequences at a time."""
    body = checkpoint.model.base_model  # the head has no part in the routing
    for batch in batches(windows, settings.batch_tokens, checkpoint.model.device, first):
        body(input_ids=batch.ids, use_cache=False)
        yield _rows(capture.take(batch.wanted), batch.sequences, settings.prompt_tokens or 0)


def generated(
    checkpoint: Checkpoint,
    windows: Windows,
    settings: Settings,
    capture: RoutingCapture,
    first: int = 0,
) -> Iterator[Rows]:
    """Rows of each prompt and its continuation; the last token is chosen but not passed through."""
    from moerun.live.sampling import Sampling
    from transformers import set_seed

    sampling = Sampling(settings.generate, settings.temperature)
    sampling.check()
    ends = sampling.ends(checkpoint.model, checkpoint.tokenizer)
    config = sampling.config(checkpoint.model, settings.generate, ends)
    passes: list[Routing] = []
    hook = checkpoint.model.register_forward_hook(lambda *_: passes.append(capture.take()))
    try:
        for number, prompt in itertools.islice(enumerate(windows.sequences), first, None):
            set_seed(settings.seed + number)  # a resumed recording goes on as the first would have
            ids = torch.tensor([prompt], device=checkpoint.model.device)
            mask = torch.ones_like(ids)
            out = checkpoint.model.generate(ids, attention_mask=mask, generation_config=config)
            routing = Routing(*(_joined(parts) for parts in zip(*passes, strict=True)))
            passes.clear()
            tokens = out[0, : len(routing.experts)].tolist()
            yield _rows(routing, [(number, tokens)], len(prompt))
    finally:
        hook.remove()


def _joined(parts: tuple[Any, ...]) -> Any:
    """One field of several passes, one after the other: arrays, or tuples of arrays."""
    if isinstance(parts[0], tuple):
        return tuple(np.concatenate(horizon) for horizon in zip(*parts, strict=True))
    return np.concatenate(parts)


def _rows(routing: Routing, batch: list[tuple[int, list[int]]], prompt_tokens: int) -> Rows:
    """The routing [T, L, ...] of numbered sequences, one after the other, as trace rows."""
    n_layers = routing.experts.shape[1]
    lengths = [len(tokens) for _, tokens in batch]
    sequence = np.repeat(np.array([number for number, _ in batch], np.uint32), lengths)
    position = np.concatenate([np.arange(length, dtype=np.uint32) for length in lengths])
    phase = np.where(position < prompt_tokens, PROMPT, DECODE).astype(np.uint8)
    token_id = np.array([token for _, tokens in batch for token in tokens], np.uint32)

    def by_layer(column: Any) -> Any:
        return np.repeat(column, n_layers)

    return Rows(
        sequence=by_layer(sequence),
        position=by_layer(position),
        phase=by_layer(phase),
        token_id=by_layer(token_id),
        layer=np.tile(np.arange(n_layers, dtype=np.uint16), len(sequence)),
        experts=flat(routing.experts),
        weights=flat(routing.weights),
        router_logits=flat(routing.router_logits),
        input_norm=routing.input_norm.reshape(-1),
        predicted=tuple(flat(values) for values in routing.predicted),
    )


def flat(values: Any) -> Any:
    """[T, L, X] as [T * L, X]: one row a (token, layer)."""
    return values.reshape(-1, values.shape[-1])
