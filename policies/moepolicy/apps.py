"""The three programs' command lines alike: help that wraps, --version, completion, old spellings
of options, and a command that is meant where none is named.

Of this package, only this module imports typer.
"""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from moepolicy.console import emit
from moepolicy.options import old_spellings, signed
from moepolicy.versions import installed

ARGUMENTS = "Arguments"
OPTIONS = "Options"  # the section of the help for options that name none
WIDEST_NAME, NARROWEST_HELP = 28, 20  # columns

Force = Annotated[
    bool,
    typer.Option("--force", help="Replace a file that lies where this command is to write one."),
]


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


class Group(TyperGroup):
    """Commands, one of which is meant where the command line begins with an option of its own."""

    default: ClassVar[str | None] = None
    program: ClassVar[tuple[str, str, Sequence[str]]] = ("", "", ())  # what --version tells

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
        width = max(formatter.width - len(indent) - column, NARROWEST_HELP)
        for name, text in records:
            lines = textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)
            own_line = len(name) + 2 > column
            names = [name] + [""] * (len(lines) - 1 + own_line)
            texts = [""] * own_line + lines
            for left, right in zip(names, texts, strict=True):
                formatter.write(f"{indent}{left:{column}}{right}".rstrip() + "\n")
