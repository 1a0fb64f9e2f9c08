"""Answers to misses with experts on a GPU: the CPU beside it, and slots of either precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moepolicy import Kind, find_policy
from moerun.checkpoint.hub import resolve
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from support.runs import generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
OWN = Path(__file__).parents[1] / "support" / "policies.py"
PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom"


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.device_count() - 1)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExpertStore]:
    folder = tmp_path_factory.mktemp("stores")
    return {
        precision: pack(resolve("tiny"), folder / precision, precision=precision)
        for precision in ("native", "4bit", "2bit")
    }


def always(answer: Kind) -> Any:
    return find_policy(f"{OWN}:AnswersLow:answer={int(answer)}")


@torch.no_grad()
def logits_of(store: ExpertStore, settings: Settings) -> torch.Tensor:
    with Runner(store, settings) as runner:
        ids = runner.encode(PROSE)
        out = runner.model(ids[:, :-4], use_cache=True)
        found = [out.logits]
        for i in range(ids.shape[1] - 4, ids.shape[1]):
            past = out.past_key_values
            out = runner.model(ids[:, i : i + 1], past_key_values=past, use_cache=True)
            found.append(out.logits)
        runner.session.cache.check()
        return torch.cat(found, dim=1).float().cpu()


@pytest.mark.parametrize("precision", ["native", "4bit"])
def test_computing_on_the_cpu_differs_by_rounding_only(
    stores: dict[str, ExpertStore], device: torch.device, precision: str
) -> None:
    loaded = logits_of(stores[precision], Settings(find_policy("lru"), device=device))
    chosen = Settings(always(Kind.COMPUTE), device=device, low=stores["2bit"])
    computed = logits_of(stores[precision], chosen)
    # The CPU's kernel for packed weights takes bfloat16.
    near = 1e-3 if precision == "native" else 0.05
    error = (computed - loaded).norm() / loaded.norm()
    assert 0 <= error < near


def test_everything_at_the_lower_precision_is_the_lower_store(
    stores: dict[str, ExpertStore], device: torch.device
) -> None:
    expected = logits_of(stores["2bit"], Settings(find_policy("lru"), device=device))
    for slots in (1, 8):
        chosen = Settings(always(Kind.LOW), slots=slots, device=device, low=stores["2bit"])
        assert torch.equal(logits_of(stores["native"], chosen), expected)


@pytest.mark.parametrize("host_records", [None, 6])
@pytest.mark.parametrize("policy", ["fiddler", "hobbit", "emoe-substitute", f"{OWN}:Anything"])
def test_every_answer_is_served(
    stores: dict[str, ExpertStore], device: torch.device, policy: str, host_records: int | None
) -> None:
    chosen = Settings(
        find_policy(policy),
        slots=3,
        streams=2,
        device=device,
        low=stores["2bit"],
        host_bytes=host_records and host_records * stores["native"].record_bytes,
    )
    with Runner(stores["native"], chosen) as runner:
        assert generate(runner, PROSE, Sampling(max_new_tokens=16))
        runner.session.cache.check()
        totals = runner.session.totals
        assert totals.cpu_experts + totals.low_loads + totals.substituted + totals.skipped > 0
