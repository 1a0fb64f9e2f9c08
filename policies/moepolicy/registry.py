"""Policies by name: the built-in ones, other packages' (entry points), and classes in a file.

A spec is ``name``, ``name:parameter=value,...`` or ``path/to/file.py:Class[:parameter=value,...]``.
Parameters may stand in parentheses, too: ``name(parameter=value,...)``. Of such are made:

    lru+gate(n=2)+hobbit.misses             a part for each aspect; ``.misses`` takes that of one
    adaptive(lru-spec,lru,when=late>0.2,window=256)      the second while the condition holds
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import linecache
import math
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from moepolicy.aspects import ASPECTS
from moepolicy.blame import told
from moepolicy.composition import Condition, adapt, compose, restrict
from moepolicy.console import nearest
from moepolicy.fitted import PARAMETER
from moepolicy.guard import no_quitting
from moepolicy.interface import accepted, check_class, required
from moepolicy.library import BUILT_IN, PARTS
from moepolicy.near import meant
from moepolicy.overdue import Watch
from moepolicy.policy import Policy, PolicyError, PolicyUsageError
from moepolicy.spec import PolicySpec

ENTRY_POINTS = "moe.policies"
ADAPTIVE = "adaptive"
LISTED_BY = "moesim policies` or `moerun policies"
FILE_MODULE = "moe_policy_"  # how the module of a file's policies begins


def find_policy(spec: str) -> PolicySpec:
    """Look a spec up: ``name``, ``name:parameter=value,...`` or ``path/to/file.py:Class``.

    Also ``a+b`` and ``adaptive(a,b,when=...)`` of such (see `moepolicy.composition`). Raises
    PolicyError where there is no such policy or file, with the nearest name, and PolicyUsageError
    for a parameter that the policy does not have or take.
    """
    if spec.count("(") != spec.count(")"):
        raise PolicyUsageError(f"policy '{spec}': a parenthesis is open or closed too many")
    terms = [term.strip() for term in separated(spec, "+")]
    if not all(terms):
        raise PolicyUsageError(f"policy '{spec}': give a name on each side of a +, lru+gate")
    if len(terms) > 1:
        return compose([_find(term, part=True) for term in terms])
    return _find(spec)


def _find(spec: str, *, part: bool = False) -> PolicySpec:
    """A spec without a plus; ``part``: of a composition."""
    inner = in_parentheses(spec)
    if inner is not None and inner[0] == ADAPTIVE:
        return _find_adaptive(inner[1])
    if inner is not None:
        spec = ":".join(inner) if inner[1] else inner[0]
    name, _, rest = _split(spec)
    whole, dot, aspect = name.rpartition(".")
    if dot and aspect not in ASPECTS and whole in {*BUILT_IN, *PARTS}:
        raise PolicyUsageError(
            f"policy '{name}': no aspect '{aspect}'; {nearest(aspect, list(ASPECTS))}"
        )
    name, aspect = (whole, aspect) if aspect in ASPECTS else (name, "")
    found = _find_plain(name, rest, part=part and not aspect)
    return restrict(found, aspect) if aspect else found


def _find_adaptive(text: str) -> PolicySpec:
    terms = separated(text, ",")
    given = [term for term in terms if term.partition("=")[0].strip() in ("when", "window")]
    parameters = _parameters(f"{ADAPTIVE}({text})", ",".join(given))
    if "when" not in parameters:
        raise PolicyUsageError(f"adaptive({text}) does not say when: add when=late>0.2, say")
    window = parameters.get("window", "256")
    if not window.isdecimal():
        raise PolicyUsageError(f"adaptive: window must be a number of steps, not '{window}'")
    condition = Condition.read(parameters["when"], int(window))
    policies = [find_policy(term.strip()) for term in terms if term not in given]
    return adapt(policies, condition, parameters)


def _find_plain(name: str, rest: str, *, part: bool) -> PolicySpec:
    if name.endswith(".py"):
        raise PolicyUsageError(_which_class(Path(name)))
    cls = _from_file(name, part=part) if ".py:" in name else _by_name(name, part=part)
    parameters = _parameters(name, rest)
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
    found = PolicySpec(name, cls, parameters)
    if PARAMETER in parameters and not found.fits:
        raise PolicyUsageError(f"policy '{name}' has no fit, and takes no params file")
    return found


def policy_names() -> dict[str, str]:
    """Every policy's name, with the first line of its docstring."""
    return {name: _summary(cls) for name, cls in policy_classes().items()}


def policy_classes() -> dict[str, type[Policy]]:
    """Every policy's class by its name, the built-in ones first.

    Raises PolicyError where an installed one does not load.
    """
    return {**BUILT_IN, **_installed()}


def _summary(cls: type[Policy]) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def separated(spec: str, mark: str) -> list[str]:
    """The terms of ``spec`` between marks that stand in no parentheses and no file's path."""
    terms, depth, begin = [], 0, 0
    path_end = spec.find(".py:")
    in_path = path_end if path_end > 0 and Path(spec[: path_end + 3]).is_file() else -1
    for i, character in enumerate(spec):
        depth += (character == "(") - (character == ")")
        if character == mark and depth == 0 and i > in_path:
            terms.append(spec[begin:i])
            begin = i + 1
    return [*terms, spec[begin:]]


def in_parentheses(spec: str) -> tuple[str, str] | None:
    """The name and what its parentheses hold, of ``name(...)``; None of anything else."""
    name, found, inner = spec.partition("(")
    return (name, inner[:-1]) if found and spec.endswith(")") else None


def _split(spec: str) -> tuple[str, str, str]:
    head, mark, tail = spec.partition(".py:")
    if not mark:
        return spec.partition(":")
    cls, colon, rest = tail.partition(":")
    return f"{head}.py:{cls}", colon, rest


def _by_name(name: str, *, part: bool) -> type[Policy]:
    if part and name in PARTS:
        return PARTS[name]
    if name in PARTS:
        raise PolicyUsageError(f"'{name}' is a part of a policy: give it after another, lru+{name}")
    if name in BUILT_IN:
        return BUILT_IN[name]
    installed = _installed()
    if name not in installed:
        file = Path(f"{name.partition('.')[0]}.py")
        if name and file.is_file():  # the suffix was left out
            raise PolicyUsageError(f"unknown policy '{name}'; {_which_class(file)}")
        known = [*BUILT_IN, *installed, *(PARTS if part else ())]
        raise PolicyUsageError(
            f"unknown policy '{name}'; {nearest(name, known, LISTED_BY)}; "
            "or give a class of your own as path/to/file.py:Class"
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


def _from_file(name: str, *, part: bool) -> type[Policy]:
    path_text, _, cls_name = name.rpartition(":")
    path = Path(path_text)
    module = _load(path)
    if not hasattr(module, cls_name):
        classes = _policy_classes(module)
        raise PolicyUsageError(f"{path} has no class '{cls_name}'; {nearest(cls_name, classes)}")
    return _as_policy(getattr(module, cls_name), name, part=part)


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
        beside = (file.name for file in path.parent.glob("*.py"))
        raise PolicyError(f"no policy file {path}; {meant(path.name, beside)}".rstrip(" ;"))
    module_spec = importlib.util.spec_from_file_location(f"{FILE_MODULE}{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise PolicyError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        # Without Python's cache of bytecode, which takes two versions of one size and second for
        # the same, and would lie next to the author's file.
        loader = SourceFileLoader(module.__name__, str(path))
        data = loader.get_data(str(path))
        code = loader.source_to_code(data, str(path))
        with no_quitting(), Watch(f"loading {path}", lambda: frozenset([str(path)])):
            exec(code, vars(module))
    except Exception as error:
        raise PolicyError(f"{path} does not load: {told(error)}") from error
    # Kept, as a worker may have the file only while it loads it; compiling looks at the source.
    source = importlib.util.decode_source(data)
    linecache.cache[str(path)] = len(source), None, source.splitlines(keepends=True), str(path)
    return module


def _is_policy(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Policy)


def _as_policy(value: Any, where: str, *, part: bool = False) -> type[Policy]:
    if not isinstance(value, type):
        raise PolicyError(
            f"{where} is not a class, but a {type(value).__name__}: a policy is a class derived "
            "from moepolicy.Policy"
        )
    if not issubclass(value, Policy) or value is Policy:
        raise PolicyError(f"{where} is not a policy: derive its class from moepolicy.Policy")
    check_class(where, value, part=part)
    return value


def _parameters(spec: str, text: str) -> dict[str, Any]:
    """Each as it is written."""
    parameters: dict[str, Any] = {}
    for part in filter(str.strip, text.split(",")):
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
