"""Sizes that a person gives for a trace: for those that the trace lacks, or in place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moeroute.models import NATIVE, PLAIN, ModelShape, find_model
from moeroute.schema import TraceError, TraceMeta, TraceUsageError

TOP_K_NOTE = "top_k"  # of a trace whose recorder chose fewer experts than its model does


@dataclass(frozen=True)
class GivenSizes:
    """The sizes that a person gives of a trace's model: another model's name, or numbers.

    like               a model of the table, a config.json, or its folder; gives every size that the
                       trace does not say itself
    layers             the trace is of only so many of the first layers of ``like``
    attention          precision of its attention, as for `moerun pack`; then the dense weights are
                       the model's whatever the trace says
    expert_bytes       bytes of one expert by precision
    dense_layer_bytes  bytes of the dense weights of a layer with experts
    dense_token_bytes  bytes that a token reads outside those layers
    """

    like: str | None = None
    layers: int | None = None
    attention: str | None = None
    expert_bytes: Mapping[str, int] = field(default_factory=dict)
    dense_layer_bytes: int | None = None
    dense_token_bytes: int | None = None

    def __bool__(self) -> bool:
        return self != GivenSizes()

    def on(self, meta: TraceMeta) -> TraceMeta:
        """``meta`` with these sizes: numbers replace the trace's own, ``like`` gives what is
        missing.

        Raises TraceError for a number that is not positive, and for a model that the trace cannot
        be of; the error says in what they differ.
        """
        if self.like is None and (self.layers is not None or self.attention is not None):
            given = "layers" if self.layers is not None else "attention"
            raise TraceUsageError(f"{given} is of the model that like names: give like too")
        for name in ("dense_layer_bytes", "dense_token_bytes"):
            size = getattr(self, name)
            if size is not None and size <= 0:
                raise TraceUsageError(f"{name} is {size}: leave it out where it is unknown")
        if self.like is not None:
            meta = self._like(meta)
        if self.expert_bytes:
            meta = replace(meta, expert_bytes={**meta.expert_bytes, **self.expert_bytes})
        if self.dense_layer_bytes is not None:
            meta = replace(meta, layer_bytes=self.dense_layer_bytes, dense_precision="as given")
        if self.dense_token_bytes is not None:
            meta = replace(meta, token_bytes=self.dense_token_bytes, dense_precision="as given")
        return meta

    def notes(self, meta: TraceMeta) -> list[str]:
        """A note where ``like`` cannot change the sizes that count, because a trace with ``meta``
        has them all; empty elsewhere."""
        if self.like is None or self.attention is not None or unknown_sizes(meta):
            return []
        # Weights of an expert are told by its bytes at 16 or 32 bits, too.
        if meta.expert_params is None and not meta.expert_bytes.keys() & PLAIN.keys():
            return []
        added = [n for n in find_model(self.like).expert_bytes() if n not in meta.expert_bytes]
        does = (
            f"adds the experts' sizes in {', '.join(added)} alone" if added else "changes nothing"
        )
        return [
            f"the trace of {meta.model} has its own sizes: --like {self.like} {does}; bytes of an "
            "expert, a layer and a token can be given as numbers"
        ]

    def _like(self, meta: TraceMeta) -> TraceMeta:
        assert self.like is not None
        model = find_model(self.like)
        if self.layers is not None:
            model = model.first(self.layers)
        reduced = check_like(meta, model)
        attention = self.attention or NATIVE
        dense, label = model.dense(attention), model.dense_label(attention)
        # What a recorder measured is better known than what the published model has.
        own = {"layer": meta.layer_bytes, "token": meta.token_bytes}
        kept = [name for name, size in own.items() if size and self.attention is None]
        notes = {"sizes": f"of {model.name}, dense weights {label}"}
        counted: str | None = label
        if kept:
            stays = " and ".join(f"a {name}'s" for name in kept)
            notes["sizes"] += f"; {stays} as the trace has them"
            counted = meta.dense_precision
            if len(kept) < len(own):
                counted = f"{stays} {counted or 'as recorded'}, else {label}"
        if reduced:
            notes[TOP_K_NOTE] = reduced
        return replace(
            meta,
            expert_bytes=meta.expert_bytes
            | {n: b for n, b in model.expert_bytes().items() if n not in meta.expert_bytes},
            expert_params=model.expert_params,
            layer_bytes=meta.layer_bytes if "layer" in kept else dense.layer_bytes,
            token_bytes=meta.token_bytes if "token" in kept else dense.token_bytes,
            n_shared_experts=model.n_shared_experts,
            dense_precision=counted,
        ).with_notes(**notes)


NO_SIZES = GivenSizes()


def check_like(meta: TraceMeta, model: ModelShape) -> str | None:
    """Raise TraceError where a trace cannot be of ``model``; the error says in what they differ.

    Returns a note where the recorder chose fewer experts a token than the model does.
    """
    differing = [
        f"{found} {what} where {model.name} has {there}"
        for what, found, there in (
            ("layers", meta.n_layers, model.n_layers),
            ("experts", meta.n_experts, model.n_experts),
        )
        if found != there
    ]
    if meta.top_k > model.top_k:
        differing.append(f"top-{meta.top_k} where {model.name} has top-{model.top_k}")
    if differing:
        hint = ""
        if meta.n_experts == model.n_experts and meta.n_layers < model.n_layers:
            hint = ": if it is of the model's first layers alone, say how many with layers"
        elif model.n_layers < meta.n_layers <= model.n_all_layers:
            n_dense = model.n_all_layers - model.n_layers
            hint = f" with experts, and {n_dense} without"
        raise TraceError(
            f"the trace of {meta.model} is not like {model.name}: it has "
            f"{', and '.join(differing)}{hint}"
        )
    if meta.top_k < model.top_k:
        return f"top-{meta.top_k} of a model that has top-{model.top_k}: reduced by the recorder"
    return None


def unknown_sizes(meta: TraceMeta) -> list[str]:
    """The sizes that a trace lacks, in words."""
    found = [] if meta.expert_bytes else ["bytes of an expert"]
    missing = [
        name
        for name, size in (("a layer", meta.layer_bytes), ("a token", meta.token_bytes))
        if size is None
    ]
    return found + ([f"dense weights of {' and '.join(missing)}"] if missing else [])


def sizes_line(meta: TraceMeta) -> str:
    """A line for people: the sizes that a trace has, and those that are unknown."""
    parts = []
    if meta.expert_bytes:
        (own, size), *others = meta.expert_bytes.items()
        also = f" (known as well: {', '.join(name for name, _ in others)})" if others else ""
        parts.append(f"an expert {size:,} bytes in {own}{also}")
    for what, dense in (("a layer", meta.layer_bytes), ("a token", meta.token_bytes)):
        if dense is not None:
            parts.append(f"dense weights of {what} {dense:,} bytes")
    if meta.dense_precision and (meta.layer_bytes or meta.token_bytes):
        parts[-1] += f" ({meta.dense_precision})"
    parts += [f"{what} unknown" for what in unknown_sizes(meta)]
    return f"sizes: {'; '.join(parts)}"
