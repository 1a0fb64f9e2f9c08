"""Why numba does not compile a policy, in one line out of the hundred it says."""

from __future__ import annotations

import re
from collections.abc import Iterator

from moepolicy.numba_internals import NEEDS_ALLOCATION

# What numba puts around a cause: where it was in its own work, and what it tried in vain.
_FRAME = re.compile(
    r"Failed in nopython mode pipeline|- Resolution failure|Rejected as|Overload (in|of) function"
    r"|Intrinsic in function|There are \d+ candidate|- Of which|With argument|During:|raised from"
    r"|None$|No match"
)
# numba colours what it says wherever the package colorama is installed.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# How compiled code comes to a policy's hook: in one piece with the rest, and apart from it.
_OURS = re.compile(
    r"Overload in function '_resolve_method\.<locals>\.overload'"
    r"|Intrinsic in function 'storing\.<locals>\.store'"
)


def needs_memory(error: BaseException) -> bool:
    """Whether compiling failed because the code makes arrays, and was to do without."""
    return NEEDS_ALLOCATION in str(error)


def why_not(error: BaseException, files: frozenset[str]) -> str:
    """One line: the cause, and which line of the policy's ``files`` it is about."""
    text = _COLOUR.sub("", str(error))
    lines = [line.strip() for line in text.splitlines()]
    # What follows the last mention of our own detour is about the policy's code.
    ours = [i for i, line in enumerate(lines) if _OURS.search(line)]
    about = lines[ours[-1] + 1 :] if ours else lines
    cause = next(_causes(about), text.strip().splitlines()[0] if text.strip() else "")
    where = _place(about, files)
    kind = type(error).__name__
    return f"{where}numba: {cause or kind}"


def _causes(lines: list[str]) -> Iterator[str]:
    for i, line in enumerate(lines):
        bare = line.partition("Error: ")[2] if re.match(r"\w+Error: ", line) else line
        if not bare or _FRAME.search(bare) or bare.startswith(">>>"):
            continue
        if bare.startswith("No implementation of function"):
            call = next((each for each in lines[i:] if each.startswith(">>> ")), None)
            yield f"no implementation of {call[4:]}" if call else bare
        else:
            yield _shorter(bare)


def _shorter(cause: str) -> str:
    """What numba says of an unknown attribute, without the listing of a type or a module's file."""
    unknown = re.match(r"Unknown attribute '(\w+)' of type (.*)", cause)
    if unknown is None:
        return cause
    module = re.match(r"Module\(<module '([\w.]+)'", unknown[2])
    if module:
        return f"{module[1]}.{unknown[1]} does not compile"
    if re.match(r"\w+\[\S+ [0-9a-f]{32}\]\(", unknown[2]):  # the policy's own fields
        return f"self.{unknown[1]} is not set in __init__ as an array or a number"
    return cause


def _place(lines: list[str], files: frozenset[str]) -> str:
    names = {file.rpartition("/")[2]: file for file in files}
    for line in lines:
        found = re.search(r'File "([^"]+)", line (\d+)', line) or re.search(
            r" at (\S+) \((\d+)\)$", line
        )
        if found and (name := found[1].rpartition("/")[2]) in names:
            return f"{name}:{found[2]}: "
    return ""
