"""A text that goes on from the keys and values of another has the same tokens as if read afresh."""

from __future__ import annotations

from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from moepolicy import find_policy
from moerun.checkpoint.hub import resolve
from moerun.live.kept import KeptCache, crop, shared_tokens
from moerun.live.kvcache import new_cache
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.live.work import Generated
from moerun.memory.fit import plan_memory
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from support.families import save_small
from support.moe_models import random_model, save_checkpoint

WINDOW = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
LINEAR = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    **{"num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 24},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "gpt_oss": ("gpt_oss", {}),
    "a window": ("gpt_oss", WINDOW),
    "linear attention": ("qwen3_next", LINEAR),
}


CHUNK = 8
CACHES = (  # families that differ in what they cache
    *("deepseek_v3", "deepseek_v32", "deepseek_v4", "gemma4", "granitemoehybrid", "kimi_linear"),
    *("llama4", "mimo_v2_flash", "nemotron_h", "qwen3_next"),
)


def stored(family: str, folder: Path) -> ExpertStore:
    kind, changes = FAMILIES[family]
    sizes = {"vocab_size": 2048, "max_position_embeddings": 256, "eos_token_id": None}
    model = random_model(kind, **sizes, **changes)
    checkpoint = save_checkpoint(model, resolve("tiny"), folder / "model")
    return pack(checkpoint, folder / "store")


def made(family: str, folder: Path) -> Runner:
    return Runner(stored(family, folder), Settings(find_policy("lru"), slots=4))


def conversation(seed: int, turns: int, below: int = 2000) -> list[list[int]]:
    """The token ids that a user adds, turn by turn."""
    drawn = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, below, (int(n),), generator=drawn).tolist()
        for n in torch.randint(2, 12, (turns,), generator=drawn)
    ]


def answered(
    runner: Runner, ids: list[int], *, reuse: bool, keep: bool = True, **options: Any
) -> Generated:
    options = {"max_new_tokens": 9, "stop": False, "logprobs": 1, "reuse": keep, **options}
    sampling = Sampling(**options)
    return runner.generation(reuse=reuse).run(torch.tensor([ids]), sampling)


@pytest.mark.parametrize(
    ("family", "temperature"),
    [
        ("mixtral", 1.0),
        ("a window", 0.0),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in product(("deepseek_v3", "gpt_oss"), (0.0, 1.0))
        ),
    ],
)
def test_a_conversation_says_what_fresh_runs_say(
    family: str, temperature: float, tmp_path: Path
) -> None:
    with made(family, tmp_path) as runner:
        text: list[int] = []
        cached = 0
        for turn, added in enumerate(conversation(3, turns=6)):
            text += added
            options: dict[str, Any] = {"temperature": temperature, "seed": turn}
            kept = answered(runner, text, reuse=True, **options)
            fresh = answered(runner, text, reuse=False, **options)
            assert kept.token_ids == fresh.token_ids
            for one, other in zip(kept.logprobs, fresh.logprobs, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=2e-4)
            # All of the turns before, but for the last token, which was never read.
            assert kept.cached_tokens == cached
            text += kept.token_ids
            cached = len(text) - 1


def test_what_parts_early_is_read_from_there(tmp_path: Path) -> None:
    with made("mixtral", tmp_path) as runner:
        first, second, third = conversation(5, turns=3)
        answered(runner, first + second, reuse=True)
        other = answered(runner, first + third, reuse=True)
        assert other.cached_tokens == len(first)
        assert other.token_ids == answered(runner, first + third, reuse=False).token_ids
        again = answered(runner, first + third, reuse=True)
        assert again.cached_tokens == len(first + third) - 1  # its logits are not kept
        assert again.token_ids == other.token_ids
        assert answered(runner, third, reuse=True).cached_tokens == 0


@pytest.mark.parametrize("family", ["a window", "linear attention"])
def test_what_cannot_be_taken_back_is_read_again(family: str, tmp_path: Path) -> None:
    with made(family, tmp_path) as runner:
        text = conversation(7, turns=4)
        first = [*text[0], *text[1], *text[2]]
        assert len(first) > WINDOW["sliding_window"]  # type: ignore[operator]
        answered(runner, first, reuse=True)
        other = first[:-1] + text[3]
        kept = answered(runner, other, reuse=True)
        assert kept.cached_tokens == 0
        assert kept.token_ids == answered(runner, other, reuse=False).token_ids


def test_a_request_may_have_all_of_its_prompt_read(tmp_path: Path) -> None:
    with made("mixtral", tmp_path) as runner:
        ids = conversation(1, turns=2)[0]
        answered(runner, ids, reuse=True)
        fresh = Sampling(max_new_tokens=2, reuse=False)
        assert runner.generation(reuse=True).run(torch.tensor([ids]), fresh).cached_tokens == 0
        assert answered(runner, ids, reuse=True, prompt_logprobs=True).cached_tokens == 0


def test_what_was_broken_off_is_not_kept(tmp_path: Path) -> None:
    with made("mixtral", tmp_path) as runner:
        ids = torch.tensor([list(chain(*conversation(2, turns=4)))])
        generation = runner.generation(reuse=True)
        steps = 0

        def leave(*_: object) -> None:
            nonlocal steps
            steps += 1
            if steps == 3:  # between two layers of the prompt
                generation.cancel()

        runner.session.gate_observers.append(leave)
        assert generation.run(ids, Sampling(max_new_tokens=4)).ending == "cancelled"
        runner.session.gate_observers.remove(leave)
        assert list(runner.kept.token_ids) == []
        kept = answered(runner, ids[0].tolist(), reuse=True)
        assert kept.cached_tokens == 0
        assert kept.token_ids == answered(runner, ids[0].tolist(), reuse=False).token_ids


@pytest.mark.parametrize(
    "family",
    [
        "a window",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("mixtral", *CACHES)),
    ],
)
def test_a_text_goes_on_exactly_from_the_end_of_a_chunk(family: str, tmp_path: Path) -> None:
    if family in FAMILIES:
        store = stored(family, tmp_path)
    else:
        store = pack(save_small(family, tmp_path / "model", decided=True), tmp_path / "store")
    settings = Settings(find_policy("lru"), slots=3, exact_reuse=True)
    with Runner(store, settings) as keeping, Runner(store, settings) as fresh:
        keeping.kept.chunk_tokens = fresh.kept.chunk_tokens = CHUNK
        text: list[int] = []
        whole = cached = 0
        for turn, added in enumerate(conversation(3, turns=5, below=120)):
            text += added
            options: dict[str, Any] = {"max_new_tokens": 6, "seed": turn}
            options["temperature"] = turn % 2
            kept = answered(keeping, text, reuse=True, **options)
            anew = answered(fresh, text, reuse=True, keep=False, **options)
            assert anew.cached_tokens == 0
            assert kept.cached_tokens == whole
            assert kept.token_ids == anew.token_ids
            assert kept.logprobs == anew.logprobs  # to the bit
            cached += kept.cached_tokens
            whole = (len(text) - 1) // CHUNK * CHUNK
            text += kept.token_ids
        assert cached > 0
        # A text that parts from the kept one goes on from the last chunk that both have.
        other = [*text[: CHUNK + 3], *conversation(8, turns=1, below=120)[0]]
        kept = answered(keeping, other, reuse=True)
        assert kept.logprobs == answered(fresh, other, reuse=True, keep=False).logprobs
        if family in ("mixtral", "deepseek_v3"):
            assert kept.cached_tokens == CHUNK


def test_the_log_probabilities_of_a_prompt_in_chunks(tmp_path: Path) -> None:
    store = stored("mixtral", tmp_path)
    ids = list(chain(*conversation(4, turns=7)))
    found = []
    for exact in (False, True):
        settings = Settings(find_policy("lru"), slots=3, exact_reuse=exact)
        with Runner(store, settings) as runner:
            runner.kept.chunk_tokens = CHUNK * exact
            found.append(answered(runner, ids, reuse=True, prompt_logprobs=True).prompt_logprobs)
    assert len(found[1]) == len(ids) > 2 * CHUNK
    for one, other in zip(*found, strict=True):
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob, abs=2e-4)


def test_memory_is_planned_for_what_is_copied_at_a_chunks_end(tmp_path: Path) -> None:
    for family, copies in (("mixtral", False), ("a window", True), ("linear attention", True)):
        store = stored(family, tmp_path / family)
        near, exact = (
            plan_memory(store, Settings(find_policy("lru"), slots=2, exact_reuse=each)).needs
            for each in (False, True)
        )
        assert (exact.kv_cache_bytes > near.kv_cache_bytes) == copies


def test_shared_tokens() -> None:
    assert shared_tokens([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_tokens([1, 2, 3], [1, 2, 3, 4]) == 3
    assert shared_tokens([], [1]) == shared_tokens([2], [1]) == 0


def test_a_state_that_has_no_earlier_one_is_not_cropped() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_next",
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16},
        **{"num_key_value_heads": 1, "vocab_size": 64, "intermediate_size": 32},
        **{"layer_types": ["linear_attention", "full_attention"], "num_experts": 4},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"shared_expert_intermediate_size": 16, "linear_num_key_heads": 1},
        **{"linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(1, 60, (1, 12))
    with torch.inference_mode():
        cache = new_cache(model, 32)
        model(ids[:, :10], past_key_values=cache, use_cache=True)
        assert not crop(cache, 2)
        assert cache.get_seq_length() == 10
        kept = KeptCache(model)
        kept.keep(ids[0, :10].tolist(), cache)
        assert kept.begin(ids[0, :8].tolist(), 32).tokens == 0
        # A text that goes on where the other ended needs no earlier state.
        kept.keep(ids[0, :10].tolist(), cache)
        begun = kept.begin(ids[0].tolist(), 32)
        assert begun.tokens == 10
        found = model(ids[:, 10:], past_key_values=begun.cache, use_cache=True).logits[:, -1]
        wanted = model(ids, use_cache=False).logits[:, -1]
        assert torch.allclose(found, wanted, atol=1e-4)
