"""Table 2 as text for people, or as JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from moesim.report import Format
from moesim.table2.findings import reading_s, unexplained
from moesim.table2.ours import Reach
from moesim.table2.published import CARDS, FITTED, PRECISIONS, PREDICTED, Algorithm
from moesim.table2.reproduce import Account, Cell, Reproduction
from moesim.workload.steps import Workload

WIDTH = 100


def render(
    found: Reproduction, workload: Workload, format: Format, title: str, provenance: dict[str, Any]
) -> str:
    """Everything as a table or JSON; CSV has the cells alone."""
    if format is Format.table:
        return _text(found, workload, title)
    if format is Format.json:
        return json.dumps(provenance | as_json(found, workload), indent=1) + "\n"
    rows = [_cell(cell) | provenance for cell in found.account.cells]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(found: Reproduction, workload: Workload) -> dict[str, Any]:
    """Rates are bytes or tokens a second, errors relative to the printed value."""
    account = found.account
    return {
        "reading": account.reading.name,
        "guesses": account.guesses,
        "median_error_fitted": account.median_error("fitted"),
        "median_error_predicted": account.median_error("predicted"),
        "median_error_of_slowdown": account.median_slowdown_error(),
        "median_error_unmodelled": found.median_error_unmodelled(scaled=False),
        "median_error_unmodelled_by_bytes": found.median_error_unmodelled(scaled=True),
        "cells": [_cell(cell) for cell in account.cells],
        "constants": list(_constants(found, workload)),
        "readings": [_reading(other) for other in found.others],
        "this_engine": [_reach(reach) for reach in found.reach],
        "unexplained": unexplained(found, workload),
    }


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        "gpu": cell.gpu,
        "precision": cell.precision,
        "algorithm": cell.algorithm.value,
        "role": cell.role,
        "published_tokens_per_s": cell.published,
        "simulated_tokens_per_s": cell.simulated,
        "error": cell.error,
    }


def _constants(found: Reproduction, workload: Workload) -> Iterable[dict[str, Any]]:
    for card in CARDS:
        fit = found.account.fits[card.name]
        implied, traced = found.implied_loads[card.name]
        yield {
            "gpu": card.name,
            "slots": card.slots,
            "link_bytes_per_s": fit.constants.link_bytes_per_s,
            "asked_link_bytes_per_s": fit.asked_link_bytes_per_s,
            "link": card.link,
            "data_sheet_link_bytes_per_s": card.link_bytes_per_s,
            "layer_s": fit.constants.layer_s,
            "data_sheet_layer_s": reading_s(workload, card),
            "misfit": fit.misfit,
            "implied_lru_loads_per_token": implied,
            "trace_lru_loads_per_token": traced,
        }


def _reading(account: Account) -> dict[str, Any]:
    return {
        "reading": account.reading.name,
        "summary": account.reading.summary,
        "guesses": account.guesses,
        "misfit": account.misfit,
        "median_error_predicted": account.median_error("predicted"),
        "worst_error_predicted": max(account.errors("predicted")),
        "largest_link_share_asked": account.asked_link_share,
    }


def _reach(reach: Reach) -> dict[str, Any]:
    return {
        "gpu": reach.gpu,
        "precision": reach.precision,
        "published_full_tokens_per_s": reach.published,
        "simulated_tokens_per_s": reach.policies,
        "best_policy": reach.best,
        "limit_tokens_per_s": reach.limit,
        "compute_limit_tokens_per_s": reach.compute_limit,
    }


def _text(found: Reproduction, workload: Workload, title: str) -> str:
    account = found.account
    notes = "\n".join(f"- {sentence}" for sentence in unexplained(found, workload))
    fitted, predicted = (account.median_error(role) for role in ("fitted", "predicted"))
    return (
        f"{title}\nReading '{account.reading.name}': {account.reading.summary}; "
        f"{account.guesses} guessed ahead. Tokens/s:\n{_plain(_cells_table(account))}"
        f"Median error: fitted {fitted:.1%}, predicted {predicted:.1%}.\n\n"
        f"Fitted constants beside the data sheets'\n{_plain(_constants_table(found, workload))}\n"
        "The same fit under other readings of the measured engines; n: experts guessed ahead\n"
        f"{_plain(_readings_table(found))}\n"
        "This project's engine with those constants: copies beside compute, nothing written back.\n"
        "Simulated tokens/s, and the paper's fastest row to compare\n"
        f"{_plain(_reach_table(found.reach))}{_best(found.reach)}\nLeft unexplained\n{notes}\n"
    )


def _best(reach: Sequence[Reach]) -> str:
    times = Counter(row.best for row in reach if row.best is not None)
    each = ", ".join(f"{name} in {n} of {len(reach)}" for name, n in times.most_common())
    return f"Fastest without knowing the future: {each}.\n" if each else ""


def _plain(table: Table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=WIDTH).print(table)
    return stream.getvalue()


def _table(names: Sequence[str], *, text: int) -> Table:
    """A table whose first ``text`` columns are words, the others numbers."""
    table = Table(header_style="bold")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < text else "right", no_wrap=True)
    return table


def _cells_table(account: Account) -> Table:
    halves = [("paper", "fitted", "err %"), ("paper", "pred.", "err %")]
    names = [
        f"{precision}\n{name}"
        for precision, half in zip(PRECISIONS, halves, strict=True)
        for name in half
    ]
    table = _table(["GPU", "algorithm", *names], text=2)
    by_place = {(cell.gpu, cell.algorithm, cell.precision): cell for cell in account.cells}
    last = list(Algorithm)[-1]
    for card in CARDS:
        for algorithm in Algorithm:
            row = [card.name, algorithm.value]
            for precision in PRECISIONS:
                cell = by_place[card.name, algorithm, precision]
                error = "(left out)" if cell.role == "excluded" else f"{100 * cell.error:+.1f}"
                row += [f"{cell.published:.3f}", f"{cell.simulated:.3f}", error]
            table.add_row(*row, end_section=algorithm is last)
    return table


def _constants_table(found: Reproduction, workload: Workload) -> Table:
    names = ["GPU", "link", "slots", "GB/s\nfitted", "GB/s\nasked", "GB/s\nby PCIe"]
    table = _table([*names, "layer ms\nfitted", "layer ms\nby memory", "misfit\n%"], text=2)
    for row in _constants(found, workload):
        table.add_row(
            row["gpu"],
            row["link"],
            str(row["slots"]),
            f"{row['link_bytes_per_s'] / 1e9:.1f}",
            f"{row['asked_link_bytes_per_s'] / 1e9:.1f}",
            f"{row['data_sheet_link_bytes_per_s'] / 1e9:.1f}",
            f"{row['layer_s'] * 1e3:.2f}",
            "-" if row["data_sheet_layer_s"] is None else f"{row['data_sheet_layer_s'] * 1e3:.2f}",
            f"{100 * row['misfit']:.1f}",
        )
    return table


def _readings_table(found: Reproduction) -> Table:
    names = ["reading", "that is", "n", "misfit\n%", f"{PREDICTED}\nmedian %", "worst %"]
    table = _table([*names, "link %\nasked"], text=2)
    for row in map(_reading, found.others):
        table.add_row(
            row["reading"],
            row["summary"],
            str(row["guesses"]),
            f"{100 * row['misfit']:.1f}",
            f"{100 * row['median_error_predicted']:.1f}",
            f"{100 * row['worst_error_predicted']:.1f}",
            f"{100 * row['largest_link_share_asked']:.0f}",
        )
    return table


def _reach_table(reach: Sequence[Reach]) -> Table:
    policies = list(reach[0].policies)
    names = ["GPU", "experts", "paper", *policies, "limit", "compute\nalone"]
    table = _table(names, text=2)
    shown: Callable[[float], str] = "{:.3f}".format
    for row in reach:
        table.add_row(
            row.gpu,
            row.precision,
            shown(row.published),
            *(shown(row.policies[name]) for name in policies),
            shown(row.limit),
            shown(row.compute_limit),
            end_section=row.precision == FITTED and row.gpu == CARDS[-1].name,
        )
    return table
