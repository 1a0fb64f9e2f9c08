"""Texts decoded together: the tokens of each as of a run alone, and a step asks once for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moepolicy import find_policy
from moerun.checkpoint.families import empty_model, text_alone
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.live.batch import BatchedGeneration
from moerun.live.batch_cache import check_batches
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.live.work import Generated
from moerun.memory.fit import plan_memory
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from support.families import FAMILIES as SMALL
from support.families import save_small, small_config, telling_fast
from support.moe_models import random_model, save_checkpoint

WINDOW = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "a window": ("gpt_oss", WINDOW),
}
LENGTHS = [(5, 12), (17, 7), (9, 15), (3, 4), (12, 1), (6, 9)]
"""Of prompts, and of their answers."""
TEXTS = 3


def stored(family: str, folder: Path) -> ExpertStore:
    kind, changes = FAMILIES[family]
    sizes = {"vocab_size": 2048, "max_position_embeddings": 256, "eos_token_id": None}
    model = random_model(kind, **sizes, **changes)
    checkpoint = save_checkpoint(model, resolve("tiny"), folder / "model")
    return pack(checkpoint, folder / "store")


def prompts() -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(1, 2000, (1, n), generator=drawn) for n, _ in LENGTHS]


def samplings() -> list[Sampling]:
    """Greedy and drawn, with processors and log-probabilities, in turn."""
    return [
        Sampling(
            max_new_tokens=n,
            stop=False,
            temperature=float(i % 2),
            seed=i,
            logprobs=1,
            prompt_logprobs=i == 2,
            frequency_penalty=0.5 * (i % 3 == 0),
        )
        for i, (_, n) in enumerate(LENGTHS)
    ]


def decoded(runner: Runner, *, reuse: bool = False) -> list[BatchedGeneration]:
    """All texts, at most TEXTS at a time: one joins in each pass, as a server has them."""
    batch, made = runner.batch(), []
    wanted = list(zip(prompts(), samplings(), strict=True))
    while wanted or batch.rows:
        if wanted and len(batch.rows) < TEXTS:
            made.append(runner.batched_generation(reuse=reuse))
            batch.add(made[-1], *wanted.pop(0))
        if batch.rows:
            batch.step()
    return made


@pytest.mark.parametrize(
    "family", ["mixtral", "a window", pytest.param("deepseek_v3", marks=pytest.mark.slow)]
)
def test_each_text_is_that_of_a_run_alone(family: str, tmp_path: Path) -> None:
    settings = Settings(find_policy("lru"), slots=4, texts=TEXTS)
    with Runner(stored(family, tmp_path), settings) as runner:
        alone = [
            runner.generation().run(ids, sampling)
            for ids, sampling in zip(prompts(), samplings(), strict=True)
        ]
        requests_alone = runner.session.totals.requests
        runner.session.reset()
        together = [generation.outcome() for generation in decoded(runner)]
        for one, other in zip(alone, together, strict=True):
            assert other.token_ids == one.token_ids
            assert (other.text, other.ending) == (one.text, one.ending)
            pairs = zip(
                [*one.prompt_logprobs, *one.logprobs],
                [*other.prompt_logprobs, *other.logprobs],
                strict=True,
            )
            for mine, theirs in pairs:
                assert mine.logprob == pytest.approx(theirs.logprob, abs=2e-4)
        # An expert that several texts want is asked for once a step.
        assert runner.session.totals.requests < requests_alone


def test_a_text_that_has_ended_may_be_gone_on_from(tmp_path: Path) -> None:
    settings = Settings(find_policy("lru"), slots=4, texts=TEXTS)
    with Runner(stored("a window", tmp_path), settings) as runner:
        made = decoded(runner, reuse=True)
        last = made[2]  # the last to end
        text = [*prompts()[2][0].tolist(), *last.token_ids]
        ids = torch.tensor([[*text, 5, 6, 7]])
        sampling = Sampling(max_new_tokens=8, stop=False)
        kept = runner.generation(reuse=True).run(ids, sampling)
        assert kept.cached_tokens == len(text) - 1
        assert kept.token_ids == runner.generation().run(ids, sampling).token_ids


def test_a_text_goes_on_exactly_in_a_batch_of_its_own(tmp_path: Path) -> None:
    store = stored("a window", tmp_path)
    settings = Settings(find_policy("lru"), slots=4, texts=2, exact_reuse=True)
    asked = Sampling(max_new_tokens=6, stop=False, logprobs=1)
    first = prompts()[1]

    def answer(runner: Runner, ids: torch.Tensor) -> Generated:
        batch, generation = runner.batch(), runner.batched_generation(reuse=True)
        runner.kept.chunk_tokens = 8
        batch.add(generation, ids, asked)
        while batch.rows:
            batch.step()
        return generation.outcome()

    with Runner(store, settings) as keeping, Runner(store, settings) as fresh:
        text = [*first[0].tolist(), *answer(keeping, first).token_ids, 5, 6, 7]
        found, anew = (answer(runner, torch.tensor([text])) for runner in (keeping, fresh))
        assert (found.cached_tokens, anew.cached_tokens) == (16, 0)
        assert found.logprobs == anew.logprobs  # to the bit


def test_a_prompt_that_fails_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    settings = Settings(find_policy("lru"), slots=4, texts=2)
    ids, sampling = prompts()[0], samplings()[0]
    with Runner(stored("mixtral", tmp_path), settings) as runner:
        expected = runner.generation().run(ids, sampling).token_ids
        batch, goes_on = runner.batch(), runner.batched_generation()
        batch.add(goes_on, ids, sampling)
        with pytest.raises(RunError, match="the prompt has 300 tokens"):
            batch.add(runner.batched_generation(), torch.ones(1, 300, dtype=torch.long), sampling)
        cancelled = runner.batched_generation()
        cancelled.cancel()
        assert not batch.add(cancelled, prompts()[1], sampling)
        assert cancelled.outcome().ending == "cancelled"
        while batch.rows:
            batch.step()
        assert goes_on.outcome().token_ids == expected


def test_memory_is_planned_for_as_many_texts(tmp_path: Path) -> None:
    store = stored("mixtral", tmp_path)
    one, four = (
        plan_memory(store, Settings(find_policy("lru"), slots=2, texts=n)).needs for n in (1, 4)
    )
    assert four.kv_cache_bytes == 4 * one.kv_cache_bytes
    assert four.workspace_bytes > one.workspace_bytes
    assert "4 texts of" in {name: why for name, _, why in four.rows()}["KV cache"]


SINGLE = ("deepseek_v32", "deepseek_v4", "glm_moe_dsa")


@pytest.mark.parametrize("family", SINGLE)
def test_what_counts_the_columns_of_others_is_not_put_beside_them(family: str) -> None:
    config = text_alone(small_config(family))
    model = empty_model(config, torch.float32)
    with pytest.raises(RunError, match=f"{config.model_type} keeps more of a text"):
        check_batches(model)


@pytest.mark.parametrize(
    "family",
    telling_fast(sorted({*SMALL} - {*SINGLE}), slow={*SMALL} - {"qwen3_next", "nemotron_h"}),
)
def test_every_other_family_is_decoded_together(family: str, tmp_path: Path) -> None:
    store = pack(save_small(family, tmp_path / "model", decided=True), tmp_path / "store")
    drawn = torch.Generator().manual_seed(2)
    lengths = [(5, 9), (21, 6), (3, 8), (11, 5)]
    texts = [torch.randint(3, 120, (1, n), generator=drawn) for n, _ in lengths]
    asked = [Sampling(max_new_tokens=n, stop=False, logprobs=1) for _, n in lengths]
    with Runner(store, Settings(find_policy("lru"), slots=2, texts=TEXTS)) as runner:
        alone = [runner.generation().run(*each) for each in zip(texts, asked, strict=True)]
        batch, made, wanted = runner.batch(), [], list(zip(texts, asked, strict=True))
        while wanted or batch.rows:
            if wanted and len(batch.rows) < TEXTS:
                made.append(runner.batched_generation(reuse=True))
                batch.add(made[-1], *wanted.pop(0))
            batch.step()
        for one, other in zip(alone, made, strict=True):
            assert other.token_ids == one.token_ids
            for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
                assert mine.logprob == pytest.approx(theirs.logprob, abs=5e-3)
        # What was taken out of the batch goes on as the text that it is of.
        last = max(range(4), key=lambda i: made[i].outcome().token_s[-1])
        text = torch.tensor([[*texts[last][0].tolist(), *made[last].token_ids, 7]])
        more = Sampling(max_new_tokens=4, stop=False)
        kept = runner.generation(reuse=True).run(text, more)
        assert kept.cached_tokens == text.shape[1] - 2
        assert kept.token_ids == runner.generation().run(text, more).token_ids
