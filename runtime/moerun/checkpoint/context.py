"""The length of text that a model was made for."""

from __future__ import annotations

from typing import Any


def context_limit(config: Any) -> int | None:
    """Tokens of the longest text, by a model's configuration; None where it does not say.

    Positions may be stretched beyond those that were trained first. Some configurations give the
    longest text after stretching; others give the longest text before stretching, and the factor.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not limit:
        return None
    rotary = getattr(text, "rope_parameters", None) or {}
    kinds = [rotary, *(each for each in rotary.values() if isinstance(each, dict))]  # one a layer's
    stretched = [
        kind["original_max_position_embeddings"] * (kind.get("factor") or 1)
        for kind in kinds
        if kind.get("original_max_position_embeddings")
    ]
    longest: int = max([limit, *map(round, stretched)])
    return longest
