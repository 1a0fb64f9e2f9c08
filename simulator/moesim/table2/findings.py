"""What the fit leaves unexplained, in words that follow from its numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.machine.profile import load_machine
from moesim.table2.published import CARDS, FITTED, PREDICTED, Algorithm, Card, published
from moesim.table2.reproduce import Account, Reproduction, TableCell
from moesim.workload.steps import Workload

FAR = 0.10  # a predicted cell's error that is worth naming


def reading_s(workload: Workload, card: Card) -> float | None:
    """Seconds in which the card's memory delivers a layer's weights, by its data sheet; None where
    the trace does not say how big the dense ones are."""
    meta = workload.meta
    if meta.layer_bytes is None:
        return None
    n_bytes = meta.layer_bytes + meta.top_k * meta.expert_bytes[FITTED]
    return n_bytes / load_machine(card.machine).compute.memory_bytes_per_s


def unexplained(found: Reproduction, workload: Workload) -> list[str]:
    """Sentences, the most telling first."""
    account = found.account
    return [
        *_far_cells(account),
        *_without_a_model(found),
        *_excluded(account),
        *_steeper_than_bytes(found),
        *_links(found),
        *_implied_loads(found),
        *_compute(account, workload),
    ]


def _far_cells(account: Account) -> list[str]:
    predicted = [cell for cell in account.cells if cell.role == "predicted"]
    far = sorted((c for c in predicted if abs(c.error) > FAR), key=lambda c: -abs(c.error))
    by_row = ", ".join(
        f"{algorithm} {_mean_error(predicted, algorithm):+.1%}" for algorithm in Algorithm
    )
    if not far:
        first = f"All {len(predicted)} predicted cells are within {FAR:.0%}."
    else:
        names = ", ".join(f"{c.gpu} {c.algorithm} {c.error:+.1%}" for c in far)
        first = (
            f"{len(far)} of {len(predicted)} predicted cells are off by over {FAR:.0%}: {names}."
        )
    return [f"{first} Mean error of each row: {by_row}."]


def _without_a_model(found: Reproduction) -> list[str]:
    account = found.account
    plain, scaled = (found.median_error_unmodelled(scaled=how) for how in (False, True))
    return [
        f"Median errors of the {PREDICTED} cells: {plain:.1%} if the {FITTED} cells are taken as "
        f"the prediction, {scaled:.1%} if these are divided by the experts' growth, and "
        f"{account.median_error('predicted'):.1%} by this model. The fit itself leaves "
        f"{account.median_error('fitted'):.1%}. Without the fit's error the predicted slow-down "
        f"from {FITTED} to {PREDICTED} is off by {account.median_slowdown_error():.1%}."
    ]


def _mean_error(cells: Sequence[TableCell], algorithm: Algorithm) -> float:
    return float(np.mean([cell.error for cell in cells if cell.algorithm is algorithm]))


def _excluded(account: Account) -> list[str]:
    return [
        f"{c.gpu} {c.precision} {c.algorithm} is left out of every error: the paper prints "
        f"{c.published:g}, although the same card's {FITTED} cell is "
        f"{published(FITTED, c.algorithm, _card(c.gpu)):g}; the prediction is {c.simulated:.3f}."
        for c in account.cells
        if c.role == "excluded"
    ]


def _card(name: str) -> Card:
    return next(card for card in CARDS if card.name == name)


def _steeper_than_bytes(found: Reproduction) -> list[str]:
    """Rows that slowed from the fitted to the predicted precision by more than their bytes."""
    growth = found.expert_bytes[PREDICTED] / found.expert_bytes[FITTED]
    steeper = []
    for cell in found.account.cells:
        if cell.role == "predicted":
            card = _card(cell.gpu)
            slower = published(FITTED, cell.algorithm, card) / cell.published
            if slower > growth:
                steeper.append(f"{cell.gpu} {cell.algorithm} {slower - 1:.1%}")
    if not steeper:
        return []
    return [
        f"From {FITTED} to {PREDICTED} an expert grows by {growth - 1:.1%}, and no time that "
        "depends on bytes grows by more. These rows of the paper slowed by more: "
        + ", ".join(steeper)
        + ". The fitted column does not show what dequantising costs at another width, so the "
        "model takes that cost as equal."
    ]


def _links(found: Reproduction) -> list[str]:
    """Links that would have to be faster than they can, and the reading that fits best."""
    sentences = []
    beyond = []
    for card in CARDS:
        rate = found.account.fits[card.name].asked_link_bytes_per_s
        if rate > card.link_bytes_per_s:
            beyond.append(f"{card.name} {rate / 1e9:.1f} of {card.link_bytes_per_s / 1e9:.1f} GB/s")
    if beyond:
        sentences.append(
            "Without a limit on the rate, the fit needs links faster than their kind: "
            + ", ".join(beyond)
            + ". So the measured engine moved fewer bytes than this reading says, or moved some of "
            "these bytes during compute."
        )
    best = min(found.others, key=lambda account: account.misfit)
    if best.reading != found.account.reading:
        sentences.append(
            f"The reading '{best.reading.name}' ({best.reading.summary}) comes nearest to the "
            f"fitted cells: misfit {best.misfit:.1%} against {found.account.misfit:.1%}. "
            "Without a limit on the link's rate, that reading needs at most "
            f"{best.asked_link_share:.0%} of what a link carries. The median error of the "
            f"reading's predictions is {best.median_error('predicted'):.1%}."
        )
    return sentences


def _implied_loads(found: Reproduction) -> list[str]:
    each = ", ".join(
        f"{card.name} {found.implied_loads[card.name][0]:.1f} (trace, {card.slots} slots: "
        f"{found.implied_loads[card.name][1]:.1f})"
        for card in CARDS
    )
    return [
        "If victims are written back and nothing overlaps, the two rows without a cache fix both "
        f"constants, and the row '{Algorithm.lru}' gives the loads a token: {each}."
    ]


def _compute(account: Account, workload: Workload) -> list[str]:
    times = [account.fits[card.name].constants.layer_s for card in CARDS]
    read = [reading_s(workload, card) for card in CARDS]
    over = [t / of for t, of in zip(times, read, strict=True) if of is not None]
    dense = "(the trace does not say how big a layer's dense weights are)"
    if over:
        dense = (
            f"{min(over):.0f} to {max(over):.0f} times as long as the card's memory takes to "
            "deliver its weights"
        )
    return [
        f"A layer's compute is fitted at {min(times) * 1e3:.1f} to {max(times) * 1e3:.1f} ms, "
        f"{dense}. The table does not show how much of that time is experts, attention, "
        "launches or waiting for the host."
    ]
