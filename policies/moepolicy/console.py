"""What the three commands share: exit codes, one-line errors and "did you mean"."""

from __future__ import annotations

import codecs
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import walk_tb
from typing import NoReturn, Self

from moepolicy import shortage
from moepolicy.near import meant

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130
LONGEST_LINE = 1000

OWN = ("moeroute", "moepolicy", "moesim", "moerun", "moetrace")
SET_UTF8 = "set PYTHONUTF8=1"
STRICT = ("strict", "surrogateescape")  # what a stream does by default with what it cannot encode


class WrongUsage(Exception):
    """Mixed into errors about values that no machine, model or file could make right.

    A command that ends with one exits with 2, as for an option that does not exist.
    """

    exit_code = WRONG_USAGE
    """Of the command; an error of a package that does not import this one may have one as well."""
    option = ""
    """The parameter that the message begins with, which a command shows as its option."""

    @classmethod
    def of(cls, option: str, says: str) -> Self:
        """The error of a parameter of a program, by its name there: slots, max_new_tokens."""
        error = cls(f"{option} {says}")
        error.option = option
        return error

    def as_typed(self) -> str:
        """The message with the parameter as the command's option: --max-new-tokens."""
        typed = f"--{self.option.replace('_', '-')}"
        return typed + str(self).removeprefix(self.option) if self.option else str(self)


class CommandError(Exception):
    """What a command cannot do with the files it was given; every command shows it as one line."""


class CommandUsageError(CommandError, WrongUsage):
    """An option whose value is wrong whatever lies on the disk."""


class Interrupted(BaseException):
    """Ctrl-C ended a command; the message says what is kept of its work."""


class _StdoutError(OSError):
    """What stdout leads to takes no more: a full disk, say."""


def nearest(name: str, choices: Iterable[str], listed_by: str | None = None) -> str:
    """The tail of an "unknown name" message: the choice that is near, if one is, then all of them.

    ``listed_by`` is the command that lists the choices, where the choices would fill lines.
    """
    known = sorted(choices)
    hint = meant(name, known)
    if listed_by:
        return f"{hint}`{listed_by}` lists the {len(known)} there are"
    return f"{hint}there are: {', '.join(known)}"


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Print one line on stderr and leave with ``code``; what a library tells may be as long as the
    file that it is of, and is cut."""
    line = " ".join(str(message).split())
    if len(line) > LONGEST_LINE:
        line = f"{line[:400]} ... {line[-150:]}"
    say(f"error: {line}")
    sys.exit(code)


_RUNNING: list[Callable[[], object]] = []  # the command that this process is, if it is one
_KEPT: list[Callable[[], str]] = []  # what an interrupted command keeps, the innermost last
NOTHING_KEPT = "nothing is kept of this run"


def in_command() -> bool:
    """Whether this process is one of the three programs, and not somebody's Python."""
    return bool(_RUNNING)


@contextmanager
def keeping(says: str | Callable[[], str]) -> Iterator[None]:
    """While this lasts, an interrupted command tells by ``says`` what is kept, and how to go on."""
    _KEPT.append(says if callable(says) else lambda: says)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(what_is_kept(error)) from error
    finally:
        _KEPT.pop()


def what_is_kept(error: KeyboardInterrupt | None = None) -> str:
    """What to say of an interrupted command's work: the text of ``error``, if it has one."""
    return str(error or "") or (_KEPT[-1]() if _KEPT else NOTHING_KEPT)


class _LastLine:
    """The last line that went to stdout: where the cursor of a terminal stands behind it."""

    unfinished = False


def emit(text: str) -> None:
    """Print results; a disk that has no room for them is told as stdout's."""
    if text:
        _LastLine.unfinished = not text.endswith("\n")
    _to_stdout(lambda: sys.stdout.write(text))


def say(text: str, *, fitted: bool = False) -> None:
    """Print a line on stderr at once; ``fitted``: it fits the terminal as it is.

    Where stderr shows up among a text that streams to stdout, on a terminal say, and that text's
    last line has no end yet, the line begins below it.
    """
    if _LastLine.unfinished and _is_one_place():
        _LastLine.unfinished, text = False, f"\n{text}"
    sys.stderr.write(f"{text if fitted else _fitted(text)}\n")
    sys.stderr.flush()


COLOURS = {"dim": "\x1b[2m", "yellow": "\x1b[33m"}


def note(text: str, colour: str = "dim") -> None:
    """Say what accompanies a command's results: dim, or in a colour of COLOURS, on a terminal
    that has them."""
    plain = not sys.stderr.isatty() or os.environ.get("NO_COLOR") or is_dumb()
    for line in _fitted(text).split("\n"):
        say(line if plain else f"{COLOURS[colour]}{line}\x1b[0m", fitted=True)


def is_dumb() -> bool:
    """Whether the terminal has neither colours nor a cursor that moves."""
    return os.environ.get("TERM", "dumb") in ("dumb", "unknown")


def _fitted(text: str) -> str:
    """Text for stderr: on a terminal in lines of its width, whose paths and words stay whole."""
    if not sys.stderr.isatty():
        return text
    from moepolicy.tables import wrapped

    width = shutil.get_terminal_size((80, 24)).columns
    lines = text.split("\n")
    return "\n".join(
        wrapped([line], width).rstrip("\n") if len(line) > width else line for line in lines
    )


def _is_one_place() -> bool:
    """Whether stdout and stderr lead to the same terminal, file or pipe."""
    try:
        return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # no file of the system's is behind one of them
        return False


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


def run(app: Callable[[], object], *, errors: Callable[[], tuple[type[Exception], ...]]) -> None:
    """Call a command's typer app; expected failures become one line and exit code 1, or 2.

    ``errors`` gives the exception classes the command raises for its user's mistakes, and is called
    where there is one, so that a help imports none of them; CommandError and the operating
    system's own (no such file, no space left) are always among them. Anything else is a defect of
    this project and keeps its traceback. Errors that are also WrongUsage exit with 2, and those
    with an ``exit_code`` with that. Ctrl-C exits with 130; see `keeping`.
    """
    print_anything()
    _check_arguments()
    _RUNNING.append(app)
    try:
        try:
            shortage.prepare()
            app()
        except SystemExit:
            _to_stdout(lambda: None)  # what is still to be printed may fail
            raise
    except BrokenPipeError:
        # The reader of our output (head, less) left: not an error, and nothing more to flush.
        _drop_stdout()
        sys.exit(0)
    except (KeyboardInterrupt, Interrupted) as error:
        say_interrupted(str(error) or what_is_kept())
        sys.exit(INTERRUPTED)
    except SystemExit:
        raise
    except BaseException as error:  # a panic of polars is no Exception
        _fail_with(error, errors)
        raise
    finally:
        _RUNNING.pop()


def _fail_with(error: BaseException, errors: Callable[[], tuple[type[Exception], ...]]) -> None:
    """Leave with one line, unless the error is a defect of this project."""
    shortage.relieve()
    expected = isinstance(error, CommandError)
    if not expected:
        with suppress(Exception):  # memory may lack for the modules of these classes
            expected = isinstance(error, errors())
    if expected:
        told = error.as_typed() if isinstance(error, WrongUsage) else str(error)
        code = getattr(error, "exit_code", FAILED)
        fail(told if code == WRONG_USAGE else f"{told}{shortage.remark()}", code)
    if lack_or_system := _told_of_the_system(error) or shortage.told_of(error):
        fail(lack_or_system)


def _told_of_the_system(error: BaseException) -> str | None:
    """What to say of an error that the system, or what is installed, is the cause of; None of
    another."""
    if isinstance(error, OSError) and (error.errno or not shortage.told_of(error)):
        if isinstance(error, _StdoutError):
            _drop_stdout()
        where = error.filename or _file_in_use(error)
        return f"{where}: {error.strerror or error}" if where else str(error.strerror or error)
    if isinstance(error, UnicodeDecodeError | UnicodeEncodeError):
        # torch, for one, reads its own files in the locale's encoding.
        told = f"this locale reads nothing but ASCII ({error.reason}): {SET_UTF8}"
        return told if sys.getfilesystemencoding() == "ascii" else None
    if isinstance(error, ModuleNotFoundError):
        from moepolicy.versions import lacking

        name = error.name or ""
        return lacking(name) if name and name.partition(".")[0] not in OWN else None
    return None


def say_interrupted(kept: str) -> None:
    """The line that a command which Ctrl-C ended leaves; ``kept`` is what is kept of its work."""
    say(f"interrupted: {' '.join(kept.split())}")


def _file_in_use(error: OSError) -> str | None:
    """The file that an error is of which names none, as those of reading and writing do not: the
    one that the innermost function has which has one."""
    functions = [frame.f_locals for frame, _ in walk_tb(error.__traceback__)]
    for known in reversed(functions):
        names = [v.name for v in known.values() if isinstance(v, io.IOBase) and hasattr(v, "name")]
        paths = [str(value) for value in known.values() if isinstance(value, Path)]
        found = [name for name in names if isinstance(name, str) and not name.startswith("<")]
        if found or paths:
            return (found or paths)[-1]
    return None


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
