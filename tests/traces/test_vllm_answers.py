"""vLLM's answers: where chats and completions have the tokens' ids, and how long the prompt is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from moeroute import DECODE, PROMPT
from moeroute.importers import ImportOptions, import_foreign

PROMPT_IDS, ANSWER_IDS = [11, 12, 13], [21, 22]


def answer(**top: Any) -> dict[str, Any]:
    """A request of three prompt tokens and two of its answer, over two layers, top-2."""
    routed = [[[token % 4, (token + 1) % 4], [3, 0]] for token in range(5)]
    choice = {"routed_experts": routed, "token_ids": ANSWER_IDS}
    choice |= {name: top.pop(name) for name in ("prompt_token_ids",) if top.pop("inside", False)}
    return {"model": "m", "choices": [choice], **top}


@pytest.mark.parametrize(
    "where",
    [
        {"prompt_token_ids": PROMPT_IDS},
        {"prompt_token_ids": PROMPT_IDS, "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
        {
            "inside": True,
            "prompt_token_ids": PROMPT_IDS,
            "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        },
    ],
)
def test_ids_and_phases_of_chats_and_completions(tmp_path: Path, where: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(answer(**where)))
    told: list[str] = []
    trace = import_foreign(
        path, tmp_path / "t.parquet", tell=told.append, options=ImportOptions(prompt_tokens=1)
    )
    rows = trace.arrays("token_id", "phase", "layer", start=0, stop=trace.n_rows)
    first = rows["layer"] == 0
    assert rows["token_id"][first].tolist() == PROMPT_IDS + ANSWER_IDS
    assert rows["phase"][first].tolist() == [PROMPT] * 3 + [DECODE] * 2
    assert any(line.startswith("prompt_tokens: not used") for line in told), told
