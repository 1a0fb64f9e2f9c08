"""`--config FILE`: options of a command from a TOML file, such as `moesim recommend` writes.

A key is an option's name without its dashes: ``host-memory = "24GiB"``. Options on the command line
take the place of the file's.
"""

from __future__ import annotations

import functools
import inspect
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from moepolicy.console import CommandError, nearest
from moeroute.jsontext import parse_toml

NAME = "config"


def configurable(run: Callable[..., None]) -> Callable[..., None]:
    """``run`` with the option --config in addition to its own."""
    own = inspect.signature(run, eval_str=True)
    option = inspect.Parameter(
        NAME,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option(
                "--config",
                help="Take options from this TOML file, such as 'moesim recommend' writes: a line "
                'each, as in: host-memory = "24GiB". Options given here go before the file\'s.',
                show_default=False,
                is_eager=True,
                callback=_read,
            ),
        ],
    )

    @functools.wraps(run)
    def command(**values: Any) -> None:
        del values[NAME]  # its callback has done all there is to do
        run(**values)

    parameters = [*own.parameters.values(), option]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the command's options."""
    if path is not None and not context.resilient_parsing:
        context.default_map = {**(context.default_map or {}), **read_config(path, context.command)}
    return path


def read_config(path: Path, command: Any) -> dict[str, Any]:
    """The values of a file by the names of ``command``'s parameters.

    Raises CommandError for a file that is none, and for a key that is no option's.
    """
    try:
        table = parse_toml(path.read_bytes())
    except tomllib.TOMLDecodeError as error:
        raise CommandError(f"--config {path} is not TOML: {error}") from None
    known = _keys(command)
    found: dict[str, Any] = {}
    for key, value in table.items():
        param = known.get(key.replace("_", "-"))
        if param is None:
            raise CommandError(
                f"--config {path}: {key} is no option of this command; {nearest(key, known)}"
            )
        found[str(param.name)] = _checked(path, key, value, several=_takes_several(param))
    return found


def _keys(command: Any) -> dict[str, Any]:
    """The parameters of a command by what the file calls them: an option by its long name, an
    argument by its placeholder."""
    found = {}
    for param in command.params:
        if param.param_type_name == "argument":
            found[str(param.metavar or param.name).strip("[].").lower()] = param
        elif param.name not in (NAME, "help"):
            found |= {name[2:]: param for name in param.opts if name.startswith("--")}
    return found


def _takes_several(param: Any) -> bool:
    return bool(param.multiple if hasattr(param, "multiple") else False) or param.nargs == -1


def _checked(path: Path, key: str, value: Any, *, several: bool) -> Any:
    """A value as the command line would have it; CommandError for tables and the like."""
    values = value if isinstance(value, list) and several else [value]
    if not all(isinstance(one, str | int | float | bool) for one in values):
        what = "a text, a number, true or false" + ", or a list of them" * several
        raise CommandError(f"--config {path}: {key} is {value!r}, not {what}")
    return values if several else value
