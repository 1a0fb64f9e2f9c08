"""What the three commands share: exit codes, one-line errors and "did you mean"."""

from __future__ import annotations

import codecs
import difflib
import io
import os
import sys
from collections.abc import Callable, Iterable

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130

SET_UTF8 = "set PYTHONUTF8=1"
STRICT = ("strict", "surrogateescape")  # what a stream does by default with what it cannot encode


class WrongUsage(Exception):
    """Mixed into errors about values that no machine, model or file could make right.

    A command that ends with one exits with 2, as for an option that does not exist.
    """


class CommandError(Exception):
    """What a command cannot do with the files it was given; every command shows it as one line."""


class CommandUsageError(CommandError, WrongUsage):
    """An option whose value is wrong whatever lies on the disk."""


class _StdoutError(OSError):
    """What stdout leads to takes no more: a full disk, say."""


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


def emit(text: str) -> None:
    """Print results; a disk that has no room for them is told as stdout's."""
    _to_stdout(lambda: sys.stdout.write(text))


def _to_stdout(write: Callable[[], object]) -> None:
    try:
        write()
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _StdoutError(error.errno, error.strerror, "stdout") from error


def print_anything() -> None:
    r"""Let stdout and stderr print every text: what their encoding lacks is written as \xe9.

    Names, models and prompts are in any language, whatever PYTHONIOENCODING and the locale say.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in STRICT:
            stream.reconfigure(errors="backslashreplace")
    stdin = sys.stdin
    if isinstance(stdin, io.TextIOWrapper) and codecs.lookup(stdin.encoding).name == "ascii":
        stdin.reconfigure(encoding="utf-8", errors="strict")  # says all that ASCII does, and more


def run(app: Callable[[], object], *, errors: tuple[type[BaseException], ...]) -> None:
    """Call a command's typer app; expected failures become one line and exit code 1, or 2.

    ``errors`` are the exception classes the command raises for its user's mistakes; CommandError
    and the operating system's own (no such file, no space left) are always among them. Anything
    else is a defect of this project and keeps its traceback. Errors that are also WrongUsage exit
    with 2.
    """
    print_anything()
    _check_arguments()
    expected: tuple[type[BaseException], ...] = (CommandError, *errors)
    try:
        try:
            app()
        except SystemExit:
            _to_stdout(lambda: None)  # what is still to be printed may fail
            raise
    except BrokenPipeError:
        # The reader of our output (head, less) left: not an error, and nothing more to flush.
        _drop_stdout()
        sys.exit(0)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except OSError as error:
        if isinstance(error, _StdoutError):
            _drop_stdout()
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")
    except UnicodeError as error:
        if sys.getfilesystemencoding() != "ascii":
            raise
        # torch, for one, reads its own files in the locale's encoding.
        fail(f"this locale reads nothing but ASCII ({error.reason}): {SET_UTF8}")  # type: ignore[attr-defined]
    except expected as error:
        fail(str(error), WRONG_USAGE if isinstance(error, WrongUsage) else FAILED)


def _check_arguments() -> None:
    """Leave with one line where an argument is bytes of another encoding than the locale's."""
    for argument in sys.argv[1:]:
        try:
            argument.encode()
        except UnicodeEncodeError:  # Python hands such bytes over as lone surrogates
            encoding = sys.getfilesystemencoding()
            hint = f": {SET_UTF8}" if encoding == "ascii" else ""
            fail(f"the argument {argument!a} is no {encoding} text{hint}", WRONG_USAGE)


def _drop_stdout() -> None:
    """Nothing more can be printed: Python's own last flush must not fail, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
