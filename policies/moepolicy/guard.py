"""A policy as interpreted code calls it: it cannot change what it is shown, and cannot end a run.

Arrays of steps are shown read-only, as compiled hooks have them by their types. This is against
``step.logits.sort()``, which would change the routing for every policy that comes after, and what a
live model computes; it is no wall against code that means to. An exception such as SystemExit
becomes one that is told as the policy's failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moepolicy.policy import HOOKS, Context, Policy
from moepolicy.steps import Step

_WITH_STEP = frozenset({"on_step", "route", "on_miss", "precision", "substitute", "prefetch"})


class Quits(RuntimeError):
    """A policy raised what would end the process, or a thread without a word."""


@contextmanager
def no_quitting() -> Iterator[None]:
    """Raise Quits for SystemExit and its like; errors and Ctrl-C pass."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise _quits(error) from error


def _quits(error: BaseException) -> Quits:
    # With the frames of the policy's own code, by which it is told where that was.
    return Quits(f"it raised {type(error).__name__}").with_traceback(error.__traceback__)


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A view of the same numbers that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


def shown(values: Any) -> Any:
    """A named tuple, such as a Step or a Context, with arrays that cannot be written to."""
    return values._replace(
        **{
            name: read_only(value)
            for name, value in zip(values._fields, values, strict=True)
            if isinstance(value, np.ndarray)
        }
    )


class _Guarded:
    """The hooks of a policy. A step is made read-only once for all that it is given to."""

    def __init__(self, policy: Policy) -> None:
        self._step: Step | None = None
        self._shown: Step | None = None
        for hook in HOOKS:
            setattr(self, hook, self._calling(policy, hook))

    def _calling(self, policy: Policy, hook: str) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            try:
                # Looked up each time: a policy may change its mind about who answers.
                return getattr(policy, hook)(*given)
            except (Exception, KeyboardInterrupt):
                raise
            except BaseException as error:
                raise _quits(error) from error

        def call_with_step(step: Step, *given: Any) -> Any:
            if step is not self._step:
                self._step, self._shown = step, shown(step)
            return call(self._shown, *given)

        return call_with_step if hook in _WITH_STEP else call


def guarded(policy: Policy) -> Policy:
    """``policy`` as interpreted code of the state machine is to call it."""
    return cast(Policy, _Guarded(policy))


def shown_context(context: Context) -> Context:
    """``context`` with arrays that cannot be written to."""
    return cast(Context, shown(context))
