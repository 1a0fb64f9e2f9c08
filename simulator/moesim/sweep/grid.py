"""The grid of a sweep: which values each axis takes, from flags, a TOML file or both.

A TOML grid has these entries, all optional but ``policies``; one value may stand for a list::

    policies = ["lru", "lru-spec", "path/to/file.py:Mine"]   # specs as on the command line
    traces = ["mixtral-like", "s3://bucket/trace.parquet"]   # samples, files, URLs
    slots = [2, 4, 6]                    # experts cached per layer; or
    memory = ["4GiB", "8GiB"]            # budgets for slots and staging together
    scopes = ["layer", "global"]
    machines = ["rtx3060", "mine.toml"]  # names or profiles
    precisions = ["2bit", "fp16"]        # of those the traces list; or
    expert_bytes = ["66.7MB", 50_000_000]
    low_precision = "2bit"               # of a second store, for policies that require one
    like = "gpt-oss-20b"                 # the model whose sizes the traces take, or numbers:
    dense_layer_bytes = 53_000_000
    dense_token_bytes = 1_160_000_000
    calibration = "tiny"                 # the trace in which policies count experts
    engine = "auto"
    cold = false                         # empty caches at the start of every sequence
    limits = true                        # in every row, what no policy can beat

    [parameters.lru-spec]                # every combination, for each policy of that name
    n = [1, 2, 3]

Paths are relative to the working directory, as on the command line.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from moepolicy import PolicySpec, find_policy
from moepolicy.amounts import NoAmountError, parse_bytes
from moepolicy.console import nearest
from moeroute.jsontext import parse_toml
from moeroute.models import find_model
from moeroute.sizes import GivenSizes

from moesim.engines.names import Engine
from moesim.errors import SimulationError, UsageError
from moesim.machine.profile import DEFAULT_MACHINE
from moesim.workload import DEFAULT_TRACE

SCOPES = ("layer", "global")
EXCLUSIVE = (("slots", "memory"), ("precisions", "expert_bytes"))
Parameters = Mapping[str, Mapping[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Grid:
    """The axes of a sweep. ``parameters`` is policy -> parameter -> values."""

    policies: tuple[str, ...] = ()
    traces: tuple[str, ...] = (DEFAULT_TRACE,)
    slots: tuple[int, ...] = ()  # without slots and memory: quarters of a layer's experts
    memory: tuple[int, ...] = ()  # bytes
    scopes: tuple[str, ...] = ("layer",)
    machines: tuple[str, ...] = (DEFAULT_MACHINE,)
    precisions: tuple[str, ...] = ()  # without these and expert_bytes: a trace's own
    expert_bytes: tuple[int, ...] = ()
    low_precision: str | None = None
    like: str | None = None
    layers: int | None = None
    attention: str | None = None
    dense_layer_bytes: int | None = None
    dense_token_bytes: int | None = None
    calibration: str | None = None
    engine: Engine = Engine.auto
    cold: bool = False
    limits: bool = True
    parameters: Parameters | None = None

    @property
    def given(self) -> GivenSizes:
        """The sizes that the grid gives for the models of its traces."""
        return GivenSizes(
            self.like,
            self.layers,
            self.attention,
            {},
            self.dense_layer_bytes,
            self.dense_token_bytes,
        )

    def specs(self) -> list[PolicySpec]:
        """Every policy with every combination of its parameters, each once.

        Raises PolicyError or SimulationError that names an unknown policy or parameter.
        """
        named = {name: find_policy(name) for name in self.policies}
        values = self.parameters or {}
        for policy in values:
            if policy not in {spec.name for spec in named.values()}:
                raise UsageError(
                    f"parameters are given for policy '{policy}', which is not in the grid; "
                    f"{nearest(policy, (spec.name for spec in named.values()))}"
                )
        specs: dict[str, PolicySpec] = {}
        for spec in named.values():
            for label in _combinations(spec, values.get(spec.name, {})):
                found = find_policy(label)
                # One class for all of a policy's points, or each would be compiled anew.
                specs[found.label] = replace(found, policy=spec.policy)
        return list(specs.values())


def _combinations(spec: PolicySpec, values: Mapping[str, tuple[str, ...]]) -> Iterable[str]:
    for name in values:
        if name in spec.parameters:
            raise UsageError(
                f"policy '{spec.label}' fixes {name}, and the grid varies it: leave one out"
            )
    for choice in product(*values.values()):
        given = {**spec.parameters, **dict(zip(values, choice, strict=True))}
        text = ",".join(f"{name}={value}" for name, value in given.items())
        yield f"{spec.name}:{text}" if given else spec.name


def load_grid(path: Path) -> dict[str, Any]:
    """The checked entries of a TOML grid. Raises SimulationError that names the file and the
    fault."""
    try:
        table = parse_toml(path.read_bytes())
    except tomllib.TOMLDecodeError as error:
        raise SimulationError(f"{path} is not a grid: {error}") from None
    known = {field.name for field in fields(Grid)}
    for entry in table:
        if entry not in known:
            raise SimulationError(f"{path}: unknown entry {entry}; {nearest(entry, known)}")
    try:
        make_grid(table)
    except SimulationError as error:
        raise SimulationError(f"{path}: {error}") from None
    return table


def merge(table: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """A file's entries, replaced by those given as flags; parameters of both are combined."""
    merged = dict(table)
    for one, other in EXCLUSIVE:
        if one in flags or other in flags:
            merged.pop(one, None)
            merged.pop(other, None)
    merged |= flags
    parameters = {name: dict(values) for name, values in table.get("parameters", {}).items()}
    for name, values in flags.get("parameters", {}).items():
        parameters.setdefault(name, {}).update(values)
    return merged | {"parameters": parameters}


def make_grid(entries: Mapping[str, Any]) -> Grid:
    """A grid from lists of values as a person writes them. Raises SimulationError, and
    TraceError for an entry ``like`` that is no model."""
    readers: dict[str, Callable[[str, Any], Any]] = {
        "slots": _count,
        "memory": _bytes,
        "expert_bytes": _size,
        "scopes": _scope,
    }
    values: dict[str, Any] = {}
    for name, value in entries.items():
        if name == "engine":
            values[name] = _engine(value)
        elif name in ("low_precision", "calibration", "like", "attention"):
            values[name] = _text(name, value)
        elif name in ("layers", "dense_layer_bytes", "dense_token_bytes"):
            values[name] = _positive(name, value)
        elif name in ("cold", "limits"):
            values[name] = _yes_or_no(name, value)
        elif name == "parameters":
            values[name] = _parameters(value)
        else:
            values[name] = _list(name, value, readers.get(name, _text))
    for one, other in EXCLUSIVE:
        if values.get(one) and values.get(other):
            raise UsageError(f"a grid has {one} or {other}, not both")
    for name in ("layers", "attention"):
        if values.get(name) and not values.get("like"):
            raise UsageError(f"{name} is of the model that like names: give like too")
    if values.get("like"):
        find_model(values["like"])
    return Grid(**values)


def _list(name: str, value: Any, read: Callable[[str, Any], Any]) -> tuple[Any, ...]:
    """The values of an axis, each once."""
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise UsageError(f"{name} is empty: leave it out or give it a value")
    return tuple(dict.fromkeys(read(name, item) for item in items))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{name}: {value!r} is not a name")
    return value


def _count(name: str, value: Any) -> int:
    number = _whole(name, value)
    if number < 0:
        raise UsageError(f"{name} is {number}: a cache has 0 slots or more")
    return number


def _size(name: str, value: Any) -> int:
    number = _bytes(name, value)
    if number <= 0:
        raise UsageError(f"{name} is {number}: an expert has 1 byte or more")
    return number


def _positive(name: str, value: Any) -> int:
    number = _whole(name, value)
    if number <= 0:
        raise UsageError(f"{name} is {number}: leave it out where it is unknown")
    return number


def _whole(name: str, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\s*", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name}: {value!r} is not a whole number")
    return value


def _bytes(name: str, value: Any) -> int:
    """Bytes from 9GiB, 500 MB, 1.5GiB or plain bytes."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(f"{name}: {value!r} is no amount of memory")
    try:
        return parse_bytes(str(value))
    except NoAmountError as error:
        raise UsageError(f"{name}: {error}") from None


def _scope(name: str, value: Any) -> str:
    if value not in SCOPES:
        raise UsageError(f"{name}: unknown scope {value!r}; {nearest(str(value), SCOPES)}")
    return str(value)


def _engine(value: Any) -> Engine:
    try:
        return Engine(value)
    except ValueError:
        raise UsageError(f"unknown engine {value!r}; {nearest(str(value), Engine)}") from None


def _yes_or_no(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name}: {value!r} is not true or false")
    return value


def _parameters(value: Any) -> dict[str, dict[str, tuple[str, ...]]]:
    if not isinstance(value, Mapping) or not all(isinstance(v, Mapping) for v in value.values()):
        raise UsageError("parameters must be tables: [parameters.policy] name = [values]")
    return {
        policy: {name: _list(f"{policy}:{name}", values, _value) for name, values in table.items()}
        for policy, table in value.items()
    }


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or value == "":
        raise UsageError(f"{name}: {value!r} is not a number or a name")
    if isinstance(value, str) and ("," in value or "=" in value):
        raise UsageError(f"{name}: {value!r} has a comma or an equals sign in it")
    return str(value).strip()


def parse_parameter(text: str) -> tuple[str, str, list[str]]:
    """Policy, parameter and values of ``policy:parameter=value,...``. Raises SimulationError."""
    policy, colon, rest = text.rpartition(":")
    name, equals, values = rest.partition("=")
    if not (colon and equals and policy and name.strip() and values.strip()):
        raise UsageError(f"'{text}' is not policy:parameter=value,value,...")
    return policy, name.strip(), [value.strip() for value in values.split(",")]
