"""A policy that does not return: named after a while, and no obstacle to Ctrl-C.

One thread of a process looks at every policy's call that is under way. Compiled code lets other
threads run, so the thread sees a policy that never returns from there, too.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any
from weakref import WeakSet

from moepolicy import console
from moepolicy.blame import files_of
from moepolicy.policy import Policy

OVERDUE_S = 10.0  # a call this long is told of
HEARD_S = 3.0  # what Ctrl-C gives a call to end by itself
TICK_S = 0.5
COMPILERS = ("numba", "llvmlite")  # packages that compile on a call's first run, which takes long


class Watch:
    """The calls of one policy, one under way at a time; a context manager around each.

    what   what does not return, for messages: "policy 'lru'"
    files  gives where its code is, once that is asked for
    step   an array whose first entry is the number of the step, if there is one
    """

    def __init__(self, what: str, files: Callable[[], frozenset[str]], step: Any = None) -> None:
        self.what = what
        self.files = files
        self.calls = 0
        self.inside = False
        self.thread = 0
        self.told = False
        self._step = step
        _watch_over(self)

    def __enter__(self) -> Watch:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.inside = False

    def begin(self) -> None:
        """A call begins, in this thread; ``inside`` is set to False where it ends."""
        self.thread = threading.get_ident()
        self.calls += 1
        self.inside = True

    @property
    def at(self) -> tuple[int, int]:
        """How far it is: changes with every call and every step."""
        return self.calls, -1 if self._step is None else int(self._step[0])


def watch_policy(label: str, policy: type[Policy], step: Any = None) -> Watch:
    """What to call a policy in, that its author may have given a loop without an end."""
    return Watch(f"policy '{label}'", partial(files_of, policy), step)


_watches: WeakSet[Watch] = WeakSet()
_adding = threading.Lock()
_began: dict[str, int] = {}  # the process whose thread looks after them


def _watch_over(watch: Watch) -> None:
    """Have ``watch`` looked at by this process's thread, which is begun for the first."""
    with _adding:
        _watches.add(watch)
    if _began.get("pid") == os.getpid():
        return
    _began["pid"] = os.getpid()
    signals = _signals()
    threading.Thread(target=_look, args=(signals,), name="overdue", daemon=True).start()


def _signals() -> int | None:
    """A pipe's end that becomes readable with every signal; None but in a command's main thread.

    Of Python's own handlers none runs while compiled code does; the system's writes to the pipe.
    """
    if not console.in_command() or threading.current_thread() is not threading.main_thread():
        return None
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    former = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    if former != -1:  # somebody else listens
        signal.set_wakeup_fd(former)
        os.close(writable)
        os.close(readable)
        return None
    return readable


def _look(signals: int | None) -> None:
    """Look at all calls that are under way, twice a second."""
    seen: dict[int, tuple[tuple[int, int], float]] = {}  # how far each is, and since when
    asked_s, asked_of = 0.0, dict[int, tuple[int, int]]()  # of the last Ctrl-C
    while True:
        if _interrupted_within_a_tick(signals):
            asked_s = time.monotonic()
            asked_of = {id(each): each.at for each in _under_way()}
        now_s = time.monotonic()
        former, seen = seen, {}
        for each in _under_way():
            at = each.at
            since_s = former.get(id(each), (at, now_s))[1]
            seen[id(each)] = at, since_s if former.get(id(each), (at,))[0] == at else now_s
            if asked_of.get(id(each)) == at and now_s - asked_s > HEARD_S:
                _leave()
            if not each.told and now_s - seen[id(each)][1] > OVERDUE_S and not _tell(each):
                seen[id(each)] = at, now_s


def _interrupted_within_a_tick(signals: int | None) -> bool:
    """Wait for a tick or a signal; whether there was a Ctrl-C."""
    if signals is None:
        time.sleep(TICK_S)
        return False
    return bool(select.select([signals], [], [], TICK_S)[0]) and signal.SIGINT in os.read(
        signals, 64
    )


def _tell(watch: Watch) -> bool:
    """Say that a call is overdue; False where that is not said, as its code is being compiled."""
    where = _where(watch)
    if where is not None:
        watch.told = True
        console.say(f"{watch.what} has not returned for {OVERDUE_S:.0f} s{where}")
    return where is not None


def _under_way() -> list[Watch]:
    """The calls that have begun and not ended."""
    with _adding:
        return [each for each in _watches if each.inside]


def _where(watch: Watch) -> str | None:
    """Hook, line and step of a call that is overdue; None while its code is being compiled."""
    frame: FrameType | None = sys._current_frames().get(watch.thread)
    files, own = watch.files(), None
    while frame is not None:
        code = frame.f_code
        if f"{frame.f_globals.get('__name__', '')}".partition(".")[0] in COMPILERS:
            return None
        if own is None and code.co_filename in files:
            own = f"{code.co_name}, {code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    step = watch.at[1]
    found = [own] * (own is not None) + [f"step {step}"] * (step >= 0)
    stops = "; Ctrl-C ends the run" if console.in_command() else ""
    return (f" ({', '.join(map(str, found))})" if found else "") + stops


def _leave() -> None:
    """End the process, whose call has not ended by itself: no exception reaches it there."""
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    console.say_interrupted(console.what_is_kept())
    sys.stdout.flush()
    atexit._run_exitfuncs()  # temporary files, and the terminal's cursor
    os._exit(console.INTERRUPTED)
