"""The longest text by a configuration, right and wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from moeroute.models import find_model, published
from moeroute.positions import longest_text
from moeroute.schema import TraceError


@pytest.mark.parametrize(
    ("limit", "rope", "longest"),
    [
        (4096, None, 4096),
        (4096, {}, 4096),
        (None, {"original_max_position_embeddings": 4096, "factor": 2.0}, None),
        (4096, {"original_max_position_embeddings": 4096, "factor": 4.0}, 16384),
        (16384, {"original_max_position_embeddings": 4096, "factor": 4.0}, 16384),
        # one for each kind of layer, as in configurations of Gemma
        (4096, {"full": {"original_max_position_embeddings": 4096, "factor": 8}, "n": 1}, 32768),
    ],
)
def test_positions_may_be_stretched(limit: int | None, rope: Any, longest: int | None) -> None:
    assert longest_text(limit, rope, "a model") == longest


@pytest.mark.parametrize(
    "rope",
    [
        [1, 2],
        "yarn",
        7,
        {"original_max_position_embeddings": "4096"},
        {"original_max_position_embeddings": [4096]},
        {"original_max_position_embeddings": 4096, "factor": "4"},
        {"original_max_position_embeddings": 4096, "factor": math.nan},
        {"original_max_position_embeddings": 4096, "factor": math.inf},
        {"original_max_position_embeddings": 4096, "factor": -2},
        {"original_max_position_embeddings": 10**400, "factor": 2.0},
    ],
)
def test_stretching_by_what_is_no_number_is_refused(rope: Any, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"^a model: .*RoPE") as refused:
        longest_text(4096, rope, "a model")
    assert len(str(refused.value)) < 200
    config = dict(published()["mixtral-8x7b"]) | {"rope_scaling": rope}
    config.pop("rope_parameters", None)
    config["max_position_embeddings"] = 4096
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(TraceError, match="RoPE"):
        find_model(str(path))
