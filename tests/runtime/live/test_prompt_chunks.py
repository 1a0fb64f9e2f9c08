"""A prompt that is read some tokens at a time: the same text, in less memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from moepolicy import find_policy
from moeroute import open_trace
from moerun.bench.generated import GeneratedModel, GeneratedStore
from moerun.bench.models import find_config
from moerun.bench.shapes import find_shape
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.live.recording import LiveRecording
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.live.work import Generated
from moerun.memory.fit import plan_memory
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from moesim import load_workload
from moesim.machine.profile import Compute, LinkProfile, Machine
from moesim.simulation import simulate

CHUNK = 16
PROMPT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3
MACHINE = Machine("m", "", "measured", LinkProfile(1e8, 1e-5), Compute(1e-4, 1e-4))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return pack(resolve("tiny"), tmp_path_factory.mktemp("stores") / "tiny", precision="fp32")


def said(store: ExpertStore, settings: Settings, trace: Path | None = None) -> Generated:
    with Runner(store, settings) as runner:
        recording = LiveRecording(runner, trace, None, None)
        found = runner.generation().run(runner.encode(PROMPT), Sampling(max_new_tokens=12))
        runner.session.settle()
        recording.finish()
        return found


def test_a_prompt_in_chunks_gives_the_same_text(tiny: ExpertStore, tmp_path: Path) -> None:
    whole = said(tiny, Settings(find_policy("lru"), slots=3))
    chunked = Settings(find_policy("lru"), slots=3, prompt_chunk=CHUNK)
    found = said(tiny, chunked, tmp_path / "t.parquet")
    assert found.token_ids == whole.token_ids
    assert found.prompt_tokens == whole.prompt_tokens > 3 * CHUNK
    assert found.totals.loads > whole.totals.loads  # each chunk has its own
    trace = open_trace(tmp_path / "t.parquet")
    workload = load_workload(trace)
    passes = -(-found.prompt_tokens // CHUNK) + len(found.token_ids) - 1
    assert workload.n_steps == passes * trace.meta.n_layers
    again = simulate(workload, chunked.policy, MACHINE, slots=3, expert_bytes=4096)
    totals = found.totals
    assert (again.hits, again.misses, again.loads) == (totals.hits, totals.misses, totals.loads)


def test_chunks_leave_memory_to_experts() -> None:
    """gpt-oss holds the scores of a whole prompt, token by token: 12 GiB at 4,096 tokens."""
    shape = find_shape("gpt-oss-20b")
    model = GeneratedModel(find_config(shape), name="gpt-oss-20b", precision="4bit", seed=0)
    store = GeneratedStore(model, held=False)

    def workspace(chunk: int | None) -> int:
        settings = Settings(
            find_policy("lru"),
            slots=4,
            context_tokens=4096,
            prompt_chunk=chunk,
            device=torch.device("cuda"),
        )
        return plan_memory(store, settings).needs.workspace_bytes

    assert workspace(None) > 12 * 2**30
    assert workspace(256) < 1.5 * 2**30
    assert workspace(4095) == workspace(None)


def test_where_a_prompt_takes_the_most_the_refusal_says_how_to_read_it() -> None:
    shape = find_shape("gpt-oss-20b")
    model = GeneratedModel(find_config(shape), name="gpt-oss-20b", precision="4bit", seed=0)
    settings = Settings(
        find_policy("lru"), memory_bytes=8 * 2**30, context_tokens=4096, device=torch.device("cuda")
    )
    with pytest.raises(RunError, match="--prompt-chunk 512 reads prompts in less"):
        plan_memory(GeneratedStore(model, held=False), settings)
    chunked = replace(settings, prompt_chunk=512)
    assert plan_memory(GeneratedStore(model, held=False), chunked).slots > 4
