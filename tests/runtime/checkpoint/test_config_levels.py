"""What is read from a configuration is read where the text model's is, nested or not."""

from __future__ import annotations

from typing import Any

import pytest
from moerun.bench.models import _cut
from moerun.checkpoint.context import context_limit
from moerun.checkpoint.families import shared_experts_of, top_k_of, vocabulary_of
from support.moe_models import small_config

ROTARY = {"rope_theta": 10000.0, "rope_type": "yarn"}


def nested(**text: Any) -> Any:
    """The configuration of a model of text and images."""
    from transformers import Qwen3VLMoeConfig

    return Qwen3VLMoeConfig(text_config={"num_hidden_layers": 4, **text})


def test_a_nested_configuration_is_read_at_the_level_of_text() -> None:
    config = nested(num_experts_per_tok=5, vocab_size=1000, max_position_embeddings=777)
    assert not hasattr(config, "num_experts_per_tok")
    assert top_k_of(config) == 5
    assert shared_experts_of(config) == 0
    assert context_limit(config) == 777
    assert vocabulary_of(config) == 1000
    shared = small_config("qwen2_moe", shared_expert_intermediate_size=32)
    config.get_text_config = lambda **_: shared
    assert shared_experts_of(config) == 1


def test_layers_are_cut_at_the_level_of_text() -> None:
    config = small_config("gpt_oss", layer_types=["sliding_attention", "full_attention"] * 2)
    _cut(config.get_text_config(), 3)
    assert (config.num_hidden_layers, len(config.layer_types)) == (3, 3)


@pytest.mark.parametrize(
    ("given", "rotary", "limit"),
    [
        (4096, None, 4096),
        # The longest text before stretching, as in configurations of Qwen.
        (4096, {"factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        # And after it, as in those of DeepSeek and gpt-oss.
        (16384, {"factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        (131072, {"factor": 8.0, "original_max_position_embeddings": 8192}, 131072),
    ],
)
def test_the_longest_text_is_that_of_stretched_positions(
    given: int, rotary: dict[str, Any] | None, limit: int
) -> None:
    stretched = {"rope_parameters": {**ROTARY, **rotary}} if rotary else {}
    config = small_config("qwen3_moe", max_position_embeddings=given, **stretched)
    assert context_limit(config) == limit


def test_a_configuration_that_does_not_say_has_no_limit() -> None:
    from transformers import PreTrainedConfig

    assert context_limit(PreTrainedConfig()) is None
