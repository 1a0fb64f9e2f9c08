"""Errors of a policy's own code, told in one line: which hook, where in its file, at which step."""

from __future__ import annotations

import inspect
import traceback
from types import FunctionType, TracebackType
from typing import Any

from moepolicy.kinds import WrongAnswer
from moepolicy.policy import HOOKS, Policy, PolicyError, PolicyFailed, PolicyUsageError

MISTAKES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What an author's mistake may look like outside the author's own lines; an AssertionError is
ours."""

# The function of the state machine that takes an answer, the name it has there, and whose it is.
_ANSWERS = {
    "take_from": ("victim", "victim", "one of the candidates, or -1 to decline"),
    "_given_up": ("victim", "victim", "one of the candidates, or -1 to decline"),
    "_retain": ("", "retain", "one of the candidates, or -1 to decline"),
    "_queue_prefetches": ("n", "prefetch", "how many keys it wrote into the array it is given"),
    "settle": ("answer", "on_miss", "LOAD, COMPUTE, LOW, SUBSTITUTE or SKIP"),
    "_find_substitute": ("chosen", "substitute", "one of the candidates, or -1 to decline"),
    "drop_low_copies": ("answer", "precision", "LOW or LOAD"),
    "_check_choice": ("chosen", "route", "distinct experts of the layer, from 0 on"),
}


def broken(name: str, policy: type[Policy], error: Exception, step: int | None = None) -> Exception:
    """What to raise for ``error``, which came while the policy ``name`` was run.

    A PolicyFailed that names hook, line and step where the policy's code raised or gave a wrong
    answer. ``error`` itself where it cannot be the policy's fault.
    """
    files = files_of(policy)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename in files]
    at = [] if step is None else [f"step {step}"]
    if own:
        line = f"{own[-1].filename}:{own[-1].lineno}"
        where = ", ".join([own[0].name, *at, line])
        hint = f"; {need}" if (need := undeclared(policy)) else ""
        return PolicyFailed(f"policy '{name}' failed: {told(error)} ({where}){hint}")
    if not isinstance(error, MISTAKES) or isinstance(error, PolicyError):
        return error
    answer = _answer(error.__traceback__)
    if answer is None:
        said = str(error) if isinstance(error, WrongAnswer) else told(error)
    else:
        hook, given, wanted = answer
        method = getattr(policy, hook, None)
        if isinstance(method, FunctionType):
            at.append(f"{method.__code__.co_filename}:{method.__code__.co_firstlineno}")
        said = f"{hook} answered {given}, and must answer {wanted}"
        if isinstance(error, WrongAnswer):
            # What take_from complains of as the victim may be what retain answered.
            said = f"{hook} {str(error).partition(' ')[2]}: it answered {given}"
            said += "" if ": put " in said else f", and must answer {wanted}"
    where = f" ({', '.join(at)})" if at else ""
    return PolicyFailed(f"policy '{name}' failed: {said}{where}")


def is_failure(error: Exception) -> bool:
    """Whether ``error``, a PolicyError or another, is of a policy whose own code failed when the
    policy was made or run, or that was given a parameter it cannot have; not of what the policy
    needs and does not get."""
    if isinstance(error, PolicyUsageError):
        return True
    return isinstance(error, PolicyError) and error.__cause__ is not None


def files_of(policy: type[Policy]) -> frozenset[str]:
    """Where the code of a policy's class lies, of those it is derived from and made of."""
    own = [cls for cls in policy.__mro__ if cls is not Policy and issubclass(cls, Policy)]
    functions = [f for cls in own for f in vars(cls).values() if inspect.isfunction(f)]
    files = frozenset(function.__code__.co_filename for function in functions)
    return files.union(*map(files_of, policy.made_of))


# What a policy must require for a step's field to hold something.
_NEED_OF = {"predicted": "predictions", "logits": "logits", "token_ids": "tokens"}


def undeclared(policy: type[Policy]) -> str:
    """What the policy's own code reads of steps and its class does not require, in words; or "".

    Such a field is there, and empty. A field of the policy's own of that name is taken for the
    step's: this is a hint for where something failed, no judgement.
    """
    own = [cls for cls in policy.__mro__ if cls is not Policy and issubclass(cls, Policy)]
    methods = [each for cls in own for each in vars(cls).values() if inspect.isfunction(each)]
    names = set().union(*(method.__code__.co_names for method in methods))
    for field, need in _NEED_OF.items():
        if field in names and need not in policy.requires:
            wanted = ", ".join(f'"{each}"' for each in sorted({*policy.requires, need}))
            return f"step.{field} is empty unless the class has requires = frozenset({{{wanted}}})"
    return ""


def told(error: BaseException) -> str:
    """An error's class and what it says, as far as its own code can say it."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _answer(trace: TracebackType | None) -> tuple[str, str, str] | None:
    """The hook whose answer the state machine stumbled on, the answer, and what it may be."""
    found = None
    retaining = False
    while trace is not None:
        frame = trace.tb_frame
        code = frame.f_code
        if code.co_name in _ANSWERS and frame.f_globals.get("__package__") == "moepolicy":
            local, hook, wanted = _ANSWERS[code.co_name]
            retaining = retaining or hook == "retain"
            if local in frame.f_locals:
                hook = "retain" if retaining and local == "victim" else hook
                found = hook, _shown(frame.f_locals, local), wanted
        trace = trace.tb_next
    return found


def _shown(names: dict[str, Any], local: str) -> str:
    value = names[local]
    if local == "n" and "key" in names:  # the count was right, a key was not
        value = names["key"]
    if hasattr(value, "tolist"):
        value = value.tolist()  # an array of one entry stays a list: it is no number
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


assert all(hook in HOOKS for _, hook, _ in _ANSWERS.values())
