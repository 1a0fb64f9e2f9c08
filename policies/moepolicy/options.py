"""Options that several commands share: dataclasses of annotated fields, and the signatures that
typer reads, made from them.

A command takes such a dataclass as one parameter. `signed` gives the command a signature in which
each field stands as an option of its own, with its help and default.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

PANEL = "panel"  # the class variable that names the section of the help for a dataclass's options


@dataclass(frozen=True)
class Formerly:
    """Part of an option's annotation: spellings that mean the same and no help shows."""

    names: tuple[str, ...]


def formerly(*names: str) -> Formerly:
    """Old spellings of the option that is annotated with this."""
    return Formerly(names)


@dataclass(frozen=True)
class Taking:
    """Part of a dataclass's annotation: which of its fields a command takes, and own defaults."""

    names: tuple[str, ...]
    defaults: Mapping[str, Any]


def taking(*names: str, **defaults: Any) -> Taking:
    """Of a shared dataclass only the fields ``names`` (none: all), with these ``defaults``.

    Fields that are left out keep the dataclass's default.
    """
    return Taking(names, defaults)


class _Group(NamedTuple):
    """One dataclass that a command takes: its class, and the names of its fields as options."""

    cls: type[Any]
    names: list[str]


def signed(run: Callable[..., None]) -> Callable[..., None]:
    """``run`` as typer is to see it: every shared dataclass spelt out as options.

    Raises TypeError where two parameters have one name, or `taking` names a field that is not
    there.
    """
    groups: dict[str, _Group] = {}
    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(run, eval_str=True).parameters.values():
        cls, notes = _unpacked(parameter.annotation)
        if not (isinstance(cls, type) and is_dataclass(cls)):
            shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        chosen = next((note for note in notes if isinstance(note, Taking)), Taking((), {}))
        parameters = list(_options(cls, chosen))
        groups[parameter.name] = _Group(cls, [each.name for each in parameters])
        shown += parameters
    if len({each.name for each in shown}) < len(shown):
        raise TypeError(f"{run.__name__}: two options have one name")

    @functools.wraps(run)
    def command(**values: Any) -> None:
        made = {
            name: group.cls(**{option: values.pop(option) for option in group.names})
            for name, group in groups.items()
        }
        run(**made, **values)

    command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return command


def old_spellings(command: Callable[..., None]) -> dict[str, tuple[str, ...]]:
    """The spellings that options of ``command`` had, by the name of their parameter."""
    found = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        for note in _unpacked(parameter.annotation)[1]:
            if isinstance(note, Formerly):
                found[parameter.name] = note.names
    return found


def _unpacked(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and what follows it in an Annotated."""
    if get_origin(annotation) is not Annotated:
        return annotation, ()
    base, *notes = get_args(annotation)
    return base, tuple(notes)


def _options(cls: type[Any], chosen: Taking) -> Iterator[inspect.Parameter]:
    known: dict[str, Field[Any]] = {field.name: field for field in fields(cls)}
    if unknown := {*chosen.names, *chosen.defaults} - set(known):
        raise TypeError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
    hints = get_type_hints(cls, include_extras=True)
    for name, field in known.items():
        if chosen.names and name not in chosen.names:
            continue
        default = chosen.defaults.get(name, field.default)
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=_in_panel(hints[name], getattr(cls, PANEL, None)),
        )


def _in_panel(annotation: Any, panel: str | None) -> Any:
    """The annotation with its option in the section ``panel`` of the help."""
    base, notes = _unpacked(annotation)
    placed = []
    for note in notes:
        if panel is not None and hasattr(note, "rich_help_panel"):
            note = copy(note)  # noqa: PLW2901
            note.rich_help_panel = panel
        placed.append(note)
    annotated: Any = Annotated
    return annotated[(base, *placed)] if placed else base
