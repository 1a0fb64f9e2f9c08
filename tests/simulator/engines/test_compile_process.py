"""Who compiles what, where several processes may."""

from __future__ import annotations

import os

import pytest
from moesim.engines.compile_process import shared_out


def cores(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: n)


def test_on_one_core_one_process_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 1)
    assert shared_out(["lru", "replay", "limits"], ["machine"]) == [["replay", "limits", "lru"]]


def test_what_serves_every_policy_is_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 2)
    own, other = shared_out(["replay", "limits", "lru", "lfu"], ["machine"])
    assert other[:2] == ["replay", "limits"]
    assert sorted([*own, *other]) == ["lfu", "limits", "lru", "replay"]


def test_a_few_hooks_are_not_worth_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 8)
    assert shared_out(["lru", "lfu", "belady"]) == [["lru", "lfu", "belady"]]


def test_many_hooks_are_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 4)
    names = [f"policy-{i}" for i in range(40)]
    shares = shared_out(names)
    assert len(shares) == 4
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert max(map(len, shares[1:])) - min(map(len, shares[1:])) <= 1
    assert len(shares[0]) > len(shares[1]), "the others begin later"
