"""The command line with a GGUF file: packed on first use, run, and refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType as Kind
from moerun.checkpoint.hub import resolve
from support.commands import Call, error_line
from support.gguf_files import Converter

PROMPT = ("--prompt", "The old man looked at", "--max-new-tokens", "12", "--slots", "2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as GGUF of 16-bit floats: the values are its own."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(resolve("tiny"), folder / "tiny")
    return Converter(folder / "tiny", "mixtral", lambda _name: Kind.F16).write(folder / "tiny.gguf")


def test_the_bundled_model_says_the_same_from_gguf(moerun: Call, tiny: Path) -> None:
    told = moerun("--model", tiny, *PROMPT)
    assert told.returncode == 0, told.stderr
    assert told.stdout == moerun(*PROMPT).stdout


def test_a_pack_says_what_it_made_and_a_bad_file_leaves_nothing(
    moerun: Call, tiny: Path, tmp_path: Path
) -> None:
    made = moerun("pack", tiny, "--precision", "4bit", "--out", tmp_path / "store")
    assert made.returncode == 0, made.stderr
    assert "tiny.gguf, 8 layers of 8 experts in 4bit" in made.stdout
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-1000])
    refused = error_line(moerun("pack", cut, "--out", tmp_path / "other"))
    assert f"{cut} is cut off: tensor" in refused
    assert not (tmp_path / "other").exists()
