"""What the three commands share: exit codes, one-line errors and "did you mean"."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130


class WrongUsage(Exception):
    """Mixed into errors about values that no machine, model or file could make right.

    A command that ends with one exits with 2, as for an option that does not exist.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the closest choice, then all of them."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}there are: {', '.join(known)}"


def fail(message: str, code: int = FAILED) -> None:
    """Print one line on stderr and leave with ``code``."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


def run(app: Callable[[], object], *, errors: tuple[type[BaseException], ...]) -> None:
    """Call a command's typer app; expected failures become one line and exit code 1, or 2.

    ``errors`` are the exception classes the command raises for its user's mistakes; the
    operating system's own (no such file, no space left) are always among them. Anything else is
    a defect of ours and keeps its traceback. Those that are WrongUsage, too, exit with 2.
    """
    try:
        app()
    except BrokenPipeError:
        # The reader of our output (head, less) left: not an error, and nothing more to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")
    except errors as error:
        fail(str(error), WRONG_USAGE if isinstance(error, WrongUsage) else FAILED)
