"""`moerun perplexity`: what quantisation and lossy policies cost, over a grid of them."""

from __future__ import annotations

import importlib
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from moepolicy import PolicyError, PolicySpec, find_policy
from moepolicy.completion import among, listed
from moepolicy.console import emit
from moepolicy.options import taking
from moepolicy.outputs import check_suffix
from moepolicy.tables import Format, Table, to_csv, to_json, wrapped
from rich.console import Console

from moerun.amounts import decimal_bytes
from moerun.commands import names, prepare
from moerun.commands.options import CacheOptions, DeviceOptions, ModelOptions, Output
from moerun.errors import RunError
from moerun.policies import Refusals, refusal_notes, require_some, servable, with_refused

if TYPE_CHECKING:
    from rich.progress import Progress

    from moerun.perplexity.measure import Measurement
    from moerun.perplexity.results import Cell, Key, Results

TABLE_1 = "native,4bit,3bit,2bit"
HELD_OUT_SHARE = 0.05  # of each text the bundled model was trained on
_LIST_HELP = (
    "as a list: native, fp32, fp16, bf16, 4bit, 3bit, 2bit. Default: Table 1's, "
    f"{TABLE_1} (of a packed store, its own)."
)


def perplexity(
    text: Annotated[
        Path | None,
        typer.Argument(
            metavar="TEXT",
            help="A UTF-8 text. Default: the part of Python's help topics that the bundled model "
            "was not trained on.",
            show_default=False,
        ),
    ] = None,
    *,
    attention: Annotated[
        str | None,
        typer.Option(
            help=f"Precisions of attention, {_LIST_HELP}",
            show_default=False,
            autocompletion=listed(names.precisions),
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            help=f"Precisions of the experts, {_LIST_HELP}",
            show_default=False,
            autocompletion=listed(names.precisions),
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a window. Default: the model's context, at most 2048.",
            show_default=False,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens between the beginnings of two windows. Default: the context, so that "
            "windows do not overlap, as in papers on quantisation. A smaller stride gives each "
            "token more context and takes as much longer.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Use only this many tokens of the text.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Keep the results in this file (JSON lines, .jsonl), and go on with the results "
            "that it holds. Default: a file in the user's cache.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="The policy that keeps experts and answers misses; may be given several times, "
            "for one row each. Default: lru, which changes nothing.",
            show_default=False,
            autocompletion=among(names.policies),
        ),
    ] = None,
    by_token: Annotated[
        bool | None,
        typer.Option(
            "--by-token/--by-window",
            help="Decode the scored tokens one at a time, like an answer, or read whole windows, "
            "like a prompt, which is much quicker. Most policies that change what is computed do "
            "so for single tokens only. Default: by token where such a policy is measured.",
            show_default=False,
        ),
    ] = None,
    format: Output = Format.table,
    model: Annotated[ModelOptions, taking("model", "low")],
    cache: Annotated[CacheOptions, taking("slots", "memory", "scope", "calibration")],
    device: Annotated[DeviceOptions, taking("device", "threads")],
) -> None:
    """Measure perplexity and size over the bits of attention and of experts, and over policies.

    The model runs as it generates: offloaded, by the stock forward pass. Missing stores are packed
    on the way and kept. After a kill or an interruption the same command goes on with the window
    it was at.

    Table 1 of the base paper has Mixtral-8x7B on WikiText-2 and C4. The table prints its figures,
    in columns of their own, for a model of that shape only. Compare them with a measurement on the
    same text.
    """
    if out is not None:
        check_suffix(out, [".jsonl"])
    refused: Refusals = {}
    asked = [find_policy(name) for name in dict.fromkeys(policy or ("lru",))]
    specs = servable(asked, refused, low=model.low is not None)
    settings = prepare.settings(cache, device, policy=specs[0].label)
    prepare.quiet_libraries()
    from moerun.perplexity.measure import Measurement
    from moerun.perplexity.results import Results

    if by_token is None:
        by_token = any(spec.policy.lossy for spec in specs)
    pairs = _grid(model.model, attention, experts)
    prepare.check_low_name(model.low, [pair[1] for pair in pairs])
    content = held_out_text() if text is None else _read(text)
    measurement = Measurement(
        model.model,
        content,
        settings,
        context=context,
        stride=stride,
        tokens=tokens,
        by_token=by_token,
    )
    if (lower := prepare.low_store(model, None)) is not None:
        measurement.use_low(lower)
    points = [Point(*pair, spec) for pair in pairs for spec in specs]
    path = out or measurement.default_results()
    console = Console(stderr=True)
    with Results(path, measurement.identity) as results:
        try:
            _measure(model.model, measurement, points, results, console, refused)
        except KeyboardInterrupt:
            _say(console, f"finished windows are kept in {path}: the same command goes on")
            raise
        results.finish()
    cells = [results.cells[point.key] for point in points if point.key in results.cells]
    require_some(cells, refused)
    emit(_render(cells, measurement.identity, format, refused))


class Point(NamedTuple):
    """What one cell is to be of."""

    attention: str
    experts: str
    policy: PolicySpec

    @property
    def key(self) -> Key:
        """What the cell is filed under: precision of attention, precision of experts, policy."""
        return self.attention, self.experts, self.policy.label

    def __str__(self) -> str:
        return f"attention {self.attention}, experts {self.experts}, policy {self.policy.label}"


def held_out_text() -> str:
    """The tail of this Python's help topics, which training of the bundled model left out."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = "".join(topics[name] for name in sorted(topics)).encode()
    return text[text.index(b"\n", int(len(text) * (1 - HELD_OUT_SHARE))) + 1 :].decode()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is no UTF-8 text") from error


def _grid(model: str, attention: str | None, experts: str | None) -> list[tuple[str, str]]:
    """The precisions asked for, attention by attention."""
    from moerun.format.precision import Precisions
    from moerun.perplexity.subject import own_precisions

    own = own_precisions(model)
    ours, theirs = own or (TABLE_1, TABLE_1)
    keys = [(a, e) for a in _names(attention or ours) for e in _names(experts or theirs)]
    for key in keys:
        if own is None:
            Precisions.chosen(key[1], key[0], None)
        elif key != own:
            raise RunError(
                f"{model} is a store with {own[0]} attention and {own[1]} experts: for others "
                "give the checkpoint it was packed from"
            )
    return keys


def _names(listed: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in listed.split(",")))


def _say(console: Console, text: str) -> None:
    console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def _bar(console: Console) -> Progress:
    """Windows done and the time left, on a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _measure(
    model: str,
    measurement: Measurement,
    points: list[Point],
    results: Results,
    console: Console,
    refused: Refusals,
) -> None:
    """Every cell that the results do not have yet; a policy that fails joins ``refused``."""
    missing = [point for point in points if point.key not in results.cells]
    if len(missing) < len(points):
        there = len(points) - len(missing)
        _say(console, f"{there} of {len(points)} cells are in {results.path}")
    bar = _bar(console)
    taken_up = sum(len(results.windows(point.key)) for point in missing)
    total = len(missing) * len(measurement.windows)
    task = bar.add_task("measuring", total=total, completed=taken_up)
    if taken_up:
        _say(console, f"going on after window {taken_up} of {total}")
    began_s, measured = time.monotonic(), 0

    def on_window() -> None:
        nonlocal measured
        measured += 1
        bar.advance(task)

    for number, point in enumerate(missing, start=1):
        weights = ModelOptions(model=model, precision=point.experts, attention=point.attention)
        with prepare.store(weights) as store:
            bar.update(task, description=f"{point}, windows")
            bar.start()
            try:
                cell = measurement.measure(store, *point, results, on_window)
            except PolicyError as error:
                refused[point.policy.label] = str(error)
                continue
            finally:
                bar.stop()
        _say(
            console,
            f"{point}: perplexity {cell.perplexity:.4f} "
            f"({number} of {len(missing)}{_left(total - taken_up, measured, began_s)})",
        )


def _left(windows: int, measured: int, began_s: float) -> str:
    """What the remaining windows will take, packing included, by what those until now took."""
    if not 0 < measured < windows:
        return ""
    left_s = (time.monotonic() - began_s) / measured * (windows - measured)
    return f", about {timedelta(seconds=round(left_s))} left"


def _render(cells: list[Cell], identity: dict[str, Any], format: Format, refused: Refusals) -> str:
    if format is Format.table:
        return _table(cells, identity) + wrapped(refusal_notes(refused))
    rows = with_refused([asdict(cell) for cell in cells], refused)
    if format is Format.json:
        return to_json({"kind": "measured", **identity, "cells": rows})
    for row in rows:
        published = row.pop("published") or {}
        for name in ("size_gib", "wikitext2", "c4"):
            row[f"published_{name}"] = published.get(name)
    return to_csv(rows)


def _table(cells: list[Cell], identity: dict[str, Any]) -> str:
    known = any(cell.published for cell in cells)
    lossy = any(cell.lossy for cell in cells)
    policies = list(dict.fromkeys(cell.policy for cell in cells))
    keys = ["attention", "experts", *(["policy"] if lossy or len(policies) > 1 else [])]
    names = ["size", "bits/weight", "perplexity", "bits/byte"]
    names += ["out | other | low %"] if lossy else []
    names += ["GiB\n(published)", "WikiText-2\n(published)", "C4\n(published)"] if known else []
    table = Table(keys, names)
    for cell in cells:
        row = cell.published
        figures = (row.size_gib, row.wikitext2, row.c4) if row else (None,) * 3 * known
        shares = cell.skipped_share, cell.substituted_share, cell.low_share
        table.add_row(
            cell.attention,
            cell.experts,
            *([cell.policy] if lossy or len(policies) > 1 else []),
            decimal_bytes(cell.store_bytes),
            f"{cell.bits_per_weight:.2f}",
            f"{cell.perplexity:.4f}",
            f"{cell.bits_per_byte:.4f}",
            *([" | ".join(f"{100 * share:.1f}" for share in shares)] if lossy else []),
            *("" if figure is None else f"{figure:.2f}" for figure in figures),
        )
    title = wrapped([f"{identity['model']}: measured perplexity"])
    return f"{title}\n{table.render()}{wrapped(_legend(cells, identity))}"


def _legend(cells: list[Cell], identity: dict[str, Any]) -> list[str]:
    marks = {cell.policy: " (changes what the model computes)" * cell.lossy for cell in cells}
    how = "decoded token by token" if identity["by_token"] else "read whole"
    lines = [
        f"{cells[0].scored_tokens:,} tokens scored of {identity['tokens']:,} "
        f"({identity['text_bytes']:,} bytes) in windows of {identity['context']:,} every "
        f"{identity['stride']:,}, {how}; policy "
        f"{', '.join(f'{name}{mark}' for name, mark in marks.items())} on {identity['device']}"
    ]
    if any(cell.lossy for cell in cells):
        lines.append(
            "out | other | low: of the gates' weight, what was left out, computed by another "
            "expert, or computed at the lower precision"
        )
    if low_bytes := max(cell.low_expert_bytes for cell in cells):
        lines.append(
            f"lower precision: {identity['low']}, {decimal_bytes(low_bytes)} in addition to size"
        )
    lines += _same_size(cells)
    if any(cell.published for cell in cells):
        lines.append("published: Table 1 of arXiv 2312.17238, Mixtral-8x7B, on its own texts")
    return lines


def _same_size(cells: list[Cell]) -> list[str]:
    """Why weights of several precisions are of one size, where they are."""
    from moerun.format.layout import RECORD_ALIGN

    found: dict[tuple[str, int], dict[str, int]] = {}
    for cell in cells:
        sizes = {
            "experts": (cell.experts, cell.expert_bytes, cell.expert_data_bytes),
            "attention": (cell.attention, cell.attention_bytes, cell.attention_data_bytes),
        }
        for what, (precision, n_bytes, data_bytes) in sizes.items():
            found.setdefault((what, n_bytes), {})[precision] = data_bytes
    return [
        f"{what}: {' and '.join(data)} take {decimal_bytes(n_bytes)} alike, since each record is "
        f"rounded up to whole pages of {RECORD_ALIGN:,} bytes; without that "
        f"{' and '.join(map(decimal_bytes, data.values()))} (fewer bits need more scales)"
        for (what, n_bytes), data in found.items()
        if len(set(data.values()) - {0}) > 1
    ]
