"""What a command prints as a table it writes as CSV, JSON and Parquet, too: one way for all."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import moerun.cli
import moesim.cli
import moetrace.cli
import polars as pl
import pytest
import typer

MODULES = {"moesim": moesim.cli, "moerun": moerun.cli, "moetrace": moetrace.cli}
# Commands with a --format whose --out is something else, or that have none, and why.
OTHERWISE = {
    ("moerun", "generate"): "the text streams to stdout",
    ("moerun", "perplexity"): "--out is the journal of finished windows",
    ("moesim", "sweep"): "--out is the whole result, and a table of the best is printed",
    ("moetrace", "import"): "--format is the recording's",
}


def params(program: str) -> dict[str, set[str]]:
    group: Any = typer.main.get_command(MODULES[program].app)
    return {
        name: {each for param in command.params for each in param.opts}
        for name, command in group.commands.items()
    }


@pytest.mark.parametrize("program", MODULES)
def test_whatever_has_formats_writes_files(program: str) -> None:
    for name, options in params(program).items():
        if "--format" in options and (program, name) not in OTHERWISE:
            assert {"--out", "--force"} <= options, name


@pytest.mark.parametrize(
    ("program", "line", "column"),
    [
        ("moetrace", ("stats", "tiny", "--slots", "4"), "value"),
        ("moerun", ("policies", "lru"), "runs_live"),
        ("moerun", ("families",), "family"),
        ("moerun", ("families", "--formats"), "format"),
        ("moesim", ("machines", "t4"), "machine"),
        ("moesim", ("policies", "lru"), "rule"),
    ],
)
def test_the_formats_have_the_same_rows(
    program: str,
    line: tuple[str, ...],
    column: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix in ("csv", "json", "parquet"):
        monkeypatch.setattr(sys, "argv", [program, *line, "--out", f"r.{suffix}"])
        with pytest.raises(SystemExit) as end:
            MODULES[program].main()
        assert not end.value.code, capsys.readouterr().err
    assert capsys.readouterr().out == ""
    rows = list(csv.DictReader(Path("r.csv").read_text(encoding="utf-8").splitlines()))
    found = json.loads(Path("r.json").read_text())
    found = found["statistics"] if isinstance(found, dict) else found
    frame = pl.read_parquet("r.parquet")
    assert len(rows) == len(found) == frame.height > 0
    assert frame.columns == list(rows[0])
    assert column in frame.columns
    assert column in found[0]
