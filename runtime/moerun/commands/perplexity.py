"""`moerun perplexity`: what quantisation and lossy policies cost, over a grid of them."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from moepolicy import lists
from moepolicy.completion import among, listed
from moepolicy.console import emit, keeping, note
from moepolicy.options import taking
from moepolicy.outputs import check_free, check_suffix
from moepolicy.progress import Bar
from moepolicy.refusals import Refusals
from moepolicy.tables import Format

from moerun.commands import names, prepare
from moerun.commands.options import CacheOptions, DeviceOptions, ModelOptions, Output
from moerun.errors import RunError
from moerun.format.names import check_precision

if TYPE_CHECKING:
    from moepolicy import PolicySpec

    from moerun.perplexity.measure import Measurement
    from moerun.perplexity.results import Key, Results

TABLE_1 = "native,4bit,3bit,2bit"
HELD_OUT_SHARE = 0.05  # of each text the bundled model was trained on
_LIST_HELP = (
    "as a list: native, fp32, fp16, bf16, 4bit, 3bit, 2bit. Default: Table 1's, "
    f"{TABLE_1} (of a packed store, its own)."
)


@dataclass(frozen=True, kw_only=True)
class MeasurementOptions:
    """What is measured on the text, in windows of how many tokens."""

    attention: Annotated[
        str | None,
        typer.Option(
            help=f"Precisions of attention, {_LIST_HELP}",
            show_default=False,
            autocompletion=listed(names.precisions),
        ),
    ] = None
    experts: Annotated[
        str | None,
        typer.Option(
            help=f"Precisions of the experts, {_LIST_HELP}",
            show_default=False,
            autocompletion=listed(names.precisions),
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a window. Default: the model's context, at most 2048.",
            show_default=False,
        ),
    ] = None
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens between the beginnings of two windows. Default: the context, so that "
            "windows do not overlap, as in papers on quantisation. A smaller stride gives each "
            "token more context and takes as much longer.",
            show_default=False,
        ),
    ] = None
    tokens: Annotated[
        int | None,
        typer.Option(help="Use only this many tokens of the text.", show_default=False),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            help="Keep the results in this file (JSON lines, .jsonl), and go on with the results "
            "that it holds. Default: a file in the user's cache.",
            show_default=False,
        ),
    ] = None
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="The policy that keeps experts and answers misses; may be given several times, "
            "for one row each. Default: lru, which changes nothing.",
            show_default=False,
            autocompletion=among(names.policies),
        ),
    ] = None
    by_token: Annotated[
        bool | None,
        typer.Option(
            "--by-token/--by-window",
            help="Decode the scored tokens one at a time, like an answer, or read whole windows, "
            "like a prompt, which is much quicker. Most policies that change what is computed do "
            "so for single tokens only. Default: by token where such a policy is measured.",
            show_default=False,
        ),
    ] = None


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
    asked: MeasurementOptions,
    format: Output = Format.table,
    model: Annotated[ModelOptions, taking("model", "low")],
    cache: Annotated[CacheOptions, taking("slots", "memory", "scope", "calibration")],
    device: Annotated[DeviceOptions, taking("device", "threads", "machine")],
) -> None:
    """Measure perplexity and size over the bits of attention and of experts, and over policies.

    The model runs as it generates: offloaded, by the stock forward pass. Missing stores are packed
    on the way and kept. After a kill or an interruption the same command goes on with the window
    it was at.

    Table 1 of the base paper has Mixtral-8x7B on WikiText-2 and C4. The table prints its figures,
    in columns of their own, for a model of that shape only. Compare them with a measurement on the
    same text.
    """
    from moepolicy import find_policy

    from moerun.policies import require_some, servable

    if asked.out is not None:
        check_suffix(asked.out, [".jsonl"])
        check_free(asked.out, force=True)  # results that are there are gone on with
    for listed_names in (asked.attention, asked.experts):
        for name in lists.names(listed_names):
            check_precision(name)
    prepare.check(model=model, cache=cache, device=device)
    if text is not None and not text.is_file():
        raise RunError(f"{text} is not there: give a text file, or none")
    refused: Refusals = {}
    policies = [find_policy(name) for name in dict.fromkeys(asked.policy or ("lru",))]
    specs = servable(
        policies, refused, low=model.low is not None, machine=device.machine is not None
    )
    settings = prepare.settings(cache, device, policies=specs)
    prepare.quiet_libraries()
    from moerun.perplexity.measure import Measurement
    from moerun.perplexity.report import render
    from moerun.perplexity.results import Results

    pairs = _grid(model.model, asked.attention, asked.experts)
    prepare.check_low_name(model.low, [pair[1] for pair in pairs])
    lossy = any(spec.policy.lossy for spec in specs)
    measurement = Measurement(
        model.model,
        held_out_text() if text is None else _read(text),
        settings,
        context=asked.context,
        stride=asked.stride,
        tokens=asked.tokens,
        said_of="the held-out text" if text is None else str(text),
        by_token=lossy if asked.by_token is None else asked.by_token,
    )
    if (lower := prepare.low_store(model, None)) is not None:
        measurement.use_low(lower)
    points = [Point(*pair, spec) for pair in pairs for spec in specs]
    path = asked.out or measurement.default_results()
    with Results(path, measurement.identity) as results:
        with keeping(f"finished windows are kept in {path}: the same command goes on"):
            _measure(model.model, measurement, points, results, refused)
        results.finish()
    cells = [results.cells[point.key] for point in points if point.key in results.cells]
    require_some(cells, refused)
    emit(render(cells, measurement.identity, format, refused))


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
    return list(dict.fromkeys(lists.names(listed)))


def _measure(
    model: str,
    measurement: Measurement,
    points: list[Point],
    results: Results,
    refused: Refusals,
) -> None:
    """Every cell that the results do not have yet; a policy that fails joins ``refused``."""
    from moepolicy import PolicyError

    missing = [point for point in points if point.key not in results.cells]
    if len(missing) < len(points):
        there = len(points) - len(missing)
        note(f"{there} of {len(points)} cells are in {results.path}")
    taken_up = sum(len(results.windows(point.key)) for point in missing)
    total = len(missing) * len(measurement.windows)
    if taken_up:
        note(f"going on after window {taken_up} of {total}")
    began_s, measured = time.monotonic(), 0

    for number, point in enumerate(missing, start=1):
        weights = ModelOptions(model=model, precision=point.experts, attention=point.attention)
        with prepare.store(weights) as store, Bar(f"{point}", total, "window") as bar:
            bar.go_on_from(taken_up + measured)

            def on_window(bar: Bar = bar) -> None:
                nonlocal measured
                measured += 1
                bar.update(taken_up + measured)

            try:
                cell = measurement.measure(store, *point, results, on_window)
            except PolicyError as error:
                refused[point.policy.label] = str(error)
                continue
        note(
            f"{point}: perplexity {cell.perplexity:.4f} "
            f"({number} of {len(missing)}{_left(total - taken_up, measured, began_s)})",
        )


def _left(windows: int, measured: int, began_s: float) -> str:
    """What the remaining windows will take, packing included, by what those until now took."""
    if not 0 < measured < windows:
        return ""
    left_s = (time.monotonic() - began_s) / measured * (windows - measured)
    return f", about {timedelta(seconds=round(left_s))} left"
