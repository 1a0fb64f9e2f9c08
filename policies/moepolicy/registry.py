"""Policies by name: the built-in ones, other packages' (entry points), and classes in a file.

A spec is ``name``, ``name:parameter=value,...`` or ``path/to/file.py:Class[:parameter=value,...]``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import linecache
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from moepolicy.answers import AdapmoeSkip, EmoeSubstitute, Hobbit
from moepolicy.blame import broken
from moepolicy.clairvoyant import Belady, BeladyBypass, Clairvoyant
from moepolicy.console import nearest
from moepolicy.eviction import Fiddler, Fifo, Lfu, Lru, Random, Static
from moepolicy.frequency import ClassLru, LeastStale, Lfru, LfuAging
from moepolicy.interface import accepted, check_class, required
from moepolicy.policy import NEEDS, Context, Policy, PolicyError, PolicyUsageError
from moepolicy.queues import Arc, S3Fifo, Slru, TwoQ
from moepolicy.scan import Clock, Sieve
from moepolicy.speculation import LruSpec

ENTRY_POINTS = "moe.policies"

BUILT_IN: dict[str, type[Policy]] = {
    "lru": Lru,
    "lfu": Lfu,
    "fifo": Fifo,
    "clock": Clock,
    "sieve": Sieve,
    "slru": Slru,
    "2q": TwoQ,
    "s3-fifo": S3Fifo,
    "arc": Arc,
    "lfu-aging": LfuAging,
    "lfru": Lfru,
    "least-stale": LeastStale,
    "class-lru": ClassLru,
    "random": Random,
    "static": Static,
    "fiddler": Fiddler,
    "hobbit": Hobbit,
    "adapmoe-skip": AdapmoeSkip,
    "emoe-substitute": EmoeSubstitute,
    "belady": Belady,
    "belady-bypass": BeladyBypass,
    "clairvoyant": Clairvoyant,
    "lru-spec": LruSpec,
}


@dataclass(frozen=True)
class PolicySpec:
    """A policy that has been found but not made: its class and parameters."""

    name: str
    policy: type[Policy]
    parameters: dict[str, int | float | str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The spec as typed on a command line."""
        if not self.parameters:
            return self.name
        return f"{self.name}:" + ",".join(f"{k}={v}" for k, v in self.parameters.items())

    @property
    def requires(self) -> frozenset[str]:
        """What the policy needs of its context and its steps, by name."""
        return self.policy.requires

    @property
    def horizon(self) -> int:
        """How many layers ahead it reads predictions: its parameter ``horizon``, if it has one, or
        what its class declares; 0 where it reads none."""
        if "predictions" not in self.requires:
            return 0
        parameter = accepted(self.policy).get("horizon")
        default = self.policy.horizon if parameter is None else parameter.default
        return int(self.parameters.get("horizon", default))

    def build(self, context: Context) -> Policy:
        """A fresh policy for one cache, given what it requires of ``context`` and no more.

        PolicyError where its parameters do not fit, or ``context`` lacks what it requires.
        """
        try:
            made = self.policy(self._given(context), **self.parameters)
        except PolicyError:
            raise
        except Exception as error:
            found = broken(self.label, self.policy, error)
            said = str(found).partition(" failed: ")[2] or f"{type(error).__name__}: {error}"
            raise PolicyError(f"policy '{self.label}' could not be made: {said}") from error
        if not isinstance(made.staging, int):
            raise PolicyError(
                f"policy '{self.label}': staging must be a whole number, not {made.staging!r}"
            )
        return made

    def _given(self, context: Context) -> Context:
        fields = {"counts": ("counts",), "future": ("next_use", "offsets", "demands")}
        for need, names in fields.items():
            if need not in self.requires:
                nothing: dict[str, Any] = dict.fromkeys(names)
                context = context._replace(**nothing)
            elif getattr(context, names[0]) is None:
                raise PolicyError(f"policy '{self.label}' needs {NEEDS[need]}")
        return context


def find_policy(spec: str) -> PolicySpec:
    """Look a spec up: ``name``, ``name:parameter=value,...`` or ``path/to/file.py:Class``.

    Raises PolicyError where there is no such policy or file, with the nearest name, and
    PolicyUsageError for a parameter that the policy does not have or take.
    """
    name, _, rest = _split(spec)
    if name.endswith(".py"):
        raise PolicyUsageError(_which_class(Path(name)))
    cls = _from_file(name) if ".py:" in name else _by_name(name)
    parameters = _parameters(spec, rest)
    known = accepted(cls)
    free = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls).parameters.values())
    for key, value in parameters.items():
        if key in known:
            parameters[key] = _fitting(name, key, value, known[key].default)
        elif not free:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise PolicyUsageError(f"policy '{name}' has no parameter '{key}': {has}")
    if missing := [key for key in required(cls) if key not in parameters]:
        given = ",".join(f"{key}=VALUE" for key in missing)
        raise PolicyUsageError(f"policy '{name}' needs {', '.join(missing)}: give {name}:{given}")
    return PolicySpec(name, cls, parameters)


def policy_names() -> dict[str, str]:
    """Every policy's name, with the first line of its docstring."""
    return {name: _summary(cls) for name, cls in {**BUILT_IN, **_installed()}.items()}


def _summary(cls: type[Policy]) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def _split(spec: str) -> tuple[str, str, str]:
    head, mark, tail = spec.partition(".py:")
    if not mark:
        return spec.partition(":")
    cls, colon, rest = tail.partition(":")
    return f"{head}.py:{cls}", colon, rest


def _by_name(name: str) -> type[Policy]:
    if name in BUILT_IN:
        return BUILT_IN[name]
    installed = _installed()
    if name not in installed:
        raise PolicyUsageError(
            f"unknown policy '{name}'; {nearest(name, [*BUILT_IN, *installed])}; "
            "or a class of your own as path/to/file.py:Class"
        )
    return installed[name]


def _installed() -> dict[str, type[Policy]]:
    found = {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            found[entry.name] = _as_policy(entry.load(), entry.name)
        except (ImportError, AttributeError) as error:
            raise PolicyError(f"policy '{entry.name}' ({entry.value}): {error}") from error
    return found


def _from_file(name: str) -> type[Policy]:
    path_text, _, cls_name = name.rpartition(":")
    path = Path(path_text)
    module = _load(path)
    if not hasattr(module, cls_name):
        classes = _policy_classes(module)
        raise PolicyUsageError(f"{path} has no class '{cls_name}'; {nearest(cls_name, classes)}")
    return _as_policy(getattr(module, cls_name), name)


def _which_class(path: Path) -> str:
    """What to say of a file that was given without a class."""
    classes = _policy_classes(_load(path))
    if not classes:
        return f"{path} has no policy: derive a class from moepolicy.Policy"
    return f"{path} needs a class, as {path}:{classes[0]}; it has: {', '.join(classes)}"


def _policy_classes(module: ModuleType) -> list[str]:
    return [n for n, c in vars(module).items() if _is_policy(c) and c.__module__ == module.__name__]


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise PolicyError(f"no policy file {path}")
    module_spec = importlib.util.spec_from_file_location(f"moe_policy_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise PolicyError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise PolicyError(f"{path} does not load: {type(error).__name__}: {error}") from error
    # Kept, as a worker may have the file only while it loads it; compiling looks at the source.
    source = path.read_text(encoding="utf-8")
    linecache.cache[str(path)] = len(source), None, source.splitlines(keepends=True), str(path)
    return module


def _is_policy(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Policy)


def _as_policy(value: Any, where: str) -> type[Policy]:
    if not isinstance(value, type):
        raise PolicyError(
            f"{where} is not a class, but a {type(value).__name__}: a policy is a class derived "
            "from moepolicy.Policy"
        )
    if not issubclass(value, Policy) or value is Policy:
        raise PolicyError(f"{where} is not a policy: derive its class from moepolicy.Policy")
    check_class(where, value)
    return value


def _parameters(spec: str, text: str) -> dict[str, Any]:
    """Each as it is written."""
    parameters: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals:
            raise PolicyUsageError(f"policy '{spec}': '{part}' is not parameter=value")
        if key in parameters:
            raise PolicyUsageError(f"policy '{spec}' gives '{key}' twice")
        parameters[key] = value.strip()
    return parameters


def _fitting(name: str, key: str, text: str, default: Any) -> int | float | str:
    """A parameter's value, of the type that its ``default`` has."""
    if isinstance(default, bool):
        if text.lower() not in TRUTH:
            raise PolicyUsageError(f"policy '{name}': {key} must be true or false, not '{text}'")
        return TRUTH[text.lower()]
    if isinstance(default, str):
        return text
    value = _number(text)
    if type(default) in (int, float) and (isinstance(value, str) or math.isnan(value)):
        raise PolicyUsageError(f"policy '{name}': {key} must be a number, not '{text}'")
    if type(default) is int and isinstance(value, float):
        raise PolicyUsageError(f"policy '{name}': {key} must be a whole number, not {text}")
    return value


TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
