"""One cell of a grid from the windows that were scored: perplexity, sizes, shares."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from moepolicy import Counts, PolicySpec

from moerun.format.expert import ExpertShape
from moerun.perplexity.results import Cell, Published, Scored
from moerun.perplexity.subject import Text
from moerun.perplexity.table1 import published
from moerun.store.expert_store import ExpertStore


def cell_of(
    store: ExpertStore,
    attention: str,
    experts: str,
    policy: PolicySpec,
    text: Text,
    scored: Collection[Scored],
    n_scored: int,
    low: ExpertStore | None,
) -> Cell:
    """The cell of ``policy`` at two precisions; ``n_scored`` tokens were scored.

    ``low`` is the store that the policy loads a lower precision from, if any.
    """
    total_nats = math.fsum(window.nats for window in scored)
    mean = total_nats / n_scored
    return Cell(
        attention=attention,
        experts=experts,
        policy=policy.label,
        lossy=policy.policy.lossy,
        perplexity=math.exp(mean),
        bits_per_byte=mean / math.log(2) * text.n_tokens / text.n_bytes,
        scored_tokens=n_scored,
        nats=total_nats,
        low_expert_bytes=low.n_keys * low.record_bytes if low else 0,
        **_shares(scored),
        **_sizes(store),
        published=_published(store),
    )


def _shares(scored: Collection[Scored]) -> dict[str, Any]:
    """Shares of the gates' weights, as in a run's report."""
    # By name: the first column is the nats.
    _, *sums = map(math.fsum, zip(*scored, strict=True))
    masses: dict[str, Any] = dict(zip(Scored._fields[1:], sums, strict=True))
    return Counts(**masses).shares


def _sizes(store: ExpertStore) -> dict[str, Any]:
    """Bytes of the store and of its parts."""
    return {
        "store_bytes": store.total_bytes,
        "expert_bytes": store.n_keys * store.record_bytes,
        "attention_bytes": store.attention_bytes,
        "bits_per_weight": 8 * store.total_bytes / store.n_weights,
        "expert_data_bytes": store.n_keys * store.index.layout.data_bytes,
        "attention_data_bytes": _attention_data_bytes(store),
    }


def _attention_data_bytes(store: ExpertStore) -> int:
    packed = store.index.attention
    if packed is None:
        return 0
    shapes = (ExpertShape.matrix(linear.rows, linear.columns) for linear in packed.linears)
    return sum(shape.record(packed.precision).data_bytes for shape in shapes)


def _published(store: ExpertStore) -> Published | None:
    row = published(store.index)
    return Published(row.size_gib, row.wikitext2, row.c4) if row else None
