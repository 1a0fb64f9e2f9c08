"""Which name a misspelt one meant, and where none is suggested."""

from __future__ import annotations

import pytest
from moepolicy.near import meant, near

OPTIONS = ("--force", "--help", "--max-new-tokens", "--memory", "--out", "--policy", "--slots")
POLICIES = ("arc", "belady", "fifo", "foresight", "foresight-spec", "lfu", "lru", "moe-infinity")


@pytest.mark.parametrize(
    ("name", "choices", "meant"),
    [
        ("--slot", OPTIONS, "--slots"),
        ("--polcy", OPTIONS, "--policy"),
        ("--max-tokens", OPTIONS, "--max-new-tokens"),
        ("--mem", OPTIONS, "--memory"),  # the beginning of a name
        ("--output", OPTIONS, "--out"),  # a name is its beginning
        ("--OUT", OPTIONS, "--out"),
        ("lur", POLICIES, "lru"),  # two letters swapped
        ("lfo", POLICIES, "lfu"),
        ("LRU", POLICIES, "lru"),
        ("beladi", POLICIES, "belady"),
        ("infinity", POLICIES, "moe-infinity"),
        ("foresigth", POLICIES, "foresight"),
        ("t5", ("l4", "t4"), "t4"),
        ("5bit", ("2bit", "3bit", "4bit", "fp16"), "4bit"),
        ("3060", ("rtx3060", "rtx4090"), "rtx3060"),
    ],
)
def test_a_near_name_is_suggested(name: str, choices: tuple[str, ...], meant: str) -> None:
    assert near(name, choices) == meant


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("--nope", OPTIONS),  # '--force' before dashes were left out of what is alike
        ("--nope", ("--scope",)),
        ("--nosuch", OPTIONS),
        ("--seed", OPTIONS),
        ("optimal", POLICIES),
        ("mru-k", POLICIES),
        ("a", ("b", "t4")),
        ("--", OPTIONS),
        ("", OPTIONS),
        ("lru", ()),
    ],
)
def test_what_is_not_near_is_not_suggested(name: str, choices: tuple[str, ...]) -> None:
    assert near(name, choices) is None
    assert meant(name, choices) == ""
