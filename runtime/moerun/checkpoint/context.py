"""The length of text that a model was made for."""

from __future__ import annotations

from typing import Any

from moeroute.positions import longest_text


def context_limit(config: Any) -> int | None:
    """Tokens of the longest text, by a model's configuration; None where it does not say.

    Raises TraceError where its positions are stretched by what is no number.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    return longest_text(limit, getattr(text, "rope_parameters", None), text.model_type)
