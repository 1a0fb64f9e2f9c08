"""Traces from foreign formats: what fits the schema is kept, what does not is told in the notes."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moeroute.parquet import naming_errors
from moeroute.schema import Rows, TraceError, TraceMeta
from moeroute.sizes import NO_SIZES, GivenSizes
from moeroute.trace import Trace, open_trace
from moeroute.writer import TraceWriter

if TYPE_CHECKING:
    import polars as pl

_BATCH_TOKENS = 1 << 13
_CSV_TITLE = "# route_trace v1"
_CSV_COLUMNS = (
    "turn",
    "phase",
    "step",
    "layer",
    "slot",
    "expert",
    "weight",
    "residency",
    "expert_bytes",
)


def import_foreign(path: str | Path, out: str | Path, *, sizes: GivenSizes = NO_SIZES) -> Trace:
    """Import a file of any known foreign format, told by its content, and open the result.

    ``sizes`` are what its recorder did not say of the model. Raises TraceError if the format is
    none of them, or what the importer raises.
    """
    path = Path(path)
    if not path.is_file():
        raise TraceError(f"{path}: there is no such file")
    with path.open("rb") as file:
        start = file.read(len(_CSV_TITLE))
    if start.startswith(b"PK"):
        return import_npz(path, out, sizes=sizes)
    if start == _CSV_TITLE.encode():
        return import_bigmoe_csv(path, out, sizes=sizes)
    if start.startswith(b"PAR1"):
        raise TraceError(f"{path}: is Parquet: traces of this format need no import")
    raise TraceError(
        f"{path}: no known format: there are .npz routing (arrays ids, seq, pos, phase) and "
        f"BigMoeOnEdge route CSV (first line {_CSV_TITLE!r})"
    )


def import_npz(
    path: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    sizes: GivenSizes = NO_SIZES,
) -> Trace:
    """Import an .npz of routing and open the result.

    Arrays, N tokens, L layers, K experts by weight descending: `ids` [N, L, K], `seq` [N],
    `pos` [N], `phase` [N] (1 = decode), `n_experts`; `top_k` and `weights` [N, L, K] if there are
    any; `valid` [N, L], false where the recorder lost the record. `model` defaults to the file's
    name. Raises TraceError naming the file and the array that is missing or wrong.
    """
    path = Path(path)
    arrays = _load_npz(path)
    ids = arrays["ids"]
    order = np.lexsort((arrays["pos"], arrays["seq"]))
    valid = arrays.get("valid", np.ones(ids.shape[:2])).astype(np.bool_)
    kept = valid.any(axis=1)
    known = {"ids", "seq", "pos", "phase", "n_experts", "top_k", "weights", "valid"}
    dropped = sorted(set(arrays) - known)
    notes = {"imported_from": _origin(path)}
    if dropped:
        notes["not_imported"] = "arrays " + ", ".join(dropped)
    if not kept.all():
        notes["lost_tokens"] = f"{(~kept).sum()} tokens of which the recorder kept no layer"
    meta = TraceMeta(
        source="imported",
        model=model or path.stem,
        n_layers=ids.shape[1],
        n_experts=int(arrays["n_experts"]),
        top_k=ids.shape[2],
        missing_rows=int((~valid[kept]).sum()),
        notes=notes,
    )
    return _write(path, out, sizes.on(meta), _npz_rows(path, arrays, order, valid))


def _load_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, ValueError, EOFError, AttributeError) as error:
        raise TraceError(f"{path}: not a readable .npz archive ({error})") from None
    _check_npz(path, arrays)
    return arrays


def _check_npz(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    for name in ("ids", "seq", "pos", "phase", "n_experts"):
        if name not in arrays:
            raise TraceError(f"{path}: no array {name}; it has {', '.join(sorted(arrays))}")
    shape = arrays["ids"].shape
    if len(shape) != 3:
        raise TraceError(f"{path}: array ids has shape {list(shape)}, not [tokens, layers, top-k]")
    token, record = shape[:1], shape[:2]
    expected: dict[str, tuple[tuple[int, ...], str]] = {  # shape, kinds of number
        "ids": (shape, "iu"),
        "seq": (token, "iu"),
        "pos": (token, "iu"),
        "phase": (token, "iub"),
        "n_experts": ((), "iu"),
        "top_k": ((), "iu"),
        "weights": (shape, "f"),
        "valid": (record, "iub"),
    }
    for name in expected.keys() & arrays.keys():
        found, (want, kinds) = arrays[name], expected[name]
        if found.shape != want or found.dtype.kind not in kinds:
            raise TraceError(
                f"{path}: array {name} is {found.dtype}{list(found.shape)}, not "
                f"{'real' if kinds == 'f' else 'whole'} numbers {list(want)}"
            )
    if "top_k" in arrays and int(arrays["top_k"]) != shape[2]:
        raise TraceError(f"{path}: top_k is {arrays['top_k']}, but ids holds {shape[2]} a token")


def _npz_rows(
    path: Path,
    arrays: dict[str, NDArray[Any]],
    order: NDArray[np.intp],
    valid: NDArray[np.bool_],
) -> Iterator[Rows]:
    for start in range(0, len(order), _BATCH_TOKENS):
        tokens = order[start : start + _BATCH_TOKENS]
        token, layer = np.nonzero(valid[tokens])
        token = tokens[token]
        weights = arrays["weights"][token, layer] if "weights" in arrays else None
        yield Rows(
            sequence=_fit(path, "seq", arrays["seq"][token], np.uint32),
            position=_fit(path, "pos", arrays["pos"][token], np.uint32),
            phase=_fit(path, "phase", arrays["phase"][token], np.uint8),
            token_id=None,
            layer=layer.astype(np.uint16),
            experts=_fit(path, "ids", arrays["ids"][token, layer], np.uint16),
            weights=None if weights is None else weights.astype(np.float32),
        )


@dataclass(frozen=True)
class _RouteHeader:
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


def import_bigmoe_csv(
    path: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    sizes: GivenSizes = NO_SIZES,
) -> Trace:
    """Import a BigMoeOnEdge route CSV and open the result.

    A turn becomes a sequence and a step a position. What the phone's cache did is kept in the
    columns `residency` and `loaded_bytes`. Raises TraceError naming the file, line and column.
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.readline().strip() != _CSV_TITLE.encode():
            raise TraceError(f"{path}: line 1: not a route trace: it starts with {_CSV_TITLE!r}")
    header, n_comments = _read_route_header(path)
    table = _read_route_table(path, first_line=n_comments + 2).sort(
        "turn", "step", "layer", "slot", maintain_order=True
    )
    layers = table["layer"].unique().sort().to_list()
    _check_groups(path, table, header.top_k)
    rows = _route_rows(path, table, header.top_k, layers)
    missing_rows = _check_decode(path, table, layers)
    meta = _route_meta(path, header, layers, missing_rows, model)
    return _write(path, out, sizes.on(meta), iter([rows]))


def _read_route_header(path: Path) -> tuple[_RouteHeader, int]:
    model: dict[str, str] = {}
    layers: list[dict[str, str]] = []
    n_comments = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.startswith("#"):
                break
            n_comments += 1
            pairs = dict(re.findall(r"(\w+)=(\S+)", line))
            if "layer" in pairs:
                layers.append(pairs)
            else:
                model |= pairs
    try:
        header = _RouteHeader(
            model=model["model"].rsplit("/", 1)[-1].removesuffix(".gguf"),
            arch=model.get("arch", "unknown"),
            n_experts=int(model["n_expert"]),
            top_k=int(model["n_expert_used"]),
            expert_bytes={int(pairs["layer"]): int(pairs["expert_bytes"]) for pairs in layers},
            dense_bytes={int(pairs["layer"]): int(pairs["dense_bytes"]) for pairs in layers},
        )
    except KeyError as error:
        raise TraceError(f"{path}: the comment lines do not say {error.args[0]}=") from None
    except ValueError as error:
        raise TraceError(f"{path}: the comment lines are damaged ({error})") from None
    if not 1 <= header.top_k <= header.n_experts:
        raise TraceError(f"{path}: the comment lines say n_expert_used={header.top_k}")
    return header, n_comments


def _read_route_table(path: Path, first_line: int) -> pl.DataFrame:
    """The rows as numbers; a value that is none is told by its line and column."""
    import polars as pl

    with naming_errors(path):
        table = pl.read_csv(path, comment_prefix="#", infer_schema=False)
    if absent := [name for name in _CSV_COLUMNS if name not in table.columns]:
        raise TraceError(f"{path}: no column {absent[0]}; it has {', '.join(table.columns)}")
    if not len(table):
        raise TraceError(f"{path}: has no rows")
    numbers = table.select(
        pl.col(name).cast(pl.Float32 if name == "weight" else pl.UInt32, strict=False)
        for name in _CSV_COLUMNS
    )
    for series in numbers:
        if series.null_count():
            row = int(series.is_null().arg_max() or 0)
            raise TraceError(
                f"{path}: line {first_line + row}, column {series.name}: "
                f"{table[series.name][row]!r} is no number that belongs there"
            )
    return numbers.with_columns(pl.int_range(first_line, first_line + pl.len()).alias("line"))


def _check_groups(path: Path, table: pl.DataFrame, top_k: int) -> None:
    """Each (turn, step, layer) must have its `top_k` slots 0, 1, ... in one phase."""
    slot = table["slot"].to_numpy()
    wrong = slot != np.arange(len(slot)) % top_k
    for name in ("turn", "step", "layer", "phase"):
        column = table[name].to_numpy()
        wrong[1:] |= (slot[1:] != 0) & (np.diff(column) != 0)
    if wrong.any():
        line = table["line"][int(wrong.argmax())]
        raise TraceError(
            f"{path}: line {line}, column slot: a (turn, step, layer) before or here does not "
            f"have its {top_k} slots 0..{top_k - 1} once each"
        )
    if len(slot) % top_k:
        raise TraceError(f"{path}: line {table['line'][-1]}, column slot: truncated: slots missing")


def _check_decode(path: Path, table: pl.DataFrame, layers: list[int]) -> int:
    """Count missing (step, layer) pairs. Only a prompt may lack any: its tokens but the last skip
    the last layer, since nothing reads them there.
    """
    import polars as pl

    steps = table.group_by("turn", "step", maintain_order=True).agg(
        pl.col("phase").first(), pl.col("line").max(), pl.col("layer").n_unique()
    )
    short = steps.filter(pl.col("phase") == 1, pl.col("layer") < len(layers))
    if len(short):
        turn, step, _, line, n_layers = short.row(0)
        raise TraceError(
            f"{path}: line {line}, column layer: decode step {step} of turn {turn} has {n_layers} "
            f"of {len(layers)} layers: truncated?"
        )
    return int((len(layers) - steps["layer"].cast(pl.Int64)).sum())


def _route_rows(path: Path, table: pl.DataFrame, top_k: int, layers: list[int]) -> Rows:
    heads = table.gather_every(top_k)

    def listed(name: str, dtype: type[np.generic]) -> NDArray[Any]:
        return _fit(path, name, table[name].to_numpy().reshape(-1, top_k), dtype)

    layer = np.searchsorted(layers, heads["layer"].to_numpy())
    return Rows(
        sequence=_fit(path, "turn", heads["turn"].to_numpy(), np.uint32),
        position=_fit(path, "step", heads["step"].to_numpy(), np.uint32),
        phase=_fit(path, "phase", heads["phase"].to_numpy(), np.uint8),
        token_id=None,
        layer=layer.astype(np.uint16),
        experts=listed("expert", np.uint16),
        weights=table["weight"].to_numpy().reshape(-1, top_k),
        residency=listed("residency", np.uint8),
        loaded_bytes=listed("expert_bytes", np.uint32),
    )


def _route_meta(
    path: Path, header: _RouteHeader, layers: list[int], missing_rows: int, model: str | None
) -> TraceMeta:
    sizes = [header.expert_bytes[layer] for layer in layers if layer in header.expert_bytes]
    dense = [header.dense_bytes[layer] for layer in layers if layer in header.dense_bytes]
    notes = {
        "imported_from": _origin(path),
        "architecture": header.arch,
        "residency": "the recorder's own cache: 0 miss, 1 hit, 2 prefetch hit; a prompt's experts "
        "count as misses, loaded_bytes tells which of them were read",
    }
    if len(set(sizes)) > 1:
        notes["expert_bytes_by_layer"] = json.dumps(sizes)
        notes["expert_bytes"] = "experts differ in size by layer; the metadata has the largest"
    if len(set(dense)) > 1:
        notes["layer_bytes_by_layer"] = json.dumps(dense)
        notes["layer_bytes"] = "layers differ in size; the metadata has the mean"
    if layers != list(range(len(layers))):
        notes["layers"] = json.dumps(layers)
    return TraceMeta(
        source="imported",
        model=model or header.model,
        n_layers=len(layers),
        n_experts=header.n_experts,
        top_k=header.top_k,
        expert_bytes={header.precision: max(sizes)} if any(sizes) else {},
        layer_bytes=round(sum(dense) / len(dense)) or None if dense else None,
        missing_rows=missing_rows,
        notes=notes,
    )


def _write(path: Path, out: str | Path, meta: TraceMeta, batches: Iterator[Rows]) -> Trace:
    """Write the batches to `out`, leaving nothing behind if one of them is wrong."""
    writer = TraceWriter(out, meta, rows_of=f"{path}, as a trace")
    try:
        for rows in batches:
            writer.write(rows)
        writer.close()
    except BaseException:
        writer.discard()
        raise
    return open_trace(Path(out))


def _fit(path: Path, name: str, values: ArrayLike, dtype: type[np.generic]) -> NDArray[Any]:
    """`values` as `dtype`. Raises TraceError naming file and column if one does not fit."""
    found = np.asarray(values)
    fitted = found.astype(dtype)
    if not np.array_equal(fitted, found):
        bad = found[fitted != found].flat[0]
        raise TraceError(f"{path}: {name}: {bad} is out of range")
    return fitted


def _origin(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.name}, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
