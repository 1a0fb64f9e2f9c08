"""Route CSVs of BigMoeOnEdge: what a phone's offloading run routed, with its cache's outcome."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moeroute.foreign import TEXT, Source
from moeroute.importers.findings import Findings
from moeroute.importers.recording import PLACE, Facts, ImportOptions, Recording
from moeroute.importers.table import read_table, text_lines
from moeroute.schema import PHASES, TraceError

if TYPE_CHECKING:
    import polars as pl

TITLE = "# route_trace v1"
_U32 = (1 << 32) - 1
_KEY = ("turn", "step", "layer")


def detect(source: Source) -> bool:
    """Whether the text's first line is the format's title."""
    return source.kind == TEXT and source.first_line == TITLE


def read(source: Source, _options: ImportOptions) -> Recording:
    """Read a BigMoeOnEdge route CSV.

    A turn becomes a sequence and a step a position. What the phone's cache did is kept in the
    columns `residency` and `loaded_bytes`. Raises TraceError naming the file, line and column.
    """
    if not detect(source):
        raise TraceError(f"{source.path}: line 1: not a route trace: it starts with {TITLE!r}")
    findings = Findings()
    lines = text_lines(source, findings)
    header = _read_header(source, lines)
    numbers = {
        "turn": _U32,
        "phase": len(PHASES) - 1,
        "step": _U32,
        "layer": (1 << 16) - 1,
        "slot": header.top_k - 1,
        "expert": header.n_experts - 1,
        "weight": None,
        "residency": (1 << 8) - 1,
        "expert_bytes": _U32,
    }
    table = read_table(source, lines, numbers, findings)
    repeated = len(table)
    table = table.unique(list(numbers), keep="first", maintain_order=True)
    findings.count("duplicates", repeated - len(table), "lines that repeat another: dropped")
    table = table.sort(*_KEY, "slot", maintain_order=True)
    _check_groups(source, table, header.top_k)
    layers = table["layer"].unique().sort().to_list()
    _check_decode(source, table, layers)
    return _recording(source, header, table, layers, findings)


@dataclass(frozen=True)
class _Header:
    """What the comment lines of a BigMoeOnEdge route CSV say."""

    model: str
    arch: str
    n_experts: int
    top_k: int
    expert_bytes: dict[int, int]  # by layer, as numbered in the file
    dense_bytes: dict[int, int]

    @property
    def precision(self) -> str:
        """The quantisation named in the model's file name."""
        found = re.search(r"I?Q\d\w*|BF16|F16|F32|MXFP4", self.model, flags=re.IGNORECASE)
        return found.group().lower() if found else "as-run"


def _read_header(source: Source, lines: list[str]) -> _Header:
    model: dict[str, str] = {}
    layers: list[dict[str, str]] = []
    for line in lines:
        if not line.startswith("#"):
            break
        pairs = dict(re.findall(r"(\w+)=(\S+)", line))
        if "layer" in pairs:
            layers.append(pairs)
        else:
            model |= pairs
    try:
        header = _Header(
            model=model["model"].rsplit("/", 1)[-1].removesuffix(".gguf"),
            arch=model.get("arch", "unknown"),
            n_experts=int(model["n_expert"]),
            top_k=int(model["n_expert_used"]),
            expert_bytes={int(pairs["layer"]): int(pairs["expert_bytes"]) for pairs in layers},
            dense_bytes={int(pairs["layer"]): int(pairs["dense_bytes"]) for pairs in layers},
        )
    except KeyError as error:
        raise TraceError(f"{source.path}: the comment lines do not say {error.args[0]}=") from None
    except ValueError as error:
        raise TraceError(f"{source.path}: the comment lines are damaged ({error})") from None
    if not 1 <= header.top_k <= header.n_experts:
        raise TraceError(f"{source.path}: the comment lines say n_expert_used={header.top_k}")
    return header


def _check_groups(source: Source, table: pl.DataFrame, top_k: int) -> None:
    """Each (turn, step, layer) must have its `top_k` slots 0, 1, ... in one phase."""
    slot = table["slot"].to_numpy()
    wrong = slot != np.arange(len(slot)) % top_k
    for name in (*_KEY, "phase"):
        column = table[name].to_numpy()
        wrong[1:] |= (slot[1:] != 0) & (np.diff(column) != 0)
    cut = len(slot) % top_k != 0
    if not wrong.any() and not cut:
        return
    row = table.row(int(wrong.argmax()) if wrong.any() else len(slot) - 1, named=True)
    where = ", ".join(f"{name} {row[name]}" for name in _KEY)
    raise TraceError(
        f"{source.path}: line {row['line']}, column slot: a layer's lines before or here ({where}) "
        f"do not have the {top_k} slots 0..{top_k - 1} once each, in one phase"
        + ("" if wrong.any() else ": truncated?")
    )


def _check_decode(source: Source, table: pl.DataFrame, layers: list[int]) -> None:
    """Only a prompt may lack (step, layer) pairs: its tokens but the last skip the last layer,
    since nothing reads them there.
    """
    import polars as pl

    steps = table.group_by("turn", "step", maintain_order=True).agg(
        pl.col("phase").max(), pl.col("line").max(), pl.col("layer").n_unique()
    )
    short = steps.filter(pl.col("phase") == 1, pl.col("layer") < len(layers))
    if len(short):
        turn, step, _, line, n_layers = short.row(0)
        raise TraceError(
            f"{source.path}: line {line}, column layer: decode step {step} of turn {turn} has "
            f"{n_layers} of {len(layers)} layers: truncated?"
        )


def _recording(
    source: Source,
    header: _Header,
    table: pl.DataFrame,
    layers: list[int],
    findings: Findings,
) -> Recording:
    """The groups of `top_k` lines as rows, in the order in which the file begins them."""
    by_slot = {name: table[name].to_numpy().reshape(-1, header.top_k) for name in table.columns}
    first = by_slot["line"].min(axis=1)
    order = np.argsort(first)
    first = first[order]
    lists = {name: values[order] for name, values in by_slot.items()}
    columns = {
        "sequence": lists["turn"][:, 0],
        "position": lists["step"][:, 0],
        "phase": lists["phase"][:, 0],
        "layer": np.searchsorted(layers, lists["layer"][:, 0]),
        "experts": lists["expert"],
        "weights": lists["weight"],
        "residency": lists["residency"],
        "loaded_bytes": lists["expert_bytes"],
        PLACE: first,
    }
    facts = _facts(header, layers, findings)
    return Recording(source.path, facts, [columns], lambda line: f"line {line}", findings)


def _facts(header: _Header, layers: list[int], findings: Findings) -> Facts:
    sizes = [header.expert_bytes[layer] for layer in layers if layer in header.expert_bytes]
    dense = [header.dense_bytes[layer] for layer in layers if layer in header.dense_bytes]
    findings.keep("architecture", header.arch)
    findings.note(
        "residency",
        "the recorder's own cache: 0 miss, 1 hit, 2 prefetch hit; a prompt's experts "
        "count as misses, loaded_bytes tells which of them were read",
    )
    if len(set(sizes)) > 1:
        findings.keep("expert_bytes_by_layer", sizes)
        findings.note(
            "expert_bytes",
            f"experts differ in size by layer ({min(sizes)} to {max(sizes)}); "
            "the metadata has the largest",
        )
    if len(set(dense)) > 1:
        findings.keep("layer_bytes_by_layer", dense)
        findings.note(
            "layer_bytes",
            f"layers differ in size ({min(dense)} to {max(dense)}); the metadata has the mean",
        )
    for name, known in (("expert_bytes", sizes), ("layer_bytes", dense)):
        findings.count(
            name,
            len(layers) - len(known) if known else 0,
            "layers' sizes are unknown: the comment lines do not tell them",
            of=len(layers),
        )
    if layers != list(range(len(layers))):
        findings.keep("model_layers", layers)
        findings.note(
            "renumbered",
            f"layers {layers[0]} to {layers[-1]} of the file, {len(layers)} of which have "
            f"experts, are 0 to {len(layers) - 1} now",
        )
    return Facts(
        header.model,
        n_layers=len(layers),
        n_experts=header.n_experts,
        top_k=header.top_k,
        expert_bytes={header.precision: max(sizes)} if any(sizes) else {},
        layer_bytes=round(sum(dense) / len(dense)) or None if dense else None,
    )
