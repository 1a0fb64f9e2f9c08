"""Every command and snippet of README.md and of docs/, run as it stands in a scratch folder.

A command that a page gains needs a line in tests/support/page_runs.py.
"""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import moerun.cli
import moesim.cli
import moetrace.cli
import pytest
from moesim import machine_names
from support.page_kit import PLACEHOLDERS, lay_out
from support.page_runs import RUNS, SERVED
from support.pages import DOWNLOADS, ROOT, Command, commands, pages, printed_under, snippet
from typer.main import get_command

Mains = dict[str, Callable[[], object]]
PAGES = pages()
PROGRAMS = {"moesim": moesim.cli.app, "moerun": moerun.cli.app, "moetrace": moetrace.cli.app}
ELSEWHERE = {"docs/writing-a-policy.md"}  # in test_guide.py


def shown() -> dict[str, list[Command]]:
    """The commands of each page."""
    return {name: commands(text) for name, text in PAGES.items() if name not in ELSEWHERE}


def page_of(command: str) -> str:
    """The text of the first page that has the command."""
    return next(PAGES[name] for name, found in shown().items() if command in dict(found))


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader's own files, as far as they have been asked for."""
    return tmp_path_factory.mktemp("kit")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache: what one command packs the next one finds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def scratch(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A folder with files of the kit, which becomes the current one."""

    def make(*given: str) -> Path:
        lay_out(kit, tmp_path, given)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


def is_a_mention(command: str) -> bool:
    """Whether a text only names a command and options that it has: there is nothing to run."""
    program, *rest = shlex.split(command)
    if program not in PROGRAMS or len(rest) < 2 or not all(w.startswith("--") for w in rest[1:]):
        return False
    group: Any = get_command(PROGRAMS[program])
    params = group.commands[rest[0]].params
    return set(rest[1:]) <= {name for param in params for name in param.opts}


def test_every_command_of_every_page_is_run() -> None:
    found = {
        name: {one.text for one in page if one.text in RUNS or not is_a_mention(one.text)}
        for name, page in shown().items()
    }
    missing = {name: sorted(page - set(RUNS)) for name, page in found.items() if page - set(RUNS)}
    assert not missing, "tests/support/page_runs.py has no line for these"
    assert not set(RUNS) - set().union(*found.values()), "no page has these"


def test_what_downloads_says_so_and_only_that() -> None:
    """A command that needs a download is marked on its page, and runs here in another form."""
    for name, page in shown().items():
        for command in page:
            marked = command.comment.startswith(DOWNLOADS)
            downloads = command.text in RUNS and RUNS[command.text].downloads
            assert marked == downloads, (name, command)


def test_what_runs_in_place_of_a_command_is_of_its_form() -> None:
    for command, run in RUNS.items():
        if run.instead is not None:
            assert run.instead.split()[:2] == command.split()[:2], command
        stands_in = run.instead or run.by or PLACEHOLDERS.keys() & set(command.split())
        assert stands_in or not run.downloads, command


@pytest.mark.parametrize(
    "test",
    sorted({run.by for run in RUNS.values() if run.by}),
    ids=lambda test: test.split(":")[-1],
)
def test_a_command_that_another_test_runs_has_one(test: str) -> None:
    file, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


def run_code(code: str) -> None:
    """``python -c``, which ends as a command does."""
    exec(compile(code, "-c", "exec"), {})
    raise SystemExit(0)


def cases() -> list[Any]:
    found = []
    for command, run in RUNS.items():
        if run.by or run.options or command.startswith("make "):
            continue
        marks = [pytest.mark.slow] if run.slow else []
        found.append(pytest.param(command, marks=marks, id=command))
    return found


@pytest.mark.parametrize("command", cases())
def test_a_command_of_a_page(
    command: str,
    scratch: Callable[..., Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RUNS[command]
    folder = scratch(*run.given)
    words = shlex.split(run.instead or command)
    program, *arguments = [PLACEHOLDERS.get(word, word) for word in words]
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(run.stdin))
    mains: Mains = {
        "moesim": moesim.cli.main,
        "moerun": moerun.cli.main,
        "moetrace": moetrace.cli.main,
    }
    main = mains.get(program)
    if main is None and arguments[0] == "-c":
        main = partial(run_code, arguments[1])
    elif main is None:  # python -m MODULE
        monkeypatch.setattr(sys, "argv", arguments[1:])
        monkeypatch.delitem(sys.modules, arguments[1], raising=False)
        main = partial(runpy.run_module, arguments[1], run_name="__main__")
    elif program == "moerun":
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with pytest.raises(SystemExit) as end:
        main()
    done = capsys.readouterr()
    assert not end.value.code, done.err
    assert "Traceback" not in done.err
    assert done.out.strip()
    if run.leaves is not None:
        assert (folder / run.leaves).stat().st_size > 0
    if run.prints is not None:
        assert run.prints in " ".join(done.out.split())
    if run.shows:  # the same on every machine
        printed = [line.split() for line in done.out.splitlines()]
        for row in printed_under(page_of(command), command):
            assert row in printed

    if run.draws is not None and run.leaves is not None:
        assert drawn(folder / run.leaves) == drawn(ROOT / run.draws), "draw the picture anew"


def drawn(picture: Path) -> list[str]:
    """What a chart shows: each mark's values, whatever fonts there are."""
    return re.findall('aria-label="([^"]*)"', picture.read_text(encoding="utf-8"))


def test_pages_show_tables_to_compare_with() -> None:
    tables = {
        command: printed_under(page_of(command), command) for command in RUNS if RUNS[command].shows
    }
    assert tables
    for command, rows in tables.items():
        assert len(rows) > 2, command


def test_a_stranger_reads_the_readme_in_a_few_minutes() -> None:
    assert len(PAGES["README.md"].split()) <= 900


def test_the_readme_counts_right() -> None:
    text = " ".join(PAGES["README.md"].split())
    listed = [line for line in PAGES["docs/policies.md"].splitlines() if line.startswith("| [")]
    papers = sum("arxiv.org" in line for line in listed)
    assert f"{len(listed)} policies, {papers} of them from papers" in text
    assert f"on {len(machine_names())} machines" in text
    assert f"| {len(listed)}, or a class of yours |" in text
    assert f"any of {len(listed)} policies" in PAGES["docs/comparison.md"]


def test_the_results_of_the_readme_stand_where_their_commands_are() -> None:
    measured = json.loads((ROOT / "benchmarks/results/offload_cpu.json").read_text())["rows"]
    known = {f"{row['tokens_per_s']:.2f}" for row in measured}
    known |= set(f"{PAGES['docs/simulating.md']} {PAGES['docs/numbers.md']}".split())
    known |= set(PAGES["docs/research.md"].split())
    table = PAGES["README.md"].partition("## Results")[2].partition("\n## ")[0]
    rows = [line.split("|")[2:5] for line in table.splitlines() if line.startswith("| ")]
    figures = [cell.strip() for row in rows[1:] for cell in row if cell.strip()]
    assert len(figures) > 8
    assert not set(figures) - known


@pytest.mark.slow
def test_the_options_of_long_commands_are_there() -> None:
    """What needs recordings or a network: the help of the program has every option."""
    helps: dict[tuple[str, ...], str] = {}
    for command in (command for command, run in RUNS.items() if run.options):
        words = shlex.split(command)
        asked = tuple(takewhile(lambda word: not word.startswith("-"), words))
        if words[0] == "python":
            asked = (sys.executable, words[1])
        if shutil.which(asked[0]) is None:  # uv is in no extra
            continue
        if asked not in helps:
            helps[asked] = subprocess.run(
                [*asked, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
        for word in words:
            assert not word.startswith("-") or word in helps[asked], (command, word)


@pytest.mark.parametrize("command", [name for name in RUNS if name.startswith("make ")])
def test_what_make_is_asked_for_is_there(command: str) -> None:
    """The targets are this suite and what demo.sh runs: make says what it would do."""
    done = subprocess.run(
        [*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_python_of_the_page_runs(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    code = snippet(PAGES["docs/python.md"], "import moerun, moesim")
    exec(compile(code, "python.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "share_of_limit" in printed
    assert "Once upon a time" in printed


def test_the_picture_of_the_page_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGES["docs/python.md"]
    code = snippet(page[page.index("## In a notebook") :], "import moesim")
    exec(compile(code, "python.md", "exec"), {})
    assert Path("policies.svg").read_text().startswith("<svg")


def test_the_grid_of_the_page_has_entries_that_there_are(tmp_path: Path) -> None:
    from moesim.sweep.grid import load_grid

    grid = tmp_path / "grid.toml"
    grid.write_text(snippet(PAGES["docs/sweeping.md"], "policies = ["))
    assert {"policies", "traces", "slots", "machines", "parameters"} <= set(load_grid(grid))


def test_the_profile_of_a_machine_is_one_that_moesim_reads(tmp_path: Path) -> None:
    from moesim.machine.profile import load_machine

    profile = tmp_path / "mine.toml"
    profile.write_text(snippet(PAGES["docs/machines.md"], 'name = "mine"'))
    machine = load_machine(str(profile))
    assert (machine.name, machine.source) == ("mine", "measured")
    assert machine.link.bytes_per_s == 12e9
    assert machine.disk is not None
    assert machine.cpu is not None


BY_SERVER = [command for command, run in RUNS.items() if run.by == SERVED]


@pytest.mark.slow
@pytest.mark.parametrize("served", [one for one in BY_SERVER if one.startswith("moerun serve ")])
def test_the_server_answers(served: str, scratch: Callable[..., Path]) -> None:
    asked = [one for one in BY_SERVER if one.startswith("curl ")]
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    folder = scratch(*RUNS[served].given)
    _, *arguments = shlex.split(served.replace("8000", port))
    command = [sys.executable, "-c", "from moerun.cli import main; main()", *arguments]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            deadline = time.monotonic() + 120
            while "serving " not in server.stderr.readline():
                assert server.poll() is None
                assert time.monotonic() < deadline
            answers = [
                subprocess.run(
                    shlex.split(one.replace("8000", port)), capture_output=True, check=True
                ).stdout
                for one in asked
            ]
        finally:
            server.terminate()
    assert json.loads(answers[0])["choices"][0]["message"]["role"] == "assistant"
    assert b"# HELP" in answers[1]
