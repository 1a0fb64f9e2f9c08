"""What an importer hands over: a file's rows, a chunk at a time, and what the file says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeroute.importers.findings import Findings
from moeroute.schema import TraceError

CHUNK_ROWS = 1 << 16  # about as many rows as an importer hands over at a time
PLACE = "place"  # a chunk's column with each row's number for `Recording.place`

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ImportOptions:
    """What a person says of a file that its layout does not.

    model          name of the model
    top_k          experts that a token chooses in a layer
    n_experts      routed experts of a layer, where the file does not say
    prompt_tokens  first tokens of each sequence that are prompt, where the file has no phases
    fields         where the fields of a table are: `layer` -> "l", `experts` -> "topk.ids"
    weight_rule    how logits become weights, where the file has logits alone
    """

    model: str | None = None
    top_k: int | None = None
    n_experts: int | None = None
    prompt_tokens: int | None = None
    fields: dict[str, str] = field(default_factory=dict)
    weight_rule: str | None = None


NO_OPTIONS = ImportOptions()


@dataclass
class Facts:
    """What a file says of the model and the recording. None: it says nothing.

    `n_layers` counts the layer numbers that rows may have. Where it is None, the layers that have
    rows are those with experts, and they are numbered anew. `phase` says why the phases of tokens
    are unknown, for a file without them.
    """

    model: str
    n_layers: int | None = None
    n_experts: int | None = None
    top_k: int | None = None
    revision: str | None = None
    expert_bytes: dict[str, int] = field(default_factory=dict)
    layer_bytes: int | None = None
    token_bytes: int | None = None
    n_shared_experts: int = 0
    physical_to_logical: list[list[int]] | None = None
    prediction: str | None = None
    weight_rule: str | None = None
    weight_scale: float | None = None
    phase: str = "the file does not tell phases"
    n_experts_unknown: str = "the file does not say"


@dataclass
class Recording:
    """A file as rows, one a (sequence, position, layer), in the file's order.

    Each of `chunks` has columns named as in a trace, of any number type, and perhaps PLACE. It
    needs `layer` and `experts`; experts below 0 are none. What it lacks of the others is worked out
    (see `numbering`) or stays out of the trace. `facts` are whole when the last chunk was taken.
    `place` says in words where in the file a row is ("line 12"); every message about a row begins
    with it.
    """

    path: Path
    facts: Facts
    chunks: Iterable[Columns]
    place: Callable[[int], str]
    findings: Findings


def fit(path: Path, name: str, value: ArrayLike, least: int, most: int) -> int:
    """A whole number of the file. Raises TraceError naming file and field if it is out of range."""
    try:
        found = np.asarray(value)
    except ValueError:  # lists of several lengths, or nested too deep
        found = np.array(None)
    if found.size != 1 or found.dtype.kind not in "iuf" or found.ravel()[0] % 1:
        raise TraceError(f"{path}: {name} is {_shown(value)}, not a whole number")
    number = int(found.ravel()[0])
    if not least <= number <= most:
        raise TraceError(f"{path}: {name} is {number}, not {least}..{most}")
    return number


def _shown(value: ArrayLike) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) < 60 else text[:57] + "..."
