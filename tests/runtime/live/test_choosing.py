"""How tokens are chosen, as transformers' generate() would, and the log-probabilities of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moepolicy import find_policy
from moerun.checkpoint.hub import resolve
from moerun.errors import UsageError
from moerun.live.processors import processors_of
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.settings import Settings
from moerun.store.pack import pack
from support.moe_models import random_model, save_checkpoint
from transformers import GenerationConfig, set_seed

IDS = torch.tensor([[7, 9, 11, 5, 7, 9, 2]])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("choosing")


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    # A family that scales its logits in its own forward().
    model = random_model(
        "granitemoe", num_local_experts=4, num_experts_per_tok=2, logits_scaling=4.0
    )
    save_checkpoint(model, resolve("tiny"), folder / "model")
    return model


@pytest.fixture(scope="module")
def runner(folder: Path, stock: Any) -> Iterator[Runner]:
    store = pack(folder / "model", folder / "store")
    with Runner(store, Settings(find_policy("lru"), slots=2)) as made:
        yield made


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 4},
        {"temperature": 1.1, "top_p": 0.6},
        {"temperature": 1.2, "min_p": 0.2},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.4},
        {"repetition_penalty": 1.8},
    ],
)
def test_tokens_are_those_of_generate(runner: Runner, stock: Any, options: dict[str, Any]) -> None:
    sampled = "temperature" in options
    config = GenerationConfig(
        **{"top_k": 0, **options} if sampled else options,
        **{"do_sample": sampled, "max_new_tokens": 20, "pad_token_id": 0},
    )
    set_seed(11)
    wanted = stock.generate(IDS, attention_mask=torch.ones_like(IDS), generation_config=config)
    sampling = Sampling(max_new_tokens=20, seed=11, stop=False, **options)
    assert runner.generation().run(IDS, sampling).token_ids == wanted[0, IDS.shape[1] :].tolist()


def test_penalties_are_those_of_the_reference() -> None:
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((3, 2.0),))
    scores = torch.zeros(1, 6)
    answer = torch.tensor([[1, 1, 4, 4, 5]])  # of which the first two are the prompt
    found = processors_of(sampling, 2, (), CPU)(answer, scores)
    assert found.tolist() == [[0, 0, 0, 2, -1, -0.75]]
    assert processors_of(sampling, 5, (), CPU)(answer, scores).tolist() == [[0, 0, 0, 2, 0, 0]]


def test_the_smallest_temperature_and_penalties_are_numbers_to_compute_with(runner: Runner) -> None:
    greedy = runner.generation().run(IDS, Sampling(max_new_tokens=4, stop=False)).token_ids
    cold = Sampling(max_new_tokens=4, stop=False, temperature=5e-324)
    assert runner.generation().run(IDS, cold).token_ids == greedy
    for penalty in (1e-3, 1e3):
        extreme = Sampling(
            max_new_tokens=4, stop=False, temperature=1.0, repetition_penalty=penalty
        )
        extreme.check()
        assert len(runner.generation().run(IDS, extreme).token_ids) == 4


def test_no_end_before_its_time(runner: Runner) -> None:
    first = runner.generation().run(IDS, Sampling(max_new_tokens=6, stop=False)).token_ids
    ends = Sampling(max_new_tokens=6, end_ids=(first[0],))
    assert runner.generation().run(IDS, ends).token_ids == first[:1]
    later = Sampling(max_new_tokens=6, end_ids=(first[0],), min_new_tokens=3)
    found = runner.generation().run(IDS, later).token_ids
    assert first[0] not in found[:3]
    assert len(found) >= 3
    # A token of the request's own ends the text, also where the model's do not.
    past = Sampling(max_new_tokens=6, end_ids=(first[2],), stop=False)
    assert runner.generation().run(IDS, past).ending == "stop"


def test_logprobs_are_the_models_own(runner: Runner, stock: Any) -> None:
    sampling = Sampling(
        max_new_tokens=5,
        stop=False,
        logprobs=3,
        prompt_logprobs=True,
        temperature=0.7,
        repetition_penalty=2.0,
        seed=3,
    )
    found = runner.generation().run(IDS, sampling)
    text = torch.tensor([IDS[0].tolist() + found.token_ids])
    with torch.inference_mode():
        wanted = stock(text).logits[0].float().log_softmax(-1)
    entries = [*found.prompt_logprobs, *found.logprobs]
    assert [entry.token for entry in entries] == text[0].tolist()
    assert (entries[0].logprob, entries[0].top) == (None, ())
    for place, entry in enumerate(entries[1:]):
        assert entry.logprob == pytest.approx(float(wanted[place, entry.token]), abs=1e-4)
        top = wanted[place].topk(3)
        assert [token for token, _ in entry.top] == top.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    # Nothing is left behind on the model.
    assert "forward" not in vars(runner.model.base_model)
    plain = runner.generation().run(IDS, Sampling(max_new_tokens=5, stop=False))
    assert (plain.logprobs, plain.prompt_logprobs) == ([], [])


def test_what_is_out_of_range_is_named() -> None:
    for options, name in (({"min_p": 1.5}, "min-p"), ({"repetition_penalty": 0}, "repetition")):
        with pytest.raises(UsageError, match=name):
            Sampling(**options).check()
