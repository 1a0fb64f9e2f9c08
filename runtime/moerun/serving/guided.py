"""Answers that follow a grammar, where a request's `response_format` or `tool_choice` asks for it:
llguidance says which tokens a grammar has place for, after each token of the answer.

The package is optional (extra [guided]). https://github.com/guidance-ai/llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers import LogitsProcessor

from moerun.serving.fields import shown, unsupported, wrong

ANY_OBJECT = {"type": "object"}
FIELD = "response_format"
BLANKS = r"[ \n]{0,8}"  # between two parts: a weak model would write blanks to its last token


def schema_of(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    """The JSON schema that an answer is to follow; None: any text will do. Raises ApiError."""
    if response_format is None:
        return None
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        raise wrong(f"{FIELD}.type", '"text", "json_object" or "json_schema"', kind)
    described = response_format.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        raise wrong(f"{FIELD}.json_schema.schema", "a JSON schema", schema)
    return schema


class Grammars:
    """Constraints for one model's answers. Making one may take a second the first time."""

    def __init__(self, tokenizer: Any, n_tokens: int, ends: Sequence[int]) -> None:
        """``n_tokens``: the width of the logits; ``ends``: tokens that end an answer."""
        self._tokenizer = tokenizer
        self._n_tokens = n_tokens
        self._ends = list(ends)
        self._known: Any = None  # llguidance's own form of the tokenizer

    def of_schema(self, schema: dict[str, Any]) -> str:
        """llguidance's form of a JSON schema. Raises ApiError."""
        _need_package(FIELD)
        from llguidance import LLMatcher

        try:
            grammar: str = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": BLANKS}
            )
        except ValueError as error:
            raise unsupported(FIELD, f"cannot be kept to: {error}") from error
        return grammar

    def constraint(self, grammar: str, prompt_tokens: int, field: str) -> LogitsProcessor:
        """Forbids the tokens that would lead away from a ``grammar`` of llguidance, which the
        request's ``field`` asks for. Raises ApiError."""
        _need_package(field)
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens(field), grammar)
        if matcher.is_error():
            raise unsupported(field, f"cannot be kept to: {shown(matcher.get_error())}")
        return GrammarConstraint(matcher, self._n_tokens, prompt_tokens)

    def _tokens(self, field: str) -> Any:
        if self._known is None:
            from llguidance.hf import from_tokenizer

            if not self._ends:
                raise unsupported(field, "needs a token that ends an answer; this model has none")
            try:
                self._known = from_tokenizer(self._tokenizer, self._n_tokens, self._ends)
            except ValueError as error:
                raise unsupported(field, f"is not for this tokenizer: {error}") from error
        return self._known


def _need_package(field: str) -> None:
    if find_spec("llguidance") is None:
        raise unsupported(
            field,
            "needs the package llguidance, which the server does not have: "
            "pip install 'moe-offload-lab[guided]'",
        )


class GrammarConstraint(LogitsProcessor):  # type: ignore[misc]
    """Follows one answer, token by token, with a matcher of llguidance."""

    def __init__(self, matcher: Any, n_tokens: int, prompt_tokens: int) -> None:
        self._matcher = matcher
        self._mask = torch.zeros((n_tokens + 31) // 32, dtype=torch.int32)
        self._bits = torch.arange(32, dtype=torch.int32)
        self._seen = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores [1, vocabulary] with those of tokens that have no place at -inf."""
        fresh = input_ids[0, self._seen :].tolist()
        self._seen += len(fresh)
        if fresh and not self._matcher.is_stopped():
            self._matcher.consume_tokens(fresh)
        size_bytes = self._mask.numel() * self._mask.element_size()
        self._matcher.unsafe_compute_mask_ptr(self._mask.data_ptr(), size_bytes)
        allowed = ((self._mask[:, None] >> self._bits) & 1).bool().reshape(-1)
        return scores.masked_fill(~allowed[: scores.shape[-1]].to(scores.device), float("-inf"))
