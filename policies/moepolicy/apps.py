"""The three programs' command lines alike: help that wraps, --version, completion, old spellings
of options, and a command that is meant where none is named.

Of this package, only this module imports typer.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from moepolicy.console import (
    WRONG_USAGE,
    CommandUsageError,
    Interrupted,
    emit,
    nearest,
    what_is_kept,
)
from moepolicy.near import meant
from moepolicy.options import old_spellings, signed
from moepolicy.outputs import FORMATS, Output
from moepolicy.tables import Format
from moepolicy.versions import installed

ARGUMENTS = "Arguments"
OPTIONS = "Options"  # the section of the help for options that name none
WIDEST_NAME, NARROWEST_HELP = 28, 20  # columns
TYPER_LEAST = 52  # columns: typer wraps the text of a help at these where a terminal has fewer

Force = Annotated[
    bool,
    typer.Option("--force", help="Replace a file that lies where this command is to write one."),
]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How and where results are printed."""

    panel: ClassVar[str] = "Output"

    format: Annotated[
        Format | None,
        typer.Option(
            help="How to print the results. Default: table, or what the suffix of --out says.",
            show_default=False,
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the results to this file. The suffix says the format: "
            f"{', '.join(FORMATS)} (.txt: the table).",
            show_default=False,
        ),
    ] = None
    force: Force = False

    def checked(self) -> Output:
        """The file or stdout that results go to. Raises CommandError where that is not possible."""
        return Output.checked(self.out, self.format, force=self.force)


class Command(TyperCommand):
    """A command that knows old spellings of its options and shows its options in sections."""

    old_names: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def make_parser(self, ctx: Any) -> Any:
        """The parser, which takes old names as well, that no help shows."""
        parser = super().make_parser(ctx)
        for param in self.params:
            for old in self.old_names.get(str(param.name), ()):
                alias = copy(param)
                alias.opts, alias.secondary_opts = [old], []
                alias.add_to_parser(parser, ctx)
        return parser

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options by section."""
        _write_sections(self.get_params(ctx), ctx, formatter)


# What typer raises for a command line that it cannot take: no part of its public names, and in
# another place in each of its versions.
_TyperError: Any = typer.BadParameter.__mro__[2]
assert _TyperError.__name__ == "ClickException"


class Group(TyperGroup):
    """Commands, one of which is meant where the command line begins with an option of its own.

    Mistakes on the command line become errors of `moepolicy.console`, which prints one line.
    """

    default: ClassVar[str | None] = None
    program: ClassVar[tuple[str, str, Sequence[str]]] = ("", "", ())  # what --version tells

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run a command line; by default ends Python with the command's exit code.

        Raises CommandUsageError for what cannot be taken, and Interrupted.
        """
        columns = shutil.get_terminal_size((TYPER_LEAST, 24)).columns
        if columns < TYPER_LEAST:
            extra = {"terminal_width": columns - 2} | extra
        try:
            code = super().main(*args, **extra | {"standalone_mode": False})
        except _TyperError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                sys.stderr.write(f"{error.format_message()}\n")
                sys.exit(WRONG_USAGE)
            raise CommandUsageError(_mistake(error)) from None
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises Interrupted, where typer would end without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(what_is_kept(error)) from error

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse ``args``; an option that is not the group's is the default command's."""
        if self.default is not None and args and args[0].startswith("-"):
            own = {name for param in self.get_params(ctx) for name in param.opts}
            if args[0].partition("=")[0] not in own:
                args = [self.default, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """What completes ``incomplete``: the default command's options too."""
        offered = super().shell_complete(ctx, incomplete)
        if self.default is not None and incomplete.startswith("-"):
            own = {item.value for item in offered}
            others = self.commands[self.default].shell_complete(ctx, incomplete)
            offered += [item for item in others if item.value not in own]
        return offered

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options by section, then the commands."""
        _write_sections(self.get_params(ctx), ctx, formatter)
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        _write_section("Commands", [(n, _first_sentence(each)) for n, each in commands], formatter)


def _mistake(error: Any) -> str:
    """What is wrong with a command line, and which help says what is right; one line."""
    text = _told(error).strip()
    if getattr(error, "ctx", None) is None or "--help" in text:
        return text
    return f"{text.rstrip('.')} (see: {error.ctx.command_path} --help)"


def _told(error: Any) -> str:
    """The message in the form of all others: the option, its value, what it takes."""
    ctx = getattr(error, "ctx", None)
    if hasattr(error, "possibilities") and ctx is not None:  # NoSuchOption
        name = str(error.option_name)
        known = [each for param in ctx.command.get_params(ctx) for each in param.opts]
        hint = meant(name, known).rstrip()
        return f"there is no option {name}" + (f"; {hint}" if hint else "")
    param = getattr(error, "param", None)
    if type(error).__name__ == "MissingParameter" and param is not None:
        return f"{_shown(param)} is missing"
    if param is not None:
        return f"{_shown(param)}{_in_our_words(_lower(error.message))}"
    if isinstance(error, typer.BadParameter):
        return str(error.message)
    unknown = re.match(r"No such command '(.*?)'", error.format_message())
    if unknown and ctx is not None:
        return f"there is no command '{unknown[1]}'; {nearest(unknown[1], ctx.command.commands)}"
    return _lower(error.format_message())


# How typer (pydantic) says what a value must be, and how our own checks say it.
_WORDS = (
    (r"input should be a valid integer.*", r" takes a whole number"),
    (r"input should be a valid (number|float).*", r" takes a number"),
    (r"input should be greater than or equal to (\S+)", r" must be \1 or more"),
    (r"input should be less than or equal to (\S+)", r" must be \1 or less"),
    (r"value error, (.*)", r" \1"),
)


def _in_our_words(said: str) -> str:
    for pattern, words in _WORDS:
        if re.fullmatch(pattern, said):
            return re.sub(pattern, words, said)
    return f": {said}"


def _shown(param: Any) -> str:
    """A parameter as it is typed: --slots, or POLICY of an argument."""
    if param.param_type_name == "argument":
        return str(param.metavar or param.name.upper()).strip("[].")
    return str(max(param.opts, key=len))


def _lower(text: str) -> str:
    """A sentence of typer's in the middle of one of ours."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def make_app(
    name: str,
    help: str,
    *,
    version: str,
    packages: Sequence[str],
    default: str | None = None,
) -> typer.Typer:
    """A program without commands yet.

    ``packages`` are those whose versions --version tells. ``default`` names the command that is
    meant where a command line begins with an option; no arguments at all show the help, exit 2.
    """
    described = {"default": default, "program": (name, version, packages)}
    app = typer.Typer(
        name=name,
        cls=type("Group", (Group,), described),
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback(help=help)(_program)
    return app


def _show_versions(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:  # not while a shell asks what comes next
        assert isinstance(context.command, Group)
        emit(versions(*context.command.program))
        raise typer.Exit


def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_versions,
            is_eager=True,
            help="Show the versions of this program, of Python and of the packages that results "
            "depend on, and exit.",
        ),
    ] = False,
) -> None:
    """What stands before the commands."""


def add_command(
    app: typer.Typer, run: Callable[..., None], name: str | None = None, **settings: Any
) -> None:
    """Make ``run`` a command of ``app``, its shared dataclasses spelt out as options."""
    command = signed(run)
    cls = type("Command", (Command,), {"old_names": old_spellings(command)})
    app.command(name, cls=cls, **settings)(command)


def versions(name: str, version: str, packages: Sequence[str]) -> str:
    """Lines of name and version: the program's, Python's, and of ``packages`` those installed."""
    found = {name: version, "python": platform.python_version(), **installed(packages)}
    width = max(map(len, found))
    return "".join(f"{what:{width}}  {which}\n" for what, which in found.items())


def _first_sentence(command: Any) -> str:
    """The first paragraph of a command's help, never cut."""
    return " ".join((command.help or "").partition("\n\n")[0].split())


def _write_sections(params: Sequence[Any], ctx: Any, formatter: Any) -> None:
    """Arguments, then options by their section, in order of appearance."""
    sections: dict[str, list[tuple[str, str]]] = {ARGUMENTS: [], OPTIONS: []}
    for param in params:
        record = param.get_help_record(ctx)
        if record is None:
            continue
        argument = param.param_type_name == "argument"
        title = ARGUMENTS if argument else getattr(param, "rich_help_panel", None) or OPTIONS
        sections.setdefault(title, []).append(record)
    for title, records in sections.items():
        _write_section(title, records, formatter)


def _write_section(title: str, records: Sequence[tuple[str, str]], formatter: Any) -> None:
    """Names and what they mean in two columns; unlike typer's, names are never cut at a hyphen."""
    if not records:
        return
    column = min(max(len(name) for name, _ in records), WIDEST_NAME) + 2
    with formatter.section(title):
        indent = " " * formatter.current_indent
        if formatter.width - len(indent) - column < NARROWEST_HELP:
            column = 4  # a narrow terminal: what names mean stands below them
        width = max(formatter.width - len(indent) - column, NARROWEST_HELP)
        for name, text in records:
            lines = textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)
            own_line = len(name) + 2 > column
            names = [name] + [""] * (len(lines) - 1 + own_line)
            texts = [""] * own_line + lines
            for left, right in zip(names, texts, strict=True):
                formatter.write(f"{indent}{left:{column}}{right}".rstrip() + "\n")
