"""Traces from foreign formats: what fits the schema is kept, what does not is told in the notes.

To add a format, add a module that reads a file into a Recording, its row to `FORMATS`, and a line
to docs/traces.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from moeroute.foreign import PARQUET, Source
from moeroute.importers import (
    bigmoe,
    cacheeval,
    cachelab,
    counted,
    jsonlines,
    llama,
    logits,
    npz,
    parquet,
    responses,
    sglang,
)
from moeroute.importers.assemble import write_recording
from moeroute.importers.recording import NO_OPTIONS, ImportOptions, Recording
from moeroute.models import find_model
from moeroute.naming import meant
from moeroute.schema import TraceError, TraceUsageError
from moeroute.sizes import NO_SIZES, GivenSizes
from moeroute.trace import Trace, is_trace

__all__ = [
    "FORMATS",
    "ForeignFormat",
    "ImportOptions",
    "find_format",
    "import_bigmoe_csv",
    "import_foreign",
    "import_npz",
]


@dataclass(frozen=True)
class ForeignFormat:
    """A format that can be imported: what a command calls it, and what it is, for people."""

    name: str
    title: str
    detect: Callable[[Source], bool]
    read: Callable[[Source, ImportOptions], Recording]
    """Raises TraceError for a file that is not of the format, naming what is wrong with it."""


FORMATS = (
    ForeignFormat(
        "bigmoe",
        f"BigMoeOnEdge route CSV (first line {bigmoe.TITLE!r})",
        bigmoe.detect,
        bigmoe.read,
    ),
    ForeignFormat("npz", "routing .npz (arrays ids, seq, pos, phase, ...)", npz.detect, npz.read),
    ForeignFormat(
        "npy",
        ".npy of expert ids [tokens, layers, top-k], as vLLM's routed_experts",
        npz.detect_array,
        npz.read_array,
    ),
    ForeignFormat(
        "router-logits",
        "router logits of Hugging Face models (.pt, .safetensors or .npz)",
        logits.detect,
        logits.read,
    ),
    ForeignFormat(
        "sglang",
        "SGLang's answers with routed_experts (JSON)",
        responses.detect_sglang,
        responses.read_sglang,
    ),
    ForeignFormat(
        "vllm",
        "vLLM's answers with routed_experts (JSON)",
        responses.detect_vllm,
        responses.read_vllm,
    ),
    ForeignFormat(
        "sglang-per-token",
        "SGLang's expert distribution recorder, mode per_token (.pt)",
        sglang.detect,
        sglang.read,
    ),
    ForeignFormat(
        "llama-tokens",
        "llama.cpp CSV phase,token,layer,rank,expert",
        llama.detect_tokens,
        llama.read_tokens,
    ),
    ForeignFormat(
        "llama-positions",
        "llama.cpp CSV pos,layer,id0,id1,...",
        llama.detect_positions,
        llama.read_positions,
    ),
    ForeignFormat("llama-uses", "llama.cpp CSV layer,expert", llama.detect_uses, llama.read_uses),
    ForeignFormat(
        "llama-binary",
        "llama.cpp binary (layer, tokens, top-k, ids as int32)",
        llama.detect_binary,
        llama.read_binary,
    ),
    ForeignFormat(
        "moe-cache-lab",
        "moe-cache-lab routing JSON lines, version 1 and 2",
        cachelab.detect,
        cachelab.read,
    ),
    ForeignFormat(
        "moe-cache-eval",
        "moe-cache-eval folder (manifest.json and safetensors)",
        cacheeval.detect,
        cacheeval.read,
    ),
    *(
        ForeignFormat(layout.name, layout.title, layout.detect, layout.read)
        for layout in jsonlines.LAYOUTS
    ),
    ForeignFormat(
        "layer-lists",
        "JSON list of [layer, expert, expert, ...]",
        jsonlines.detect_lists,
        jsonlines.read_lists,
    ),
    ForeignFormat("parquet", "Parquet with a row a (token, layer)", parquet.detect, parquet.read),
)


def find_format(name: str) -> ForeignFormat:
    """The format called `name`. Raises TraceError listing the formats."""
    found = next((known for known in FORMATS if known.name == name), None)
    if found is None:
        names = [known.name for known in FORMATS]
        raise TraceUsageError(
            f"no format {name!r}: {meant(name, names)}there are {', '.join(names)}"
        )
    return found


def import_foreign(
    path: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    model: str | None = None,
    options: ImportOptions = NO_OPTIONS,
    sizes: GivenSizes = NO_SIZES,
    tell: Callable[[str], None] | None = None,
    scratch: Path | None = None,
) -> Trace:
    """Import a file of any known format and open the result.

    The content tells the format, unless `format` names one of FORMATS. `tell` is called with one
    line for each thing that the import changed, dropped or could not know; the trace's notes hold
    them, too. `options` and `sizes` are what the file does not say of itself and of its model;
    `model`, its name, defaults to what the file says, or the file's name. `scratch` is an empty
    folder for columns on their way, by default a temporary one beside `out`. Raises TraceError if
    the format is none of FORMATS, or naming the place of what is wrong.
    """
    source = Source(Path(path), folders=True)
    if Path(out).exists() and source.path.samefile(out):
        raise TraceError(f"{out}: is the file to import; give --out another name")
    if source.kind == PARQUET and not source.is_packed and is_trace(source.path):
        raise TraceError(f"{path}: is a trace already and needs no import")
    if model is not None:
        options = replace(options, model=model)
    if sizes.like is not None:
        like = find_model(sizes.like)
        options = replace(
            options,
            top_k=options.top_k or like.top_k,
            n_experts=options.n_experts or like.n_experts,
        )
    recording = (find_format(format) if format else _detected(source, options)).read(
        source, options
    )
    trace = write_recording(recording, out, options, sizes, scratch)
    if tell is not None:
        for line in recording.findings.lines():
            tell(line)
    return trace


def import_npz(
    path: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    options: ImportOptions = NO_OPTIONS,
    sizes: GivenSizes = NO_SIZES,
) -> Trace:
    """Import an .npz of routing (see `npz.read`) and open the result. Raises TraceError."""
    return import_foreign(path, out, format="npz", model=model, options=options, sizes=sizes)


def import_bigmoe_csv(
    path: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    options: ImportOptions = NO_OPTIONS,
    sizes: GivenSizes = NO_SIZES,
) -> Trace:
    """Import a BigMoeOnEdge route CSV (see `bigmoe.read`) and open it. Raises TraceError."""
    return import_foreign(path, out, format="bigmoe", model=model, options=options, sizes=sizes)


def _detected(source: Source, options: ImportOptions) -> ForeignFormat:
    for known in FORMATS:
        if known.detect(source):
            return known
    if options.fields:
        return find_format(parquet.NAME if source.kind == PARQUET else jsonlines.GENERIC.name)
    if what := counted.describe(source):
        raise TraceError(
            f"{source.path}: {what}: holds counts of uses and no order of tokens, so there is "
            "nothing to replay; give it to --calibration of moesim or moerun"
        )
    raise TraceError(
        f"{source.path}: {source.described}: not a format that is known by its content. Of JSON "
        "lines or Parquet say where the fields are: --map layer=FIELD,experts=FIELD. 'moetrace "
        "import --formats' lists the formats"
    )
