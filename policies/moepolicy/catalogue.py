"""What there is to know of each policy without reading its code: for the commands' `policies`.

Everything is taken from the class: the family from the folder of the library, the rule and the
paper from the docstring, the hooks and the parameters from the class itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from moepolicy.interface import accepted
from moepolicy.library import BUILT_IN, FAMILIES
from moepolicy.policy import (
    HOOKS,
    NEEDS,
    NO_USE,
    Context,
    Policy,
    PolicyError,
    defines,
    overrides,
    shares_slots,
)
from moepolicy.registry import FILE_MODULE, policy_classes
from moepolicy.spec import PolicySpec
from moepolicy.tables import INDENT, Table, described, wrapped

_LIBRARY = "moepolicy.library."
OWN = "own"
_ARXIV = re.compile(r"\b\d{2}(?:0[1-9]|1[0-2])\.\d{4,5}(?!\d)")
_DECIDING = ("retain", "prefetch", "on_miss", "precision", "substitute", "route", "share_slots")


@dataclass(frozen=True)
class PolicyEntry:
    """One policy, as its class describes it.

    family      folder of the library; "own" of a policy in a file, and of an installed one the
                module it comes from
    hooks       the methods of the interface that its class supplies, sorted
    needs       what its context, its steps or the machine must have (see `NEEDS`), sorted
    welcomes    what it uses where it is known, sorted
    papers      arXiv numbers that its docstring names
    rule        its docstring, or "" where it has none
    parameters  what a spec may give, with the defaults; None: must be given
    """

    name: str
    family: str
    hooks: tuple[str, ...]
    lossy: bool
    needs: tuple[str, ...]
    welcomes: tuple[str, ...]
    papers: tuple[str, ...]
    rule: str
    parameters: dict[str, str | None]

    @property
    def summary(self) -> str:
        """The first paragraph of the rule, in one line."""
        return self.rule.split("\n\n")[0].replace("\n", " ")

    @property
    def decides(self) -> tuple[str, ...]:
        """The hooks by which it decides, besides ``victim``; the others tell it what happened."""
        return tuple(hook for hook in _DECIDING if hook in self.hooks)

    def row(self) -> dict[str, Any]:
        """The entry for programs."""
        return {
            "policy": self.name,
            "family": self.family,
            "hooks": list(self.hooks),
            "lossy": self.lossy,
            "needs": list(self.needs),
            "welcomes": list(self.welcomes),
            "papers": list(self.papers),
            "parameters": _spelt(self.parameters),
            "summary": self.summary,
        }


def catalogue() -> list[PolicyEntry]:
    """Every built-in and every installed policy, family by family.

    Raises PolicyError where an installed one does not load.
    """
    return [entry_of(PolicySpec(name, cls)) for name, cls in policy_classes().items()]


def built_in() -> list[PolicyEntry]:
    """The policies of this library, family by family."""
    return [entry_of(PolicySpec(name, cls)) for name, cls in BUILT_IN.items()]


def entry_of(spec: PolicySpec) -> PolicyEntry:
    """What the class of one policy says of itself."""
    cls = spec.policy
    rule = inspect.cleandoc(cls.__doc__ or "")
    own = [hook for hook in HOOKS if _has(spec, hook)]
    return PolicyEntry(
        name=spec.name,
        family=_family(cls),
        hooks=tuple(sorted([*own, "share_slots"] if shares_slots(cls) else own)),
        lossy=cls.lossy,
        needs=tuple(sorted(spec.requires)),
        welcomes=tuple(sorted(spec.welcomes)),
        papers=tuple(dict.fromkeys(_ARXIV.findall(rule))),
        rule=rule,
        parameters={
            name: None if p.default is p.empty else str(p.default)
            for name, p in accepted(cls).items()
        },
    )


def _family(cls: type[Policy]) -> str:
    module = cls.__module__
    if module.startswith(_LIBRARY):
        return module.removeprefix(_LIBRARY).partition(".")[0]
    return OWN if module.startswith(FILE_MODULE) else module.partition(".")[0]


def _has(spec: PolicySpec, hook: str) -> bool:
    """Whether the policy supplies ``hook``; one made of parts is made to ask them."""
    try:
        return overrides(spec.build(_any_context()), hook)
    except (PolicyError, TypeError):  # a parameter must be given, or no cache of this kind will do
        return defines(spec.policy, hook)


def _any_context() -> Context:
    """A small cache with all the knowledge that a policy may ask for."""
    return Context(
        n_layers=2,
        n_experts=8,
        top_k=2,
        slots=4,
        counts=np.ones((2, 8), np.int64),
        next_use=np.full(4, NO_USE),
        offsets=np.array([0, 2, 4]),
        demands=np.array([0, 1, 8, 9], np.int32),
        copy_over_layer=1.0,
        expert_bytes=2,
        low_bytes=1,
    )


def catalogue_table(entries: Sequence[PolicyEntry], live: dict[str, str] | None = None) -> str:
    """The policies for people; ``live`` says of each by name whether it runs in a live run."""
    columns = ["family", "paper", "lossy", *(["runs live"] if live else []), "decides", "needs"]
    shown = Table(["policy"], columns, left=columns)
    for _, group in groupby(entries, key=lambda entry: entry.family):
        for entry in group:
            shown.add_row(
                entry.name,
                entry.family,
                " ".join(entry.papers),
                "lossy" if entry.lossy else "",
                *([live[entry.name]] if live else []),
                " ".join(entry.decides),
                " ".join(entry.needs),
            )
        shown.end_section()
    notes = [
        "decides: the hooks by which it decides, besides victim, which all have",
        "lossy: it may change what the model computes",
        "paper: its number on arXiv",
        *(f"needs {need}: {NEEDS[need]}" for need in sorted({n for e in entries for n in e.needs})),
    ]
    return f"{shown.render()}\n{wrapped(notes)}"


def description(entry: PolicyEntry, more: dict[str, str] | None = None) -> str:
    """One policy for people: its rule, its parameters, what it needs, and ``more`` about it."""
    about = {
        "family": entry.family,
        "parameters": ", ".join(_spelt(entry.parameters)) or "none",
        "hooks": ", ".join(entry.hooks),
        "needs": _explained(entry.needs) or "nothing more",
        **({"welcomes": _explained(entry.welcomes)} if entry.welcomes else {}),
        "lossy": "yes: it may change what the model computes" if entry.lossy else "no",
        "paper": ", ".join(f"https://arxiv.org/abs/{paper}" for paper in entry.papers) or "none",
    }
    rule = "\n".join(_paragraphs(entry.rule)) or "Its class has no docstring.\n"
    return f"{entry.name}\n\n{rule}\n{described(about | (more or {}))}"


def _explained(needs: Iterable[str]) -> str:
    return "; ".join(f"{need} ({NEEDS[need]})" for need in needs)


def _paragraphs(text: str) -> Iterable[str]:
    """Paragraphs within the width; a line that is indented begins an item of its own."""
    for paragraph in text.split("\n\n"):
        items: list[str] = []
        for line in paragraph.splitlines():
            deep = line.startswith(" " * (INDENT + 2))
            if items and (deep or not line.startswith(" ")):
                items[-1] += f" {line.strip()}"
            else:
                items.append(line)
        yield wrapped(items)


def markdown(entries: Sequence[PolicyEntry]) -> str:
    """The page docs/policies.md."""
    lines = [
        "# Policies",
        "",
        "Made by `moesim policies --markdown`; do not edit. `moesim policies` also lists the",
        "policies of installed packages, and `moesim policies NAME` prints one.",
        "",
        "| policy | family | decides | lossy | needs | paper |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| [{entry.name}](#{entry.name}) | {entry.family} "
        f"| {', '.join(entry.decides)} "
        f"| {'lossy' if entry.lossy else ''} | {', '.join(entry.needs)} "
        f"| {', '.join(map(_link, entry.papers))} |"
        for entry in entries
    ]
    lines += [
        "",
        "decides: the hooks by which it decides, besides `victim`, which all have. A lossy policy",
        "may change what the model computes. What a policy may need:",
        "",
    ]
    lines += [f"- `{need}`: {what}" for need, what in sorted(NEEDS.items())]
    about = {family.__name__.removeprefix(_LIBRARY): family.__doc__ or "" for family in FAMILIES}
    for family, group in groupby(entries, key=lambda entry: entry.family):
        lines += ["", f"## {family}", "", about[family].partition("\n\n")[0]]
        for entry in group:
            lines += ["", f"### {entry.name}", "", entry.rule]
            if entry.parameters:
                lines += ["", f"Parameters: {_coded(_spelt(entry.parameters))}"]
    return "\n".join(lines) + "\n"


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})"


def _coded(texts: Iterable[str]) -> str:
    return ", ".join(f"`{text}`" for text in texts)


def _spelt(parameters: dict[str, str | None]) -> list[str]:
    """Parameters as a spec gives them: those with a default have it."""
    return [f"{name}=..." if v is None else f"{name}={v}" for name, v in parameters.items()]
