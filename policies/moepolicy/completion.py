"""What a shell offers to complete an option's value with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Names = Callable[[], Iterable[str]]
Completer = Callable[[str], list[tuple[str, str]]]


def known_policies() -> dict[str, str]:
    """The policies that there are, with what they do; they are imported when a shell asks."""
    from moepolicy.registry import policy_names

    return policy_names()


def among(names: Names) -> Completer:
    """Completes a value with those of ``names()``; from a mapping its values are shown as help."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        return _matching(names(), "", incomplete)

    return complete


def listed(names: Names) -> Completer:
    """Completes the last of several values that commas part."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        earlier, comma, last = incomplete.rpartition(",")
        return _matching(names(), earlier + comma, last)

    return complete


def _matching(names: Iterable[str], before: str, begun: str) -> list[tuple[str, str]]:
    helps = names if isinstance(names, dict) else {}
    return [(before + name, helps.get(name, "")) for name in names if name.startswith(begun)]
