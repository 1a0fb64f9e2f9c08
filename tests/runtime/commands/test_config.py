"""`moerun --config`: a file's entries are options, the command line goes before them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import Call, error_line


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


def test_entries_are_options_by_either_spelling(moerun: Call, config: Path) -> None:
    config.write_text('model = "tiny"\nmemory = "300MiB"\ncontext = 77\nmax_new_tokens = 3\n')
    done = moerun("generate", "--config", config, "--plan")
    assert done.returncode == 0, done.stderr
    assert "77 tokens of context" in done.stdout
    assert "of 300.00 MiB" in done.stdout


def test_the_command_line_goes_before_the_file(moerun: Call, config: Path) -> None:
    config.write_text('memory = "300MiB"\ncontext = 77\n')
    done = moerun("--config", config, "--plan", "--context", "99")
    assert done.returncode == 0, done.stderr
    assert "99 tokens of context" in done.stdout


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ('modle = "tiny"\n', 1, "modle is no option of this command; did you mean 'model'?"),
        ("[memory]\nx = 1\n", 1, "memory is {'x': 1}, not a text, a number"),
        ("slots = [1, 2]\n", 1, "slots is [1, 2], not a text, a number"),
        ('slots = "many"\n', 2, "slots"),
        ("memory = 9GiB\n", 1, "is not TOML"),
        ('config = "other.toml"\n', 1, "config is no option of this command"),
    ],
)
def test_nonsense_is_named(moerun: Call, config: Path, text: str, code: int, said: str) -> None:
    config.write_text(text)
    done = moerun("generate", "--config", config, "--plan")
    assert said in error_line(done, code) if said != "slots" else done.returncode == code
    assert "slots" not in said or "slots" in done.stderr


def test_a_file_that_is_not_there_is_named(moerun: Call, config: Path) -> None:
    assert "run.toml" in error_line(moerun("generate", "--config", config, "--plan"))


def test_the_policy_of_a_file_is_fidelity_s(moerun: Call, config: Path) -> None:
    config.write_text('policy = "nonsense"\n')
    done = moerun("fidelity", "--config", config)
    assert "unknown policy 'nonsense'" in error_line(done, 2)
