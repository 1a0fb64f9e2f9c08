"""Signatures made from dataclasses: what a command is given, and what typer is shown."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, get_args

import pytest
import typer
from moepolicy.apps import add_command, make_app
from moepolicy.completion import among, listed
from moepolicy.console import CommandUsageError
from moepolicy.options import formerly, old_spellings, signed, taking
from typer.testing import CliRunner


@dataclass(frozen=True, kw_only=True)
class Shared:
    panel: ClassVar[str] = "Size"

    width: Annotated[int, typer.Option(help="How wide.")] = 3
    height: Annotated[int, typer.Option(help="How high."), formerly("--tall")] = 4
    deep: Annotated[bool, typer.Option("--deep", help="Whether deep."), formerly("--low")] = False


@dataclass(frozen=True)
class Needed:
    name: Annotated[str, typer.Option(help="Its name.")]


given: list[Any] = []


def draw(what: str, *, loud: bool = False, size: Shared) -> None:
    """Draw it."""
    given.append((what, loud, size))


def few(*, size: Annotated[Shared, taking("width", width=7)], needed: Needed) -> None:
    """Draw little."""
    given.append((size, needed))


def all_but_defaults(*, size: Annotated[Shared, taking(height=9)]) -> None:
    """Draw high."""
    given.append(size)


@pytest.fixture
def run() -> Any:
    app = make_app("drawing", "Draws.", version="1.2", packages=("numpy",), default="draw")
    for command in (draw, few, all_but_defaults):
        add_command(app, command)
    given.clear()

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    return call


def test_a_command_gets_its_dataclass_from_the_options(run: Any) -> None:
    assert run("draw", "it", "--width", "5").exit_code == 0
    assert run("draw", "it", "--loud").exit_code == 0
    assert given == [("it", False, Shared(width=5)), ("it", True, Shared())]


def test_fields_that_are_not_taken_are_no_options_and_keep_their_default(run: Any) -> None:
    assert run("few", "--name", "n").exit_code == 0
    assert given == [(Shared(width=7), Needed("n"))]
    assert isinstance(run("few", "--name", "n", "--height", "2").exception, CommandUsageError)
    assert isinstance(run("few").exception, CommandUsageError)  # --name has no default
    assert run("all-but-defaults", "--width", "1").exit_code == 0
    assert given[-1] == Shared(width=1, height=9)


def test_an_old_spelling_does_the_same_and_no_help_shows_it(run: Any) -> None:
    for arguments in (("--height", "9", "--deep"), ("--tall", "9", "--low"), ("--tall=9", "--low")):
        assert run("draw", "it", *arguments).exit_code == 0
    assert given == [("it", False, Shared(height=9, deep=True))] * 3
    shown = run("draw", "--help").output
    assert "--height" in shown
    assert "--tall" not in shown
    assert "--low" not in shown
    assert old_spellings(signed(draw)) == {"height": ("--tall",), "deep": ("--low",)}
    # An option's value that looks like an old spelling is a value.
    assert run("few", "--name", "--tall").exit_code == 0
    assert given[-1][1] == Needed("--tall")


def test_options_stand_in_the_section_of_their_dataclass(run: Any) -> None:
    before, _, after = run("draw", "--help").output.partition("\nSize:\n")
    assert "--loud" in before
    assert "--width" not in before
    assert "--width" in after
    (hint,) = (
        p.annotation for n, p in inspect.signature(signed(draw)).parameters.items() if n == "width"
    )
    assert get_args(hint)[1].rich_help_panel == "Size"
    assert get_args(Shared.__annotations__["width"])[1:] == ()  # strings: the class is untouched


def test_options_without_a_command_are_the_default_ones(run: Any) -> None:
    assert run("--width", "5", "it").exit_code == 0
    assert given == [("it", False, Shared(width=5))]
    assert isinstance(run("it").exception, CommandUsageError)
    version = run("--version")
    assert version.exit_code == 0
    assert version.output.splitlines()[0].split() == ["drawing", "1.2"]
    assert [line.split()[0] for line in version.output.splitlines()] == [
        *("drawing", "python", "numpy")
    ]
    alone = run()
    assert alone.exit_code == 2
    assert "all-but-defaults  Draw high." in alone.output


def test_what_cannot_be_a_signature_is_refused() -> None:
    def unknown(*, size: Annotated[Shared, taking("weight")]) -> None: ...

    def twice(*, width: int = 1, size: Shared) -> None: ...

    for command in (unknown, twice):
        command.__annotations__ = {
            name: eval(hint, globals()) for name, hint in command.__annotations__.items()
        }
    with pytest.raises(TypeError, match="Shared has no field weight"):
        signed(unknown)
    with pytest.raises(TypeError, match="two options have one name"):
        signed(twice)


def test_the_last_of_a_list_is_completed() -> None:
    names = {"lru": "least recent", "lfu": "least often", "fifo": ""}
    assert among(lambda: names)("l") == [("lru", "least recent"), ("lfu", "least often")]
    assert listed(lambda: ["t4", "a100"])("a100,t") == [("a100,t4", "")]
    assert listed(lambda: ["t4", "a100"])("t") == [("t4", "")]
