"""A runner between its runs: its cache, its slots, and records that are damaged."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
from moepolicy import find_policy
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from support.runs import generate

PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom"
CODE = "def main(arguments):\n    for name in sorted(arguments):\n"
N_EXPERTS = 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return pack(resolve("tiny"), tmp_path_factory.mktemp("stores") / "tiny")


def test_the_cache_lives_on_across_prompts(tiny: ExpertStore) -> None:
    with Runner(tiny, Settings(find_policy("lru"), slots=N_EXPERTS)) as runner:
        first, second = (
            runner.generation().run(runner.encode(PROSE), Sampling(max_new_tokens=4))
            for _ in range(2)
        )
    assert first.totals.misses > 0
    assert second.totals.misses == 0
    assert second.totals.hits == first.totals.requests


def test_a_damaged_record_stops_the_run_and_names_it(tiny: ExpertStore, tmp_path: Path) -> None:
    store = pack(resolve("tiny"), tmp_path / "store")
    where = store.location(5)
    with where.path.open("r+b") as file:
        file.seek(where.offset + 100)
        file.write(b"\xff\x00\xff\x00")
    damaged = ExpertStore.open(store.path)
    with (
        Runner(damaged, Settings(find_policy("lru"), slots=2)) as runner,
        pytest.raises(RunError, match=rf"expert 5 of layer 0 .*{where.path.name}"),
    ):
        generate(runner, PROSE + CODE, Sampling(max_new_tokens=50))


def test_a_closed_runner_frees_its_slots_at_once(tiny: ExpertStore) -> None:
    with Runner(tiny, Settings(find_policy("lru-spec"), slots=2)) as runner:
        generate(runner, PROSE, Sampling(max_new_tokens=3))  # imports keep their first caller
    gc.collect()
    gc.disable()
    try:
        runner = Runner(tiny, Settings(find_policy("lru-spec"), slots=2))
        generate(runner, PROSE, Sampling(max_new_tokens=3))
        slot = weakref.ref(runner.session.link.slots[0])
        runner.close()
        del runner
        assert slot() is None
    finally:
        gc.enable()
