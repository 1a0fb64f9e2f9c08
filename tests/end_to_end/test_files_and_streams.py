"""What commands do with the files they write and with the streams they print to."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import pytest
from moeroute import open_trace
from moerun.store.index import read_index

SHORT = ("--tokens", "40", "--slots", "4")
TRACE = "a finished trace of "


def run(
    *command: str | Path,
    code: int = 0,
    environment: dict[str, str] | None = None,
    file_bytes: int | None = None,
    stdout: int | None = None,
    stdin: bytes = b"",
) -> tuple[str, str]:
    """stdout and stderr of a command; in a process of its own where its streams are not plain."""
    if environment is None and file_bytes is None and stdout is None and not stdin:
        return run_here(*command, code=code)

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    program, *arguments = command
    done = subprocess.run(
        [sys.executable, "-c", f"from {program}.cli import main; main()", *map(str, arguments)],
        env=os.environ | {"COLUMNS": "100"} | (environment or {}),
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE,
        input=stdin,
        timeout=120,
        check=False,
        preexec_fn=limit,
    )
    told = done.stderr.decode()
    assert done.returncode == code, told
    assert "Traceback" not in told
    return (done.stdout or b"").decode(), told


def run_here(*command: str | Path, code: int) -> tuple[str, str]:
    """The same in this process, which has imported torch already."""
    program, *arguments = map(str, command)
    main = importlib.import_module(f"{program}.cli").main
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [program, *arguments]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main()
    assert (end.value.code or 0) == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def refused(told: str, path: Path, what: str) -> None:
    """One line that names the file, says what lies there and how to replace it."""
    (line,) = told.splitlines()
    assert str(path) in line
    assert what in line
    assert line.endswith("--force replaces it")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was a bright cold day in April. " * 10)
    return path


def test_a_recording_does_not_replace_a_trace_unless_told_to(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "t.parquet"
    record = ("moetrace", "record", text, "--out", out, "--horizon", "0")
    run(*record, "--tokens", "7")
    before = open_trace(out).digest
    _, told = run(*record, code=1)
    refused(told, out, f"{TRACE}7 tokens of tiny")
    assert open_trace(out).digest == before
    run(*record, "--tokens", "9", "--force")
    assert open_trace(out).n_rows == 9 * 8
    _, told = run(*record, "--resume", code=1)
    assert "is whole; there is nothing to resume" in told


def test_nor_does_an_import(tmp_path: Path) -> None:
    ids = np.arange(12).reshape(6, 1, 2).astype(np.uint8) % 4
    foreign, out = tmp_path / "r.npz", tmp_path / "t.parquet"
    np.savez(
        foreign,
        ids=ids,
        weights=np.full(ids.shape, 0.5, np.float16),
        seq=np.zeros(6, np.int32),
        pos=np.arange(6, dtype=np.int32),
        phase=np.ones(6, np.uint8),
        n_experts=4,
    )
    run("moetrace", "import", foreign, "--out", out)
    refused(run("moetrace", "import", foreign, "--out", out, code=1)[1], out, f"{TRACE}6 tokens")
    run("moetrace", "import", foreign, "--out", out, "--force")


@pytest.mark.parametrize(
    "command",
    [
        ("moesim", "compare", "lru", *SHORT, "--out"),
        ("moesim", "curve", "lru", "--out"),
        ("moesim", "table2", "lru", "--out"),
        ("moesim", "compare", "lru", *SHORT, "--timeline"),
        ("moesim", "sweep", "lru", "--out"),
        ("moerun", "--prompt", "Once", "--journal"),
        ("moerun", "profile", "--out"),
        ("python -m moeroute.synthetic", "--out"),
    ],
    ids=" ".join,
)
def test_no_command_replaces_a_file_unless_told_to(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    """It is refused before any work: there is nothing else on either stream."""
    out = tmp_path / ("mine.toml" if command[1] == "profile" else "mine.json")
    out.write_text("12345")
    if command[0].startswith("python"):
        done = subprocess.run(
            [sys.executable, "-m", "moeroute.synthetic", "--out", str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        printed, told = done.stdout, done.stderr
        refused(told, out, "5 bytes")
    else:
        printed, told = run(*command, out, code=1)
        refused(told, out, "a file of 5 bytes")
    assert not printed
    assert out.read_text() == "12345"
    assert list(tmp_path.iterdir()) == [out]


def test_told_to_a_comparison_and_its_timeline_are_replaced(tmp_path: Path) -> None:
    out, timeline = tmp_path / "x.json", tmp_path / "t.json"
    for path in (out, timeline):
        path.write_text("12345")
    compare = ("moesim", "compare", "lru", *SHORT)
    run(*compare, "--out", out, "--timeline", timeline, "--force")
    assert json.loads(out.read_text())[0]["policy"] == "lru"
    assert json.loads(timeline.read_text())["traceEvents"]


def test_a_recording_whose_journal_cannot_be_written_leaves_neither(tmp_path: Path) -> None:
    trace, journal = tmp_path / "t.parquet", tmp_path / "j.json"
    generate = (
        *("moerun", "generate", "--prompt", "It was", "--max-new-tokens", "2", "--slots", "2"),
        *("--record", trace, "--journal", journal),
    )
    real = Path.write_text

    def text(self: Path, *given: Any, **options: Any) -> int:
        if self.name == journal.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, *given, **options)

    with mock.patch.object(Path, "write_text", text):
        _, told = run(*generate, code=1)
    assert "j.json: No space left on device" in told
    assert not list(tmp_path.iterdir())
    run(*generate)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j.json", "t.parquet"]


def test_a_live_recording_names_the_trace_that_it_would_replace(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "t.parquet"
    run("moetrace", "record", text, "--out", out, "--horizon", "0", "--tokens", "5")
    _, told = run("moerun", "--prompt", "Once", "--record", out, code=1)
    refused(told, out, f"{TRACE}5 tokens of tiny")
    run("moerun", "--prompt", "Once", "--max-new-tokens", "3", "--record", out, "--force")
    assert open_trace(out).meta.source == "live"


def test_a_finished_store_is_kept_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "store"
    pack = ("moerun", "pack", "tiny", "--out", out)
    run(*pack, "--precision", "4bit")
    _, told = run(*pack, "--precision", "2bit", code=1)
    refused(told, out, "a finished store of tiny with 4bit experts and native attention")
    run(*pack, "--precision", "2bit", "--force")
    assert read_index(out).precision == "2bit"
    assert list(tmp_path.iterdir()) == [out]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("important")
    _, told = run("moerun", "pack", "tiny", "--out", tmp_path / "thesis", "--force", code=1)
    assert "is no expert store" in told
    assert (tmp_path / "thesis" / "text").read_text() == "important"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "csv", "json"])
def test_a_sweep_is_in_the_format_of_its_suffix_and_resumes_from_it(
    tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"s.{suffix}"
    sweep = ("moesim", "sweep", "--machine", "t4", "--slots", "2,4", "--workers", "1")
    run(*sweep, "lru", "--out", out)
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        "parquet": pl.read_parquet,
        "csv": pl.read_csv,
        "json": pl.read_json,
    }
    read = readers[suffix]
    assert read(out)["slots"].to_list() == [2, 4]
    before = out.read_bytes()
    _, told = run(*sweep, "lru", "--out", out, code=1)
    refused(told, out, "a finished sweep of 2 points (lru)" if suffix == "parquet" else "a file of")
    _, told = run(*sweep, "lru", "--out", out, "--resume")
    assert "0 run in" in told
    assert "2 finished before" in told
    if suffix == "csv":  # what was read back is what was written
        assert out.read_bytes() == before
    assert read(out)["slots"].to_list() == [2, 4]


@pytest.mark.parametrize(
    ("command", "known"),
    [
        (("moesim", "compare", "lru", "--out", "x.xlsx"), ".txt, .json, .csv, .parquet"),
        (("moesim", "compare", "lru", "--timeline", "x.html"), ".json, .json.gz"),
        (("moesim", "curve", "lru", "--out", "x"), ".txt, .json, .csv, .parquet"),
        (("moesim", "sweep", "lru", "--out", "x.xlsx"), ".parquet, .csv, .json"),
        (("moetrace", "record", "text.txt", "--out", "x.csv"), ".parquet"),
        (("moetrace", "import", "r.npz", "--out", "x.npz"), ".parquet"),
        (("moerun", "--prompt", "x", "--record", "x.json"), ".parquet"),
        (("moerun", "--prompt", "x", "--journal", "x.parquet"), ".json"),
        (("moerun", "profile", "--out", "x.json"), ".toml"),
        (("moerun", "perplexity", "--out", "x.csv"), ".jsonl"),
    ],
)
def test_an_unknown_suffix_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], known: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _, told = run(*command, code=2)
    assert told.endswith(f"the suffix says the format, and there are: {known}\n")
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


ASCII = {"PYTHONIOENCODING": "ascii"}
C = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PLACES = [ASCII, {"PYTHONIOENCODING": "latin-1"}]


@pytest.mark.parametrize("environment", PLACES, ids=["ascii", "latin-1"])
def test_names_that_stdout_cannot_encode_are_printed_all_the_same(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    trace = tmp_path / "трасса.parquet"
    trace.symlink_to(open_trace("tiny").path)
    compare = ("moesim", "compare", "lru", *SHORT, "--trace", trace)
    assert "lru" in run(*compare, environment=environment)[0]
    assert "\\u0442\\u0440" in run("moetrace", "stats", trace, environment=environment)[0]


def test_generated_text_is_printed_on_a_stdout_of_another_encoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model continues in letters that ASCII lacks, or is made to."""
    from moepolicy import console

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    console.print_anything()
    console.emit("déjà vu")
    assert stream.buffer.getvalue() == b"d\\xe9j\\xe0 vu"


@pytest.mark.slow
def test_a_prompt_is_read_as_utf_8_whatever_stdin_says() -> None:
    prompt, asked = "Ein Märchen: ", ("moerun", "--max-new-tokens", "3", "--format", "json")
    plain = json.loads(run(*asked, "--prompt", prompt)[0])
    there = json.loads(run(*asked, environment=ASCII, stdin=prompt.encode())[0])
    assert (there["text"], there["prompt_tokens"]) == (plain["text"], plain["prompt_tokens"])
    _, told = run("moerun", "generate", code=1, stdin=b"\xff\xfe")
    assert "stdin is no utf-8 text" in told.lower()


@pytest.mark.slow
def test_a_locale_without_letters_is_one_line(tmp_path: Path) -> None:
    """With UTF-8 switched off by hand, tables are still printed; torch cannot be imported."""
    assert "lru" in run("moesim", "compare", "lru", *SHORT, environment=C)[0]
    trace = tmp_path / "трасса.parquet"
    _, told = run("moesim", "compare", "lru", "--trace", trace, code=2, environment=C)
    assert told.endswith("is no ascii text: set PYTHONUTF8=1\n")
    _, told = run("moerun", "--prompt", "Once", code=1, environment=C)
    assert told.startswith("error: this locale reads nothing but ASCII")
    assert told.endswith("set PYTHONUTF8=1\n")


def test_a_full_disk_names_the_timeline(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    compare = ("moesim", "compare", "lru", "--slots", "4", "--tokens", "400", "--timeline", out)
    _, told = run(*compare, code=1, file_bytes=20_000)
    assert told.startswith(f"error: {out}: ")
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


SLOW = [pytest.param(suffix, marks=pytest.mark.slow) for suffix in ("json", "csv", "parquet")]


@pytest.mark.parametrize("suffix", ["txt", *SLOW])
def test_a_full_disk_names_the_results(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"x.{suffix}"
    compare = ("moesim", "compare", "lru", *SHORT, "--out", out)
    _, told = run(*compare, code=1, file_bytes=100)
    assert told.startswith(f"error: {out}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("compare", "lru", *SHORT), ("policies",)])
def test_a_full_disk_behind_stdout_is_told(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        _, told = run("moesim", *arguments, code=1, stdout=full.fileno())
    assert told == "error: stdout: No space left on device\n"
