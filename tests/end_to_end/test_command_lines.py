"""The three programs' command lines alike: help, versions, completion, one word for one thing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import moerun
import moerun.cli
import moesim
import moesim.cli
import moetrace
import moetrace.cli
import pytest
import typer
from moerun.commands import names
from moesim import machine_names

ROOT = Path(__file__).parents[2]
PROGRAMS: dict[str, Any] = {
    "moesim": typer.main.get_command(moesim.cli.app),
    "moerun": typer.main.get_command(moerun.cli.app),
    "moetrace": typer.main.get_command(moetrace.cli.app),
}
COMMANDS = [(program, name) for program, group in PROGRAMS.items() for name in group.commands]
# What must not be imported for a help text or a completion.
SLOW = {"moesim": ("torch", "ray"), "moerun": ("torch", "transformers", "polars")}
SLOW["moetrace"] = ("torch", "transformers", "polars")
# Program, command, old spelling, new spelling, and whether a value follows.
RENAMED = [
    ("moesim", "compare", "--low-precision", "--low", "2bit"),
    ("moesim", "sweep", "--low-precision", "--low", "2bit"),
    ("moerun", "profile", "--repeats", "--rounds", "7"),
    ("moerun", "fidelity", "--repeats", "--rounds", "7"),
    *(
        ("moerun", command, "--cold", "--direct", None)
        for command in ("generate", "chat", "serve", "profile", "fidelity", "bench")
    ),
    ("moetrace", "record", "--dtype", "--precision", "bf16"),
    ("moetrace", "record", "--max-tokens", "--tokens", "7"),
    ("moetrace", "stats", "--sizes", "--slots", "2,4"),
]
REQUIRED = {"compare": ["lru"], "sweep": ["--out", "r.parquet"], "profile": ["--out", "p.toml"]}
REQUIRED["recommend"] = ["tiny"]
REQUIRED["report"] = ["tiny", "--out", "r.html"]
REQUIRED |= {"check": ["lru"], "new": ["mine.py"]}
REQUIRED["record"] = ["text.txt", "--out", "t.parquet"]


def process(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The program; it fails, too, where it has imported what it should not have."""
    code = (
        f"import sys; sys.argv[0] = {program!r}\nfrom {program}.cli import main\n"
        "try:\n    main()\nfinally:\n"
        f"    assert not {{*{SLOW[program]!r}}} & {{*sys.modules}}, 'imported too much'"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", **variables},
        timeout=120,
        check=False,
    )


def context(program: str, command: str | None = None, **settings: Any) -> Any:
    group = PROGRAMS[program]
    above = group.context_class(group, info_name=program, **settings)
    if command is None:
        return above
    chosen = group.commands[command]
    return chosen.context_class(chosen, info_name=command, parent=above, **settings)


def completed(*words: str) -> list[str]:
    """What a shell offers for the last word."""
    from typer._completion_classes import BashComplete

    program, *before, last = words
    complete = BashComplete(PROGRAMS[program], {}, program, f"_{program.upper()}_COMPLETE")
    return [item.value for item in complete.get_completions(before, last)]


@pytest.mark.parametrize(("program", "command"), COMMANDS)
def test_every_option_has_a_help_and_says_its_default_once(program: str, command: str) -> None:
    here = context(program, command)
    for param in PROGRAMS[program].commands[command].get_params(here):
        name, text = param.get_help_record(here)
        assert text.split("  [")[0].strip(), name
        assert text.lower().count("default:") + text.count("Default on") <= 1, name
        assert text.split("  [")[0].rstrip().endswith((".", "python.org)")), name


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize(("program", "command"), [*COMMANDS, *((each, None) for each in PROGRAMS)])
def test_every_help_fits_the_width(program: str, command: str | None, width: int) -> None:
    here = context(program, command, terminal_width=width, max_content_width=width)
    lines = here.command.get_help(here).splitlines()
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if line.endswith(("-", "..."))][1:]  # nothing is cut


@pytest.mark.parametrize(("program", "command", "old", "new", "value"), RENAMED)
def test_an_old_spelling_means_the_same(
    program: str, command: str, old: str, new: str, value: str | None
) -> None:
    chosen = PROGRAMS[program].commands[command]
    values = [] if value is None else [value]

    def parsed(*arguments: str) -> dict[str, Any]:
        arguments = (*REQUIRED.get(command, []), *arguments)
        params: dict[str, Any] = chosen.make_context(command, list(arguments)).params
        return params

    assert parsed(old, *values) == parsed(new, *values) != parsed()
    shown = chosen.get_help(context(program, command))
    assert new in shown
    assert f"{old} " not in shown


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_alone_shows_its_commands(program: str) -> None:
    done = process(program)
    assert done.returncode == 2
    for command in PROGRAMS[program].commands:
        assert f"\n  {command} " in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("program", PROGRAMS)
def test_versions_are_told_without_importing_what_they_are_of(program: str) -> None:
    done = process(program, "--version")
    assert done.returncode == 0, done.stderr
    told = dict(line.split() for line in done.stdout.splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert told[program] == project["version"]
    assert told["python"] == ".".join(map(str, sys.version_info[:3]))
    assert told["numpy"]
    assert ("torch" in told) == (program != "moesim")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["moerun", "--version", "fid"], ["fidelity"]),
        (["moerun", "--policy", "lru-"], ["lru-spec"]),
        (["moerun", "generate", "--policy", "lru-"], ["lru-spec"]),
        (["moerun", "--poli"], ["--policy"]),
        (["moerun", "generate", "--col"], []),  # an old spelling is not offered
        (["moerun", "generate", "--dir"], ["--direct"]),
        (["moerun", "chat", "--precision", "2"], ["2bit"]),
        (["moerun", "bench", "--shape", "mixtral-8x7"], ["mixtral-8x7b"]),
        (["moerun", "bench", "--routing", ""], ["mixtral-like", "tiny", "uniform"]),
        (["moerun", "bench", "--machine", "t"], ["t4"]),
        (["moerun", "perplexity", "--experts", "4bit,3"], ["4bit,3bit"]),
        (["moerun", "fid"], ["fidelity"]),
        (["moesim", "compare", "bela"], ["belady", "belady-bypass"]),
        (["moesim", "compare", "lru", "--machine", "t"], ["t4"]),
        (["moesim", "compare", "lru", "--trace", ""], ["mixtral-like", "tiny"]),
        (["moesim", "compare", "lru", "--like", "olmoe"], ["olmoe-1b-7b"]),
        (["moesim", "sweep", "--machine", "a100,t"], ["a100,t4"]),
        (["moesim", "curve", "lf"], ["lfu"]),
        (["moetrace", "record", "text.txt", "--precision", "b"], ["bf16"]),
        (["moetrace", "import", "r.npz", "--like", "olmoe"], ["olmoe-1b-7b"]),
        (["moetrace", "stats", "m"], ["mixtral-like"]),
    ],
)
def test_names_are_completed(
    words: list[str], offered: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed(*words) == offered
    assert capsys.readouterr().out == ""


def test_only_policies_that_run_live_are_offered_to_moerun() -> None:
    assert "belady" not in completed("moerun", "--policy", "")
    assert {"lru", "lru-spec", "hobbit"} < {*completed("moerun", "--policy", "")}


def test_the_names_offered_are_those_that_there_are() -> None:
    from moerun.bench.routing import UNIFORM
    from moerun.bench.shapes import shape_names
    from moerun.format.precision import PRECISIONS

    assert tuple(names.precisions()) == PRECISIONS
    assert names.shapes() == shape_names()
    assert names.machines() == machine_names()
    assert UNIFORM in names.routings()


@pytest.mark.parametrize(
    ("program", "words", "offered"),
    [
        ("moesim", "compare lru --machine t", "t4"),
        ("moerun", "--policy lru-", "lru-spec"),
        ("moetrace", "stats m", "mixtral-like"),
    ],
)
def test_a_shell_completes_without_slow_imports(program: str, words: str, offered: str) -> None:
    line = f"{program} {words}"
    done = process(
        program,
        **{
            f"_{program.upper()}_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
        },
    )
    assert done.stdout.split() == [offered], done.stderr
    assert "imported too much" not in done.stderr


@pytest.mark.parametrize(
    ("program", "command"), [("moerun", "bench"), ("moerun", "serve"), ("moetrace", "record")]
)
def test_a_help_needs_no_slow_imports(program: str, command: str) -> None:
    done = process(program, command, "--help")
    assert done.returncode == 0, done.stderr
    assert "--device" in done.stdout
