"""Table 2 as text for people, and as rows and one document for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from moepolicy.tables import Table, described, wrapped

from moesim.table2.findings import reading_s, unexplained
from moesim.table2.ours import Reach
from moesim.table2.published import CARDS, FITTED, PRECISIONS, PREDICTED, Algorithm
from moesim.table2.reproduce import Account, Reproduction, TableCell
from moesim.workload.steps import Workload


def cells(found: Reproduction, provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The table's cells as rows."""
    return [_cell(cell) | provenance for cell in found.account.cells]


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


def _cell(cell: TableCell) -> dict[str, Any]:
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


def text(found: Reproduction, workload: Workload, title: str) -> str:
    """The whole report as text for people."""
    account = found.account
    fitted, predicted = (account.median_error(role) for role in ("fitted", "predicted"))
    readings = {other.reading.name: other.reading.summary for other in found.others}
    parts = [
        wrapped(
            [
                title,
                f"Reading '{account.reading.name}': {account.reading.summary}; "
                f"{account.guesses} guessed ahead. Tokens/s:",
            ]
        ),
        _cells_table(account).render(),
        wrapped([f"Median error: fitted {fitted:.1%}, predicted {predicted:.1%}."]),
        wrapped(["Fitted constants next to the data sheets'"])
        + _constants_table(found, workload).render(),
        wrapped(
            ["The same fit under other readings of the measured engines; n: experts guessed ahead"]
        )
        + _readings_table(found).render(),
        described(readings),
        wrapped(
            [
                "This project's engine with those constants: copies during compute, nothing "
                "written back. Simulated tokens/s, and the paper's fastest row to compare"
            ]
        )
        + _reach_table(found.reach).render()
        + wrapped(_best(found.reach)),
        wrapped(["Left unexplained", *(f"- {one}" for one in unexplained(found, workload))]),
    ]
    return "\n".join(parts)


def _best(reach: Sequence[Reach]) -> list[str]:
    times = Counter(row.best for row in reach if row.best is not None)
    each = ", ".join(f"{name} in {n} of {len(reach)}" for name, n in times.most_common())
    return [f"Fastest without knowing the future: {each}."] if each else []


def _cells_table(account: Account) -> Table:
    halves = [("paper", "fitted", "err %"), ("paper", "pred.", "err %")]
    names = [
        f"{precision}\n{name}"
        for precision, half in zip(PRECISIONS, halves, strict=True)
        for name in half
    ]
    table = Table(["GPU", "algorithm"], names)
    by_place = {(cell.gpu, cell.algorithm, cell.precision): cell for cell in account.cells}
    for card in CARDS:
        for algorithm in Algorithm:
            row = [card.name, algorithm.value]
            for precision in PRECISIONS:
                cell = by_place[card.name, algorithm, precision]
                error = "(left out)" if cell.role == "excluded" else f"{100 * cell.error:+.1f}"
                row += [f"{cell.published:.3f}", f"{cell.simulated:.3f}", error]
            table.add_row(*row)
        table.end_section()
    return table


def _constants_table(found: Reproduction, workload: Workload) -> Table:
    names = ["link", "slots", "GB/s\nfitted", "GB/s\nasked", "GB/s\nby PCIe"]
    names += ["layer ms\nfitted", "layer ms\nby memory", "misfit\n%"]
    table = Table(["GPU"], names, left=["link"])
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
    names = ["n", "misfit\n%", f"{PREDICTED}\nmedian %", "worst %", "link %\nasked"]
    table = Table(["reading"], names)
    for row in map(_reading, found.others):
        table.add_row(
            row["reading"],
            str(row["guesses"]),
            f"{100 * row['misfit']:.1f}",
            f"{100 * row['median_error_predicted']:.1f}",
            f"{100 * row['worst_error_predicted']:.1f}",
            f"{100 * row['largest_link_share_asked']:.0f}",
        )
    return table


def _reach_table(reach: Sequence[Reach]) -> Table:
    policies = list(reach[0].policies)
    table = Table(["GPU", "experts"], ["paper", *policies, "limit", "compute\nalone"])
    shown: Callable[[float], str] = "{:.3f}".format
    for row in reach:
        table.add_row(
            row.gpu,
            row.precision,
            shown(row.published),
            *(shown(row.policies[name]) for name in policies),
            shown(row.limit),
            shown(row.compute_limit),
        )
        if row.precision == FITTED and row.gpu == CARDS[-1].name:
            table.end_section()
    return table
