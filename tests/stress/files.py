"""One wrong file, given to a command in a child, and how the command ended.

Memory, time and all that a wrong file does to a process are the child's own. Before a case's first
job, a child gives the command its right file, so that the parent knows what to import, and what
memory is usual.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import random
import re
import resource
import shutil
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stress.bad_files import CASES, Case
from stress.carriers import PWNED
from stress.forks import forked, import_all, most_address_space, resident
from stress.outcomes import (
    BROKEN,
    CODE,
    GOOD,
    LEFT,
    READ,
    REFUSED,
    TRACEBACK,
    UNCLEAR,
    WILD,
    Outcome,
)

GROWTH_BYTES = 1 << 30

SAID = "said"  # the file with what the child printed
NO_MEMORY = ("Unable to allocate", "annot allocate memory", "not enough memory", "out of memory")


@dataclass(frozen=True)
class Memory:
    """The most that a command took for a right file: of memory, and of address space."""

    resident_bytes: int
    address_bytes: int


class WrongFiles:
    """The jobs of one worker: a case by its name, and the number of the wrong file."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root = root
        self._seed = seed
        self._usual: dict[str, Memory | Outcome] = {}

    def __call__(self, case: str, number: int) -> Outcome:
        """Give the command of ``case`` its wrong file ``number``."""
        if case not in self._usual:
            self._usual[case] = warm(self._root, case)
        usual = self._usual[case]
        if isinstance(usual, Memory):
            return run(self._root, case, number, self._seed, usual)
        return Outcome(case, number, BROKEN, usual.told)


def warm(root: Path, name: str) -> Memory | Outcome:
    """Write the right files of a case and give them to its command; what it took."""
    case, folder = CASES[name], folder_of(root, name)
    made = forked(lambda: _make(case, folder), root / SAID)
    if made.how:
        return Outcome(name, -1, made.how, made.told)
    import_all(made.value)
    found = forked(lambda: _right(case, folder, root / SAID), root / SAID)
    shutil.rmtree(folder, ignore_errors=True)
    if found.how:
        return Outcome(name, -1, found.how, found.told)
    modules, outcome, told, memory = found.value
    import_all(modules)
    gc.collect()
    gc.freeze()  # what is never looked at stays shared with the children
    if outcome != READ:
        return Outcome(name, -1, BROKEN, f"the right file is {outcome}: {told}")
    return Memory(*memory)


def run(root: Path, name: str, number: int, seed: int, usual: Memory) -> Outcome:
    """Give the command of case ``name`` its wrong file ``number``, in a child."""
    folder = folder_of(root, name)
    ended = forked(
        lambda: _wrong(CASES[name], folder, root / SAID, f"{seed} {name} {number}", usual),
        root / SAID,
    )
    if ended.how:
        shutil.rmtree(folder, ignore_errors=True)
        return Outcome(name, number, ended.how, ended.told)
    return Outcome(name, number, *ended.value)


def folder_of(root: Path, name: str) -> Path:
    """The folder of a case."""
    return root / re.sub(r"\W+", "-", name)


def _make(case: Case, folder: Path) -> list[str]:
    """Write the right files, in ``folder.whole``; the modules that were imported for it."""
    whole = folder.with_name(f"{folder.name}.whole")
    if not whole.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.chdir(folder)
        case.make()
        os.chdir(folder.parent)
        folder.rename(whole)
    return sorted(sys.modules)


def _right(case: Case, folder: Path, output: Path) -> Any:
    _fresh(folder)
    before = resident()
    os.chdir(folder)
    outcome, told = judge(*call(case.command, case.said), output)
    return sorted(sys.modules), outcome, told, _grown(before)


def _wrong(case: Case, folder: Path, output: Path, seed: str, usual: Memory) -> tuple[str, str]:
    _fresh(folder)
    files = _files(folder)
    target = case.target_in(folder)
    right = target.read_bytes()
    target.write_bytes(_mutated(case, right, random.Random(seed)))
    before = resident()
    os.chdir(folder)
    outcome, told = judge(*call(case.command, case.said), output)
    grown = zip(_grown(before), (usual.resident_bytes, usual.address_bytes), strict=True)
    beyond = max(now - then for now, then in grown)
    left = sorted(_files(folder) - files - {PWNED})
    if (folder / PWNED).exists():
        outcome, told = CODE, "the file's code was run"
    elif outcome in GOOD and (beyond > GROWTH_BYTES or any(w in told for w in NO_MEMORY)):
        outcome, told = WILD, f"{beyond >> 20} MiB more memory: {told}"
    elif outcome == REFUSED and any(file.split("/")[0] not in case.keeps for file in left):
        outcome, told = LEFT, f"left {left[0]}: {told}"
    if left or outcome not in GOOD:
        os.chdir(folder.parent)
        shutil.rmtree(folder)
    else:
        target.write_bytes(right)
    return outcome, told[-4000:]


def _mutated(case: Case, right: bytes, rng: random.Random) -> bytes:
    from polars.exceptions import PanicException  # starts threads, which a fork would lose

    wrong = right
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        # A file that is wrong already may not be parsed; a panic of polars is no Exception.
        with contextlib.suppress(Exception, PanicException):
            wrong = rng.choice(case.mutators)(wrong, rng)
    return wrong


def _fresh(folder: Path) -> None:
    """The case's folder, with its right files."""
    if not folder.exists():
        shutil.copytree(folder.with_name(f"{folder.name}.whole"), folder)


def _grown(before: int) -> tuple[int, int]:
    """The most memory beyond ``before``, and the most address space, of this child."""
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before, most_address_space()


def call(command: tuple[str, ...], said: str = "") -> tuple[int, str]:
    """Exit code, and the traceback of what went through the command, if anything did."""
    program = importlib.import_module(f"{command[0]}.cli")
    before = sys.argv
    sys.argv = list(command)
    if said:
        _to_stdin(said)
    code, trace = 0, ""
    try:
        program.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        code, trace = 1, traceback.format_exc()
    finally:
        sys.argv = before
    return code, trace


def _to_stdin(said: str) -> None:
    read, write = os.pipe()
    os.write(write, said.encode())
    os.close(write)
    os.dup2(read, 0)
    sys.stdin = os.fdopen(0, closefd=False)


def judge(code: int, error: str, output: Path) -> tuple[str, str]:
    """What a command's end is called, and what it told. ``output`` is what it printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    said = output.read_text(errors="replace")
    if error or "Traceback (most" in said or "panicked at" in said:
        return TRACEBACK, error or said
    if code == 0:
        return READ, ""
    # "Error: " is typer's, below the command's usage.
    errors = [line for line in said.splitlines() if line.lower().startswith("error: ")]
    if code not in (1, 2) or len(errors) != 1:
        return UNCLEAR, f"exit code {code}: {said[-2000:]}"
    if len(errors[0]) > 600:
        return UNCLEAR, f"a line of {len(errors[0])} characters: {errors[0]}"
    return REFUSED, errors[0]


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() or p.name == PWNED}
