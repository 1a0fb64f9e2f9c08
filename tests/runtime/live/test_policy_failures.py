"""Policies that fail live: LRU goes on, and no token is another than the stock model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from moepolicy import Kind, PolicyError, PolicyFailed, find_policy
from moerun import load
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError, UsageError
from moerun.kernels.slots import SlotForm
from moerun.live import runner as runner_module
from moerun.live.recording import LiveRecording
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from support.links import ShuffledLink
from transformers import AutoModelForCausalLM

OWN = Path(__file__).parents[2] / "support" / "failing.py"
PROSE = "It was the best of times, it was the worst of times, it was"
N_NEW = 6
HOOKS = (
    "on_step",
    "on_hit",
    "on_load",
    "on_evict",
    "victim",
    "retain",
    "prefetch",
    "wants_predictions",
)
ANSWERING = ("route", "on_miss", "precision", "substitute")  # of policies that are lossy


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """The stock model's tokens."""
    stock: Any = AutoModelForCausalLM.from_pretrained(resolve("tiny")).eval()
    with torch.inference_mode():
        ids = prompt_ids()
        found = stock.generate(ids, max_new_tokens=N_NEW, do_sample=False)[0, ids.shape[1] :]
    tokens: list[int] = found.tolist()
    return tokens


def prompt_ids() -> torch.Tensor:
    from transformers import AutoTokenizer

    ids: torch.Tensor = AutoTokenizer.from_pretrained(resolve("tiny"))(
        PROSE, return_tensors="pt"
    ).input_ids
    return ids


def shuffled(streams: int, seed: int) -> Any:
    """Stands for make_link: copies that end in random order."""

    def make(store: ExpertStore, form: SlotForm, chosen: Settings, n_slots: int) -> ShuffledLink:
        arena = torch.empty((n_slots, form.slot_bytes), dtype=torch.uint8)
        return ShuffledLink(store, [form.bind(memory) for memory in arena], streams, seed)

    return patch.object(runner_module, "make_link", make)


def failing(hook: str, at: int, answer: str = "raise", kind: str = "Failing") -> Any:
    return find_policy(f"{OWN}:{kind}:hook={hook},at={at},answer={answer}")


def check_tokens(
    store: ExpertStore, settings: Settings, expected: list[int], *, said: str
) -> Runner:
    """Generate, and check that the tokens are right, what was said, and that LRU serves on."""
    told: list[str] = []
    with Runner(store, settings, report=told.append) as runner:
        ids = prompt_ids()
        assert runner.generation().run(ids, Sampling(N_NEW)).token_ids == expected
        [line] = told
        assert "\n" not in line
        assert said in line
        assert line.endswith("from this step on, LRU keeps the experts")
        session = runner.session
        session.settle()
        session.cache.check()
        assert isinstance(session.policy_failure, PolicyFailed)
        assert session.totals.steps == store.n_layers * N_NEW
        before = session.totals
        assert runner.generation().run(ids, Sampling(N_NEW)).token_ids == expected
        after = session.totals.since(before)
        assert min(after.hits, after.misses) > 0
        session.reset()
        assert runner.generation().run(ids, Sampling(N_NEW)).token_ids == expected
        assert len(told) == 1
    return runner


@pytest.mark.parametrize("at", [1, 2, 30])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_raises_changes_no_token(
    stores: dict[str, ExpertStore], expected: list[int], hook: str, at: int
) -> None:
    settings = Settings(
        failing(hook, at),
        slots=1 if hook == "retain" else 3,  # where experts are used and not kept
        streams=2,
        scope="global" if at == 2 and hook != "retain" else "layer",
        falls_back=True,
    )
    links = shuffled(2, at) if at == 30 else nullcontext()
    with links:
        check_tokens(
            stores["native"],
            settings,
            expected,
            said=f"RuntimeError: my {hook} failed ({hook}, step ",
        )


@pytest.mark.parametrize("at", [1, 20])
@pytest.mark.parametrize("hook", ANSWERING)
def test_a_hook_of_a_lossy_policy_that_raises_changes_no_token(
    stores: dict[str, ExpertStore], expected: list[int], hook: str, at: int
) -> None:
    kind = "FailingRoute" if hook == "route" else "FailingAnswers"
    at = 1 if hook == "substitute" else at  # the one before had changed what is computed
    settings = Settings(
        failing(hook, at, kind=kind), slots=3, low=stores["native"], streams=2, falls_back=True
    )
    check_tokens(stores["native"], settings, expected, said=f"my {hook} failed ({hook}, step ")


@pytest.mark.parametrize(
    ("hook", "answer", "kind", "said"),
    [
        ("victim", "pinned", "Failing", "victim"),
        ("victim", "beyond", "Failing", "victim"),
        ("victim", "text", "Failing", "victim answered"),
        ("retain", "beyond", "Failing", "retain"),
        ("prefetch", "many", "Failing", "prefetch answered a number of keys"),
        ("prefetch", "beyond", "Failing", "prefetch named a key that does not exist"),
        ("on_miss", "beyond", "FailingAnswers", "on_miss"),
        ("precision", "beyond", "FailingAnswers", "precision"),
        ("route", "twice", "FailingRoute", "route chose an expert twice"),
        ("route", "beyond", "FailingRoute", "route chose an expert that does not exist"),
    ],
)
def test_a_wrong_answer_changes_no_token(
    stores: dict[str, ExpertStore],
    expected: list[int],
    hook: str,
    answer: str,
    kind: str,
    said: str,
) -> None:
    settings = Settings(
        failing(hook, 12, answer, kind),
        slots=1 if hook == "retain" else 3,
        low=stores["native"],  # what is loaded from it changes nothing
        falls_back=True,
    )
    check_tokens(stores["native"], settings, expected, said=said)


@pytest.mark.parametrize(("kind", "staging"), [("Failing", 4), ("FailingShares", 1)])
def test_the_slots_stay_as_many(
    stores: dict[str, ExpertStore], expected: list[int], kind: str, staging: int
) -> None:
    policy = find_policy(f"{OWN}:{kind}:hook=victim,at=9,staging={staging}")
    store = stores["native"]
    settings = Settings(policy, slots=2, falls_back=True)
    runner = check_tokens(store, settings, expected, said="my victim failed")
    assert runner.session.cache.n_slots == 2 * store.n_layers + staging
    assert runner.session.cache.name == "lru"


def test_a_policy_that_computes_on_the_cpu_may_fail_in_the_middle(
    stores: dict[str, ExpertStore], expected: list[int]
) -> None:
    settings = Settings(
        failing("on_load", 7, kind="FailingBeside"), slots=2, low=stores["2bit"], falls_back=True
    )
    runner = check_tokens(stores["native"], settings, expected, said="my on_load failed")
    assert runner.session.totals.cpu_experts == 0  # since the reset


@pytest.mark.parametrize("chunk_bytes", [0, 65536])
def test_copies_under_way_when_it_fails_arrive_for_nobody(
    stores: dict[str, ExpertStore], expected: list[int], chunk_bytes: int
) -> None:
    """A slow link, from host memory that holds a part of the experts: guesses are under way."""
    store = stores["native"]
    settings = Settings(
        failing("on_hit", 20),
        slots=3,
        streams=2,
        chunk_bytes=chunk_bytes,
        link_bytes_per_s=3e8,
        host_bytes=20 * store.record_bytes,
        falls_back=True,
    )
    runner = check_tokens(store, settings, expected, said="my on_hit failed")
    assert runner.session.cache.count(Kind.SPECULATE) == 0  # LRU guesses nothing


def test_a_change_of_memory_that_the_policy_cannot_take(
    stores: dict[str, ExpertStore], expected: list[int]
) -> None:
    told: list[str] = []
    settings = Settings(failing("on_resize", 1), slots=3, falls_back=True)
    with Runner(stores["native"], settings, report=told.append) as runner:
        runner.generation().run(prompt_ids(), Sampling(2))
        for slots in (2, 5):
            runner.session.resize(slots)
            assert runner.context.slots == slots
            found = runner.generation().run(prompt_ids(), Sampling(N_NEW))
            assert found.token_ids == expected
            assert runner.session.cache.n_slots == slots * runner.store.n_layers + 1
            runner.session.cache.check()
    assert len(told) == 1
    assert "my on_resize failed" in told[0]


def test_without_a_fallback_the_error_ends_the_run(stores: dict[str, ExpertStore]) -> None:
    for hook in ("victim", "on_step", "prefetch"):
        with Runner(stores["native"], Settings(failing(hook, 5), slots=3)) as runner:
            with pytest.raises(PolicyFailed, match=f"my {hook} failed"):
                runner.generation().run(prompt_ids(), Sampling(N_NEW))
            with pytest.raises((PolicyError, RunError)):
                runner.generation().run(prompt_ids(), Sampling(N_NEW))
            assert runner.session.policy_failure is None


def test_what_the_policy_could_not_even_be_given_is_no_failure_of_it(
    stores: dict[str, ExpertStore],
) -> None:
    """A gate that gives no logits is the model's: LRU would not be what was asked for."""
    settings = Settings(failing("route", 10_000, kind="FailingRoute"), slots=3, falls_back=True)
    told: list[str] = []
    with Runner(stores["native"], settings, report=told.append) as runner:
        ids = torch.tensor([[1, 2]]), torch.ones(1, 2)
        with pytest.raises(PolicyError, match="the model's gates give none"):
            runner.session.serve(0, *ids)
    assert not told


def test_a_recorded_run_keeps_its_trace_and_writes_no_journal(
    stores: dict[str, ExpertStore], tmp_path: Path
) -> None:
    settings = Settings(failing("victim", 30), slots=3, falls_back=True)
    with Runner(stores["native"], settings, report=lambda _: None) as runner:
        trace, journal = tmp_path / "t.parquet", tmp_path / "j.json"
        recording = LiveRecording(runner, trace, journal, seed=0)
        recording.recorder.begin_sequence()
        runner.generation().run(prompt_ids(), Sampling(N_NEW))
        recording.finish()
    assert trace.exists()
    assert not journal.exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["t.parquet"]


@pytest.fixture
def model(stores: dict[str, ExpertStore]) -> Iterator[Any]:
    with load(stores["native"], policy=failing("victim", 30), slots=3) as loaded:
        yield loaded


def test_a_loaded_model_warns_and_goes_on(model: Any, expected: list[int]) -> None:
    ids = prompt_ids()
    with pytest.warns(RuntimeWarning, match="my victim failed"):
        found = model.generate(ids, max_new_tokens=N_NEW, do_sample=False)
    assert found[0, ids.shape[1] :].tolist() == expected


def test_a_loaded_model_may_be_told_to_stop(stores: dict[str, ExpertStore]) -> None:
    policy = failing("victim", 30)
    with (
        load(stores["native"], policy=policy, slots=3, on_policy_error="stop") as loaded,
        pytest.raises(PolicyFailed, match="my victim failed"),
    ):
        loaded.generate(prompt_ids(), max_new_tokens=N_NEW)
    with pytest.raises(UsageError, match="'fallback' or 'stop'"):
        load(stores["native"], policy=policy, on_policy_error="never")
