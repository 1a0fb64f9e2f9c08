"""The length of text that a model was made for, by its configuration."""

from __future__ import annotations

from collections.abc import Mapping

from moeroute.schema import TraceError

MOST = 1 << 53
"""More positions than any text has, which a float counts exactly."""


def longest_text(limit: object, rope: object, name: str) -> int | None:
    """Tokens of the longest text; None where a configuration does not say.

    ``limit`` is its ``max_position_embeddings``, ``rope`` its ``rope_parameters`` or
    ``rope_scaling``: an object, or one of an object for each kind of layer. Positions may be
    stretched beyond those that were trained first. Some configurations give the longest text after
    stretching; others give the longest text before stretching, and the factor.

    Raises TraceError, which names the configuration by ``name``, where ``rope`` stretches by what
    is no number.
    """
    if not isinstance(limit, int) or limit < 1:
        return None
    if not rope:
        return limit
    if not isinstance(rope, Mapping):
        raise TraceError(f"{name}: the parameters of RoPE are {str(rope)[:60]!r}, not an object")
    kinds = [rope, *(each for each in rope.values() if isinstance(each, Mapping))]
    return max([limit, *(_stretched(kind, name) for kind in kinds)])


def _stretched(kind: Mapping[str, object], name: str) -> int:
    """Positions after stretching; 0 where there is none."""
    before = _number(kind, "original_max_position_embeddings", 0, name)
    return round(before * _number(kind, "factor", 1, name))


def _number(kind: Mapping[str, object], field: str, default: int, name: str) -> float:
    value = kind.get(field) or default
    if not isinstance(value, int | float) or not 0 <= value <= MOST:  # as NaN is not, either
        raise TraceError(f"{name}: {field} of RoPE is {str(value)[:60]!r}, not a number above 0")
    return value
