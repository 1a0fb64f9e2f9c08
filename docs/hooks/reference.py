"""The reference pages, made from the code when the site is built.

Commands come from the programs' own parsers, machine profiles and traces from their dataclasses,
the policy interface and the functions for Python from docstrings (mkdocstrings).
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from html import escape
from importlib import import_module
from typing import Any

from docstrings import as_list
from mkdocs.structure.files import File, Files
from typer.main import get_command

PROGRAMS = {
    "moesim": "The command moesim",
    "moerun": "The command moerun",
    "moetrace": "The command moetrace",
}
UNITS = {"bytes_per_s": "bytes/s", "flops_per_s": "operations/s", "bytes": "bytes", "s": "s"}
SHAPE = re.compile(r"^(h times )?\[n(, [KE])?\] ?")  # which the column's type says
POLICY = """# The policy interface, from the code

[The policy interface](../policy-interface.md) explains it with examples.

::: moepolicy.Policy

::: moepolicy.Step

::: moepolicy.Context

::: moepolicy.Kind
"""
PYTHON = """# Functions for Python

[From Python](../python.md) has examples.

## Routing traces

::: moeroute.open_trace

::: moeroute.Trace

::: moeroute.summarize

::: moetrace.recording

::: moetrace.write_requests

## The simulator

::: moesim.compare

::: moesim.simulate

::: moesim.Result

::: moesim.load_machine

## Live

::: moerun.load

::: moerun.Totals
"""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    made = {f"{program}.md": commands_page(program) for program in PROGRAMS}
    made |= {"machine.md": machine_page(), "trace.md": trace_page()}
    made |= {"policy.md": POLICY, "python.md": PYTHON}
    for name, text in made.items():
        files.append(File.generated(config, f"reference/{name}", content=text))
    return files


def commands_page(program: str) -> str:
    """Every command of a program: what it does, its arguments and its options by section."""
    group: Any = get_command(import_module(f"{program}.cli").app)
    outer = group.context_class(group, info_name=program)
    parts = [f"# {PROGRAMS[program]}", _paragraphs(group.help)]
    for name in group.list_commands(outer):
        command = group.get_command(outer, name)
        context = command.context_class(command, info_name=name, parent=outer)
        usage = " ".join(command.collect_usage_pieces(context))
        parts += [f"## {program} {name}", f"```text\n{program} {name} {usage}\n```"]
        parts += [_paragraphs(command.help), *_options(command.get_params(context), context)]
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str | None) -> str:
    return escape(inspect.cleandoc(text or ""), quote=False)


def _options(params: Any, context: Any) -> Iterator[str]:
    """A table a section, in the order of the help."""
    sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for param in params:
        record = param.get_help_record(context)
        if record is None:
            continue
        argument = param.param_type_name == "argument"
        title = getattr(param, "rich_help_panel", None) or "Options"
        sections.setdefault("Arguments" if argument else title, []).append(record)
    for title, records in sections.items():
        if records:
            rows = [(f"`{name}`", _cell(text)) for name, text in records]
            yield table((title, "what"), rows)


def _cell(text: str) -> str:
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("*", "\\*")


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine_page() -> str:
    """The entries of a machine profile, a table for each part of the file."""
    profile = import_module("moesim.machine.profile")
    parts = {
        "link": profile.LinkProfile,
        "compute": profile.Compute,
        "disk": profile.Disk,
        "cpu": profile.Cpu,
    }
    text = ["# Entries of a machine profile", "[Machines](../machines.md) shows a whole file."]
    text += ["## The whole file", as_list(inspect.cleandoc(profile.Machine.__doc__))]
    for name, kind in parts.items():
        rows = [
            (f"`{one.name}`", unit_of(one.name), default_of(one), _cell(comment))
            for one, comment in zip(fields(kind), comments(kind), strict=True)
        ]
        about = _paragraphs(kind.__doc__)
        text += [f"## `[{name}]`", about, table(("entry", "unit", "default", "what"), rows)]
    return "\n\n".join(text) + "\n"


def trace_page() -> str:
    """The columns of a trace's rows."""
    schema = import_module("moeroute.schema")
    about = dict(zip([one.name for one in fields(schema.Rows)], comments(schema.Rows), strict=True))
    rows = []
    for name in schema.column_names(horizon=1):
        spec = schema.column_spec(name)
        kind = f"{spec.dtype.name}[{spec.per_row}]" if spec.per_row else spec.dtype.name
        there = "yes" if name in schema.REQUIRED else ""
        said = about["predicted" if name.startswith(schema.PREDICTED) else name]
        rows.append((f"`{name}`", kind, there, _cell(SHAPE.sub("", said))))
    return "\n\n".join(
        [
            "# Columns of a trace",
            "[Traces](../traces.md) explains the format. A token has K experts of a layer's E.",
            table(("column", "type", "required", "what"), rows),
            "`predicted_logits_2` and further ones follow where the trace has a longer horizon.",
        ]
    )


def unit_of(name: str) -> str:
    """The unit that a field's name ends in."""
    return next((unit for end, unit in UNITS.items() if f"_{name}".endswith(f"_{end}")), "")


def default_of(field: Any) -> str:
    """A field's default, or that it must be there."""
    if field.default is MISSING:
        return "required"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f"{field.default:g}"


def comments(kind: type) -> list[str]:
    """The comment behind each field of a dataclass, in order; "" where there is none."""
    source = inspect.cleandoc(inspect.getsource(kind))
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return [found.get(node.lineno, "") for node in body.body if isinstance(node, ast.AnnAssign)]
