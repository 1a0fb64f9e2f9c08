"""Experts in pinned host memory, copied to a GPU while it computes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from moepolicy import find_policy
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.kernels.slots import SlotForm
from moerun.links import HostTier
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.offload.attention import PackedLinear
from moerun.offload.load import load_offloaded
from moerun.profiling.profiler import measure
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from support.runs import ResidentProvider, generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom"
PATIENCE_S = 60.0
READ_BYTES = 16384  # so that a small record crosses in pieces while it is read
SPIN_CYCLES = 200_000_000  # some 0.1 s of a GPU's time


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.device_count() - 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return pack(resolve("tiny"), tmp_path_factory.mktemp("stores") / "tiny")


class Served:
    """A started link with plain slots, over a host tier of ``records`` (None: of all)."""

    def __init__(
        self,
        store: ExpertStore,
        device: torch.device,
        slots: int,
        streams: int,
        records: int | None = None,
        chunk_bytes: int = 0,
    ) -> None:
        from moerun.links.cuda import CudaDevice
        from moerun.links.pinned import PinnedLink

        form = SlotForm(store.index.shape, store.index.precision, device)
        self.arena = torch.empty((slots, form.slot_bytes), dtype=torch.uint8, device=device)
        slots_of = [form.bind(memory) for memory in self.arena]
        n_bytes = None if records is None else records * store.record_bytes
        tier = HostTier(store, n_bytes, read_bytes=READ_BYTES)
        self.link = PinnedLink(
            tier, slots_of, CudaDevice(device), streams=streams, chunk_bytes=chunk_bytes
        )
        self.reports: SimpleQueue[tuple[int, Exception | None]] = SimpleQueue()
        self.link.start(lambda key, error, _ended_s: self.reports.put((key, error)))

    def wait(self) -> int:
        key, error = self.reports.get(timeout=PATIENCE_S)
        assert error is None
        return key


@pytest.fixture(
    params=[
        (streams, records, chunk_bytes)
        for streams in (1, 2, 3)
        for records in (None, 8)
        for chunk_bytes in (0, 40960)
    ],
    ids=str,
)
def served(store: ExpertStore, device: torch.device, request: Any) -> Iterator[Served]:
    streams, records, chunk_bytes = request.param
    made = Served(store, device, 4, streams, records, chunk_bytes)
    yield made
    made.link.close()


def record_of(store: ExpertStore, key: int) -> torch.Tensor:
    record = torch.empty(store.record_bytes, dtype=torch.uint8)
    store.read_into(key, record)
    return record


def test_every_record_arrives_whole(store: ExpertStore, served: Served) -> None:
    for key in range(0, store.n_keys - 3, 4):
        for slot in range(4):
            served.link.submit(key + slot, slot)
        assert sorted(served.wait() for _ in range(4)) == list(range(key, key + 4))
        for slot in range(4):
            served.link.acquire(slot)
            found = served.arena[slot, : store.record_bytes].cpu()
            served.link.release(slot)
            assert torch.equal(found, record_of(store, key + slot))
    assert served.link.statistics.copies == store.n_keys // 4 * 4


def test_a_slot_is_not_overwritten_before_its_last_kernel_has_read_it(
    store: ExpertStore, served: Served, device: torch.device
) -> None:
    served.link.submit(3, 0)
    served.wait()
    served.link.acquire(0)
    kept = torch.empty(store.record_bytes, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]  # the read below is queued behind this
        kept.copy_(served.arena[0, : store.record_bytes])
    served.link.release(0)
    served.link.submit(11, 0)
    served.wait()
    assert torch.equal(kept.cpu(), record_of(store, 3))
    served.link.acquire(0)
    assert torch.equal(served.arena[0, : store.record_bytes].cpu(), record_of(store, 11))


def test_a_record_crosses_while_it_is_read_and_never_arrives_if_damaged(
    device: torch.device, tmp_path: Path
) -> None:
    store = pack(resolve("tiny"), tmp_path / "tiny")
    where = store.location(9)
    with where.path.open("r+b") as file:
        file.seek(where.offset + 5)
        file.write(b"\x7f")
    served = Served(store, device, 2, streams=2, records=4)
    served.link.submit(9, 0)
    key, error = served.reports.get(timeout=PATIENCE_S)
    assert key == 9
    assert isinstance(error, RunError)
    assert "expert 1 of layer 1 is damaged" in str(error)
    served.link.submit(10, 0)
    assert served.wait() == 10
    served.link.acquire(0)
    assert torch.equal(served.arena[0, : store.record_bytes].cpu(), record_of(store, 10))
    served.link.close()


def test_demand_overtakes_a_prefetch_in_pieces(store: ExpertStore, device: torch.device) -> None:
    """Queued behind a slot that is still being read, so that both are there before either goes."""
    served = Served(store, device, 2, streams=1, chunk_bytes=4096)
    with torch.cuda.device(device):
        torch.cuda._sleep(SPIN_CYCLES)  # type: ignore[no-untyped-call]
    served.link.release(0)
    served.link.release(1)
    served.link.submit(1, 0, demand=False)
    served.link.submit(2, 1)
    assert [served.wait(), served.wait()] == [2, 1]
    for slot, key in enumerate((1, 2)):
        served.link.acquire(slot)
        found = served.arena[slot, : store.record_bytes].cpu()
        assert torch.equal(found, record_of(store, key))
    served.link.close()


@torch.inference_mode()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    out = model(ids[:, :-3], use_cache=True)
    found = [out.logits]
    for i in range(ids.shape[1] - 3, ids.shape[1]):
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("slots", [0, 1, 4, 8])
@pytest.mark.parametrize("policy", ["lru", "lru-spec:staging=1", "lru-spec:n=3,staging=4"])
def test_logits_do_not_depend_on_what_is_resident(
    store: ExpertStore, device: torch.device, policy: str, slots: int
) -> None:
    resident, tokenizer = load_offloaded(store, device, ResidentProvider(store, device))
    ids = tokenizer(PROSE, return_tensors="pt").input_ids.to(device)
    expected = logits_of(resident, ids)
    chosen = Settings(find_policy(policy), slots=slots, device=device, streams=2)
    with Runner(store, chosen) as runner:
        for _ in range(3):
            assert torch.equal(logits_of(runner.model, ids), expected)
        runner.session.settle()
        runner.session.cache.check()


def test_generation_on_a_slow_link_writes_the_same_text(
    store: ExpertStore, device: torch.device
) -> None:
    texts = []
    for slots, rate in ((8, None), (2, 1e9)):
        chosen = Settings(
            find_policy("lru-spec"), slots=slots, device=device, link_bytes_per_s=rate
        )
        with Runner(store, chosen) as runner:
            texts.append(generate(runner, PROSE, Sampling(max_new_tokens=24)))
            assert runner.session.totals.bytes_loaded > 0
    assert texts[0] == texts[1] != ""


def test_a_profile_of_the_gpu(store: ExpertStore, device: torch.device) -> None:
    profile = measure(store, Settings(find_policy("lru"), device=device), "gpu", repeats=1)
    assert profile.link.bytes_per_s > 0
    assert profile.compute.layer_s > 0
    assert str(device) in profile.description


def test_more_slots_than_the_gpu_has_memory_for_are_refused(
    store: ExpertStore, device: torch.device, tmp_path: Path
) -> None:
    from moerun.live.assembly import make_link

    form = SlotForm(store.index.shape, store.index.precision, device)
    _, total = torch.cuda.mem_get_info(device)
    with pytest.raises(RunError, match=r"does not have free .*: use fewer slots"):
        make_link(
            store, form, Settings(find_policy("lru"), device=device), total // form.slot_bytes + 1
        )


def test_a_run_keeps_to_its_budget_and_gives_back_what_a_smaller_one_takes_away(
    store: ExpertStore, device: torch.device
) -> None:
    policy = find_policy("lru-spec")
    with Runner(store, Settings(policy, slots=0, device=device, context_tokens=256)) as runner:
        least = runner.plan.least_bytes
    row = store.n_layers * store.record_bytes
    chosen = Settings(policy, memory_bytes=least + 6 * row, device=device, context_tokens=256)
    with Runner(store, chosen) as runner:
        assert runner.context.slots == 6
        expected = generate(runner, PROSE, Sampling(max_new_tokens=100))
        assert 6 * row < runner.peak_bytes <= least + 6 * row
        before = torch.cuda.memory_allocated(device)
        runner.set_memory(least + row)
        assert before - torch.cuda.memory_allocated(device) >= 5 * row
        assert generate(runner, PROSE, Sampling(max_new_tokens=100)) == expected
        runner.session.resize(8)
        assert generate(runner, PROSE, Sampling(max_new_tokens=100)) == expected


def test_the_budget_may_change_while_text_is_generated(
    store: ExpertStore, device: torch.device
) -> None:
    with Runner(store, Settings(find_policy("lru-spec"), slots=3, device=device)) as runner:
        expected = generate(runner, PROSE, Sampling(max_new_tokens=60))
        done = threading.Event()

        def change() -> None:
            while not done.is_set():
                for slots in (0, 8, 1, 5, 3):
                    runner.session.resize(slots)
                    time.sleep(0.003)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            assert generate(runner, PROSE, Sampling(max_new_tokens=60)) == expected
        finally:
            done.set()
            thread.join()


def test_memory_that_another_program_holds_is_named(
    store: ExpertStore, device: torch.device
) -> None:
    free, total = torch.cuda.mem_get_info(device)
    chosen = Settings(
        find_policy("lru"), memory_bytes=2 * total, device=device, context_tokens=1 << 9
    )
    taken = torch.empty(free - (64 << 20), dtype=torch.uint8, device=device)
    try:
        with pytest.raises(RunError, match=r"free \(.* other programs and CUDA itself hold"):
            Runner(store, chosen)
    finally:
        del taken
        torch.cuda.empty_cache()


@pytest.mark.parametrize("chunk_bytes", [0, 40960])
@pytest.mark.parametrize("host_records", [4, 20, 64])
def test_experts_come_from_disk_by_way_of_host_memory(
    store: ExpertStore, device: torch.device, host_records: int, chunk_bytes: int
) -> None:
    texts = []
    for host_bytes in (None, host_records * store.record_bytes):
        chosen = Settings(
            find_policy("lru-spec"),
            slots=2,
            device=device,
            streams=2,
            host_bytes=host_bytes,
            chunk_bytes=chunk_bytes,
        )
        with Runner(store, chosen) as runner:
            texts.append(generate(runner, PROSE, Sampling(max_new_tokens=24)))
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("precision", ["4bit", "3bit", "2bit"])
def test_packed_attention_computes_what_plain_dequantisation_does(
    device: torch.device, tmp_path: Path, precision: str
) -> None:
    packed = pack(resolve("tiny"), tmp_path / "packed", attention=precision)
    with torch.inference_mode():
        models = [
            load_offloaded(packed, where, ResidentProvider(packed, where))[0]
            for where in (device, torch.device("cpu"))
        ]
        for name, on_host in models[1].named_modules():
            if isinstance(on_host, PackedLinear):
                x = torch.randn(3, 7, on_host.in_features, dtype=torch.float16)
                found = models[0].get_submodule(name)(x.to(device)).cpu()
                assert found.dtype == x.dtype
                wanted = on_host(x).float()
                assert (found.float() - wanted).norm() < 0.01 * wanted.norm(), name
    with Runner(packed, Settings(find_policy("lru-spec"), slots=2, device=device)) as runner:
        assert generate(runner, PROSE, Sampling(max_new_tokens=8))
