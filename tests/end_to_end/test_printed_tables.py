"""Every command's table at every width: each name and number of its JSON output stands there whole.

The commands run in this process; COLUMNS stands for the terminal.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import moerun.cli
import moesim.cli
import moetrace.cli
import pytest
from moepolicy.tables import Format
from moerun.bench import report as bench
from moerun.commands.fidelity import _table as fidelity_report
from moerun.live.report import Report
from moerun.live.report import render as render_run
from moerun.perplexity.report import render as render_perplexity
from moerun.perplexity.results import Cell, Published
from moerun.profiling.fidelity import Comparison

WIDTHS = (40, 60, 80, 120)
SPEC = "lru-spec:n=2,staging=8"
ONE, TWO, COUNT = "{:.1f}".format, "{:.2f}".format, "{:,}".format
SHORT = ("--tokens", "60", "--slots", "2,4")
Shown = Callable[[Any], str]

Printed = Callable[..., str]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Printed:
    """What a command prints on stdout; it must succeed."""
    mains = {"moesim": moesim.cli.main, "moerun": moerun.cli.main, "moetrace": moetrace.cli.main}

    def call(*command: str, width: int = 100) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "argv", list(command))
        with pytest.raises(SystemExit) as end:
            mains[command[0]]()
        shown = capsys.readouterr()
        assert not end.value.code, shown.err
        return shown.out

    return call


def percent(share: float) -> str:
    return ONE(100 * share)


# Of a JSON row the fields that a table shows, and how.
COMPARED: dict[str, Shown] = {
    "policy": str,
    "slots": str,
    "hit_ratio": percent,
    "loads": COUNT,
    "limit_loads": COUNT,
    "useless_prefetches": COUNT,
    "tokens_per_s": TWO,
    "limit_tokens_per_s": TWO,
    "share_of_limit": percent,
}
CURVE: dict[str, Shown] = {
    "policy": str,
    "slots": str,
    **dict.fromkeys(("hit_ratio", "shuffled_hit_ratio", "limit_hit_ratio"), percent),
}
CELL: dict[str, Shown] = {
    "gpu": str,
    "algorithm": str,
    **dict.fromkeys(("published_tokens_per_s", "simulated_tokens_per_s"), "{:.3f}".format),
}
STATISTIC: dict[str, Shown] = {
    "statistic": str,
    "parameter": str,
    "value": "{:.3f}".format,
}
COMMANDS: dict[str, tuple[tuple[str, ...], str, dict[str, Shown]]] = {
    "compare": (("moesim", "compare", "lfu", SPEC, "belady", *SHORT), "", COMPARED),
    "curve": (("moesim", "curve", "lru", "lfu", "belady"), "", CURVE),
    "table2": (("moesim", "table2", "lru", "--tokens", "2"), "cells", CELL),
    "stats": (("moetrace", "stats"), "statistics", STATISTIC),
    "policies": (("moesim", "policies"), "", {"policy": str, "family": str}),
    "live policies": (("moerun", "policies"), "", {"policy": str, "family": str}),
    "plan": (("moerun", "--plan", "--slots", "3", "--prompt", "Once"), "", {}),
}


def words(text: str) -> Counter[str]:
    return Counter(word for word in text.split() if word.strip("-"))


def assert_whole(narrow: str, wide: str, width: int) -> None:
    """``narrow`` has every word of ``wide`` uncut, within its width where a word allows that."""
    missing = words(wide) - words(narrow)
    assert not missing
    for line in narrow.splitlines():
        if len(line) > width:
            assert len(line.split()) <= 2, line  # names longer than the width stand alone
    assert "…" not in narrow


SLOW = ("curve", "table2")  # their tables are made as those of the others are


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in COMMANDS],
)
def test_tables_keep_every_name_and_number(printed: Printed, name: str) -> None:
    command, where, shown = COMMANDS[name]
    found = json.loads(printed(*command, "--format", "json"))
    rows = found[where] if where else found
    wide = printed(*command, width=1000)
    if shown:
        there = words(wide)
        for row in rows:
            for field, show in shown.items():
                if row[field] is not None:
                    assert words(show(row[field])) <= there, (field, row)
    for width in WIDTHS:
        assert_whole(printed(*command, width=width), wide, width)


def test_a_list_keeps_every_name(printed: Printed) -> None:
    wide = printed("moesim", "machines", width=1000)
    for width in WIDTHS:
        narrow = printed("moesim", "machines", width=width)
        assert_whole(narrow, wide, width)
        # Names stand at the begin of a line, as they do in the wide one.
        names = {line.split()[0] for line in wide.splitlines() if line.strip()} - {"moesim"}
        assert names - {"-" * len(rule) for rule in map(str.strip, wide.splitlines())} <= {
            line.split()[0] for line in narrow.splitlines() if line.strip()
        }


@pytest.mark.slow
def test_the_best_of_a_sweep_is_whole(printed: Printed, tmp_path: Path) -> None:
    axes = ("lru", SPEC, *("--slots", "2,4"), "--machine", "t4,rtx3080-mobile", "--workers", "1")

    def sweep(*more: str, width: int = 1000) -> str:
        out = str(tmp_path / "sweep.parquet")
        return printed("moesim", "sweep", *axes, "--out", out, "--resume", *more, width=width)

    wide, rows = sweep(), json.loads(sweep("--format", "json"))
    for row in rows:
        cells = (row["machine"], row["policy"], row["second"], TWO(row["tokens_per_s"]))
        assert words(" ".join(cells)) <= words(wide)
    for width in WIDTHS:
        assert_whole(sweep(width=width), wide, width)


def one_of(kind: Any, **given: Any) -> Any:
    """A dataclass of numbers that are all different, so that none can stand for another."""
    numbers = {field.name: 0.0101 + 0.0307 * i for i, field in enumerate(fields(kind))}
    return kind(**numbers | given)


REFUSED = {"mine.py:Refused": "policy 'mine.py:Refused' reads predictions, and there are none"}
MADE_BY = {
    **{"shape": "mixtral-8x7b", "layers": 4, "attention": "native", "precision": "2bit"},
    **{"expert_bytes": 52_000_000, "experts_in": "memory", "slots": 4, "scope": "layer"},
    **{"device": "cpu", "routing": "mixtral-like", "routing_sha256": "0123456789abcdef"},
    **{"tokens": 16, "warm_up": 4, "rounds": 1, "link_bytes_per_s": 12e9},
    **{"compute_alone_s_per_token": 0.123, "hardware": {"cpu": "A CPU", "threads": 2}},
    "refused": REFUSED,
}
IDENTITY = {
    **{"model": "some/model", "tokens": 4096, "text_bytes": 12345, "context": 512, "stride": 256},
    **{"by_token": True, "low": "2bit", "device": "cpu"},
}


def bench_table() -> str:
    rows = [
        one_of(bench.Row, policy=name, lossy=lossy, rounds=(1.0, 2.0), useless_prefetches=3)
        for name, lossy in ((SPEC, False), ("hobbit", True), (bench.RELEASED_LABEL, False))
    ]
    return bench.table_of(rows, MADE_BY)


def fidelity_table() -> str:
    rows = [one_of(Comparison, policy=p, slots=4, live_runs=(1.0, 2.0)) for p in ("lru", SPEC)]
    return fidelity_report(rows, REFUSED)


def perplexity_table() -> str:
    given = {"attention": "native", "experts": "2bit", "lossy": True, "store_bytes": 12_345_678_901}
    counts = {"scored_tokens": 4000, "low_expert_bytes": 123_456_789}
    cells = [
        one_of(Cell, policy=policy, published=published, **given, **counts)
        for policy, published in (("hobbit", Published(17.54, 4.61, 7.42)), (SPEC, None))
    ]
    return render_perplexity(cells, IDENTITY, Format.table, REFUSED)


def run_report() -> str:
    counts = {field.name: 1001 + 17 * i for i, field in enumerate(fields(Report))}
    row = Report(**counts | {"policy": SPEC, "scope": "layer", "device": "cpu"})  # type: ignore[arg-type]
    return render_run(row, Format.table, "", {})


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("made", [bench_table, fidelity_table, perplexity_table, run_report])
def test_tables_of_live_runs_are_whole(
    monkeypatch: pytest.MonkeyPatch, made: Callable[[], str], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    wide = made()
    assert SPEC in wide.split() or f"{SPEC}:" in wide.split() or SPEC in wide
    monkeypatch.setenv("COLUMNS", str(width))
    assert_whole(made(), wide, width)


def in_process(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", "from moesim.cli import main; main()", *arguments]
    plain = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(
        command, env=plain | environment, capture_output=True, timeout=120, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"TERM": "dumb"},
        {"NO_COLOR": "1"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=" ".join,
)
def test_a_pipe_gets_the_same_plain_table_whatever_the_terminal(
    environment: dict[str, str],
) -> None:
    command = ("compare", "lru", "lfu", "--tokens", "60", "--slots", "4")
    done = in_process(environment, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout == in_process({"COLUMNS": "100"}, *command).stdout
    assert done.stdout.isascii()
    assert b"\x1b" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 80])
def test_a_terminal_s_own_width_counts(columns: int) -> None:
    import fcntl
    import struct
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = "import moesim.cli; moesim.cli.main()"
    arguments = ["compare", "lru", "--tokens", "60", "--slots", "4"]
    plain = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen(
        [sys.executable, "-c", command, *arguments],
        stdout=child,
        stderr=subprocess.PIPE,
        env=plain,
    ) as running:
        os.close(child)
        text = b""
        while True:
            try:
                part = os.read(parent, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            text += part
        assert running.wait(60) == 0
    os.close(parent)
    lines = text.decode().splitlines()
    assert max(map(len, lines)) <= columns
    assert sum(line.startswith("policy") for line in lines) == {40: 3, 80: 1}[columns]


@pytest.mark.parametrize("width", [60, 100])
def test_sentences_keep_to_the_width_piped_as_on_a_terminal(
    printed: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.chdir(tmp_path)
    said = printed("moesim", "fit", "edgemoe", "--out", "edgemoe.safetensors", width=width)
    assert max(map(len, said.splitlines())) <= width
    assert " ".join(said.split()).startswith("edgemoe.safetensors: edgemoe fitted on ")
    said = printed("moetrace", "export", "tiny", "--to", "jsonl", "--out", "t.jsonl", width=width)
    assert said == "t.jsonl: jsonl of tiny\n"
