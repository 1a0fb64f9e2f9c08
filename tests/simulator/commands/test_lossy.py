"""Policies that change what the model computes are marked, with what they changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from moepolicy.lossy import CHANGE_LEGEND, CHANGES, MARKED, OPEN_LOOP, change_cells, changed, marked
from moesim.cli import main
from moesim.sweep.summary import best, table

Shown = Callable[..., str]

ROUTING = """
from moepolicy import Policy

class Nearby(Policy):
    lossy = True

    def route(self, step, row, resident, chosen):
        for other in range(len(resident)):
            if resident[other] and other not in chosen:
                chosen[-1] = other
                return

    def victim(self, layer, incoming, candidates):
        return int(candidates[0])
"""


@pytest.fixture
def shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shown:
    (tmp_path / "mine.py").write_text(ROUTING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["moesim", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert not end.value.code, err
        return out

    return call


def test_a_share_is_told_in_words_and_in_a_cell() -> None:
    shares = dict.fromkeys(CHANGES, 0.0)
    assert changed(shares) == "of the gates' weight nothing"
    shares |= {"skipped_share": 0.015, "rerouted_share": 0.25, "hit_ratio": 0.5}
    assert changed(shares) == "of the gates' weight 1.5 % left out, 25.0 % routed to another expert"
    assert change_cells(shares) == "1.5 | 0.0 | 0.0 | 25.0"
    assert CHANGE_LEGEND.endswith(" | computed at the lower precision | routed to another expert")
    assert (marked("lru", False), marked("hobbit", True)) == ("lru", "hobbit*")


SHORT = ("--trace", "mixtral-like", "--tokens", "20", "--slots", "4", "--machine", "cpu-disk")


def test_a_comparison_marks_them_and_says_open_loop(shown: Shown) -> None:
    policies = ("lru", "adapmoe-skip", "mine.py:Nearby")
    printed = shown("compare", *policies, *SHORT)
    rows = {
        row["policy"]: row
        for row in json.loads(shown("compare", *policies, *SHORT, "--format=json"))
    }
    first = [line.split()[0] for line in printed.splitlines() if line.strip()]
    assert {"lru", "adapmoe-skip*", "mine.py:Nearby*"} < set(first)
    assert MARKED in printed
    share = rows["mine.py:Nearby"]["rerouted_share"]
    assert share > 0.1
    told = f"mine.py:Nearby, 4 slots: of the gates' weight {100 * share:.1f} % routed to another"
    assert told in printed
    assert printed.count(OPEN_LOOP) == 1
    assert f"mine.py:Nearby: {OPEN_LOOP}" in printed
    assert rows["adapmoe-skip"]["skipped_share"] > 0
    assert OPEN_LOOP not in shown("compare", "lru", "adapmoe-skip", *SHORT)


def test_a_sweep_says_what_its_best_changed() -> None:
    setting = dict.fromkeys(["trace_path", "scope", "precision", "expert_bytes", "memory_bytes"])
    figures = dict.fromkeys(["layer_bytes", "token_bytes", "limit_loads", "share_of_limit"])
    figures |= {"time_is_lower_bound": False, "limit_tokens_per_s": None, "hit_ratio": 0.5}
    unchanged = dict.fromkeys(CHANGES, 0.0)

    def row(policy: str, slots: int, tokens_per_s: float, **more: object) -> dict[str, object]:
        about = {"status": "ok", "needs_future": False, "machine": "t4", "loads": 10}
        named = {"policy": policy, "slots": slots, "tokens_per_s": tokens_per_s, "lossy": True}
        return setting | figures | unchanged | about | named | more

    rows = [
        row("mine.py:Nearby", 2, 2.0, rerouted_share=0.25),
        row("mine.py:Nearby", 4, 3.0, rerouted_share=0.125),
        row("hobbit", 4, 1.0, low_share=0.5),
        row("lru", 6, 1.0, lossy=False),
    ]
    found = best(rows)
    assert [(one["policy"], one["second"], one["rerouted_share"]) for one in found] == [
        ("mine.py:Nearby", None, 0.25),
        ("mine.py:Nearby", "hobbit", 0.125),
        ("lru", None, 0.0),
    ]
    printed = table(found)
    assert printed.count("mine.py:Nearby* ") == 2
    assert " hobbit* " in printed
    assert "lru*" not in printed
    assert MARKED in printed
    told = "mine.py:Nearby: of the gates' weight 25.0 % routed to another expert at most"
    assert told in " ".join(printed.split())
    assert OPEN_LOOP in " ".join(printed.split())
    assert MARKED not in table(best(rows[3:]))
