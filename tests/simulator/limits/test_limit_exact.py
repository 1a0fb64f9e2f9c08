"""The least time where it can be worked out by hand, and its parts against slow, plain forms.

That no policy beats it says nothing of a bound that is too low: these say how high it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moesim import Machine, Workload
from moesim.limits import min_time_ns
from moesim.limits import time as limit
from moesim.machine.profile import Compute, Cpu, Disk, LinkProfile
from moesim.sizes import sizes_of
from support.workloads import make_workload

NS = 1e-9
# Copies of 10 ns, layers of 5, experts of 3.
PLAIN = Machine(
    "by hand", "", "published", LinkProfile(1e9), Compute(layer_s=5 * NS, expert_s=3 * NS)
)
WITH_DISK = replace(PLAIN, disk=Disk(0.5e9))  # and reads of 20


def least_ns(workload: Workload, on: Machine, slots: int = 0, **more: Any) -> int:
    return min_time_ns(workload, on, sizes_of(workload.meta, 10), slots, "layer", **more)


@pytest.mark.parametrize(("buffers", "spared"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (9, 4)])
@pytest.mark.parametrize("disk", [None, WITH_DISK.disk])
def test_a_buffer_spares_one_copy_of_every_step_but_the_first(
    buffers: int, spared: int, disk: Disk | None
) -> None:
    """Two steps of 50 that want four experts, without slots. Each: 50 | 4 copies of 10 | the last
    expert, 3; with a disk 4 reads of 20 and the last one's copy of 10. What the buffers hold when
    the second gate speaks need not come after it; if that is all, compute takes 50 + 4 x 3. And
    eight of either come after the first gate."""
    on = replace(PLAIN, compute=Compute(layer_s=50 * NS, expert_s=3 * NS), disk=disk)

    def window_ns(copies: int) -> int:
        return 50 + (copies * 20 + 10 if disk else copies * 10) + 3

    second = max(window_ns(4 - spared), 50 + 4 * 3) if spared < 4 else 50 + 4 * 3
    workload = make_workload([(0, (0, 1, 2, 3))] * 2, 1, 4)
    assert least_ns(workload, on, buffers=buffers) == max(window_ns(4) + second, window_ns(8))


def test_latencies_come_in_rounds_of_as_many_as_there_are_streams() -> None:
    """Five copies of 10 ns with a latency of 30: one stream 5 x 40; two streams three rounds of
    40; three streams two rounds of 40, and the bytes alone take 30 + 50."""
    workload = make_workload([(0, (0, 1, 2, 3, 4))], 1, 5)
    for streams, link_ns in ((1, 200), (2, 120), (3, 80)):
        on = replace(PLAIN, link=LinkProfile(1e9, 30 * NS, streams))
        assert least_ns(workload, on) == 5 + link_ns + 3
    # In pieces, guesses have as many streams again: two rounds of four, three of two.
    for streams, link_ns in ((1, 120), (2, 80)):
        on = replace(PLAIN, link=LinkProfile(1e9, 30 * NS, streams, chunk_bytes=5))
        assert least_ns(workload, on) == 5 + link_ns + 3


def test_prompts_are_left_out_where_decoding_is_measured() -> None:
    """A prompt of two experts, a decoded token of one that the slots cannot hold already."""
    workload = make_workload([(0, (0, 1)), (0, (2,)), (0, (3,))], 1, 4, tokens=[2, 1, 1])
    assert least_ns(workload, PLAIN, decoding=True) == 2 * (5 + 10 + 3)
    assert least_ns(workload, PLAIN) == 5 + 20 + 3 + 2 * (5 + 10 + 3)


def test_with_cold_caches_each_sequence_is_bounded_apart() -> None:
    one = make_workload([(0, (0,)), (0, (0,))], 1, 4)
    assert least_ns(one, PLAIN, slots=1) == (5 + 10 + 3) + (5 + 3)


@pytest.mark.parametrize(
    ("n_steps", "fine_units", "scales"),
    [
        (2, 1 << 17, [(1, 32), (8, 32)]),
        (2 * 256, 1 << 17, [(1, 32), (8, 32)]),
        (2 * 256 + 1, 1 << 17, [(1, 32), (8, 32), (512, 1)]),
        (2 * 1024, 1 << 17, [(1, 32), (8, 32), (512, 1), (1024, 1)]),
        (2 * 9, 9, [(1, 32), (8, 32)]),
        (2 * 9, 8, [(2, 1), (4, 1), (8, 1), (16, 1)]),
        (2, 0, []),
    ],
)
def test_windows_cover_the_run(
    n_steps: int, fine_units: int, scales: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two layers: fine ones up to 256 units on, then each twice as long, up to the whole run."""
    monkeypatch.setattr(limit, "FINE_UNITS", fine_units)
    workload = make_workload([(i % 2, (0,)) for i in range(n_steps)], 2, 1)
    assert limit._scales(workload) == scales


demands = st.lists(st.permutations(range(4)).map(lambda p: tuple(p[: 1 + p[0]])), max_size=30)


@given(demands.filter(bool), st.integers(1, 3), st.sampled_from([1, 2, 5, 12]), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_blocks_change_nothing(
    demands: list[tuple[int, ...]], n_layers: int, block: int, slots: int
) -> None:
    steps = [(i % n_layers, experts) for i, experts in enumerate(demands)]
    on = replace(WITH_DISK, disk=Disk(0.5e9, host_bytes=20))
    expected = least_ns(make_workload(steps, n_layers, 4), on, slots)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limit, "BLOCK_STEPS", block)
        assert least_ns(make_workload(steps, n_layers, 4), on, slots) == expected


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=8),
    st.integers(1, 9),
    st.integers(0, 60),
    st.integers(1, 3),
    st.integers(1, 9),
)
def test_the_best_share_for_the_cpu_is_the_best_of_all_shares(
    requests: list[int], rest_ns: int, fixed_ns: int, workers: int, each_ns: int
) -> None:
    """The slow form tries every share of the requests."""
    counts = np.array(requests, np.int64)

    def beside(on_cpu: Any) -> Any:
        return fixed_ns + np.maximum(counts - on_cpu, 0) * rest_ns

    def cpu_ns(on_cpu: Any) -> Any:
        return -(-on_cpu * each_ns // workers)

    found = limit._balanced(beside, cpu_ns, counts)
    shares = np.arange(13)[:, None]
    every = np.where(shares <= counts, np.maximum(beside(shares), cpu_ns(shares)), 1 << 40)
    assert found.tolist() == every.min(axis=0).tolist()


def test_the_cpu_takes_what_the_link_would_take_longer_for() -> None:
    """Four missing experts, copies of 10, 8 on the CPU. Two there take 16 while two cross, in
    5 + 20 + 3; three there take 24, and the one that crosses 18: that is the least."""
    workload = make_workload([(0, (0, 1, 2, 3))], 1, 4)
    on = replace(PLAIN, cpu=Cpu(1, expert_s=8 * NS))
    assert least_ns(workload, on) == 24
    assert least_ns(workload, replace(on, cpu=Cpu(2, expert_s=8 * NS))) == 16
