"""`moerun families`: every family and format of the tables, as a table and for programs."""

from __future__ import annotations

import json

import pytest
from moeroute.families import FAMILIES
from moeroute.models import published
from moerun.checkpoint.gguf.config import FAMILIES as BY_GGUF
from moerun.checkpoint.published.table import FORMATS
from moerun.checkpoint.supported import SUPPORTED
from support.commands import Call


def test_families_are_listed_with_their_shapes_and_files(moerun: Call) -> None:
    told = json.loads(moerun("families", "--format", "json").stdout)
    assert [row["family"] for row in told] == [each.model_type for each in FAMILIES]
    shapes = {name for row in told for name in row["shapes"]}
    fit = {name for name, entry in published().items() if entry["model_type"] in SUPPORTED}
    assert shapes == fit
    mixtral = next(row for row in told if row["family"] == "mixtral")
    assert mixtral["shapes"]["mixtral-8x7b"] == 46.7
    assert mixtral["gguf"] == "llama"
    known = {name for each in BY_GGUF.values() for name in each.model_types}
    assert {row["family"] for row in told if row["gguf"]} == known | {"qwen3_5_moe"}
    table = moerun("families").stdout
    assert all(each.model_type in table for each in FAMILIES)


def test_formats_are_listed_with_what_becomes_of_them(
    moerun: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = json.loads(moerun("families", "--formats", "--format", "json").stdout)
    assert {row["format"] for row in told} == {"GGUF", *(each.name for each in FORMATS)}
    for row in told:
        assert bool(row["native"]) is row["read"]
        assert bool(row["instead"]) is not row["read"]
    blocks = moerun("families", "--formats").stdout.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [row["format"] for row in told]
    shown = " ".join(blocks[0].split())
    assert "GGUF read yes at native its own bits (Q4_K, Q5_K, Q6_K, Q4_0," in shown
    monkeypatch.setenv("COLUMNS", "80")
    narrow = moerun("families", "--formats").stdout.splitlines()
    assert max(map(len, narrow)) <= 80
    lines = moerun("families", "--formats", "--format", "csv").stdout.splitlines()
    assert len(lines) == 1 + len(told)
