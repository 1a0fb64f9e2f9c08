"""What a session asks of its link and in which order it serves, copy by copy, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from moepolicy import Context, Kind, Policy, PolicySpec, find_policy
from moerun.errors import RunError
from moerun.links import Done, LinkStatistics, Variant
from moerun.live import cache as cache_module
from moerun.live.session import Session
from moerun.offload.gate import GateOutput
from support.links import RECORD_BYTES, MemorySlot


class ByHand:
    """A link whose copies end when the test says so; ``asked`` is what the session asked."""

    def __init__(self, n_slots: int, streams: int, *, chunked: bool) -> None:
        self.streams = streams
        self.chunked = chunked
        self.statistics = LinkStatistics()
        self.slots = [MemorySlot() for _ in range(n_slots)]
        self.asked: list[tuple[Any, ...]] = []
        self.begins_s: list[float | None] = []
        self.memory = set(range(n_slots))

    def start(self, done: Done) -> None:
        self.done = done

    def submit(
        self,
        key: int,
        slot: int,
        variant: Variant = Variant.FULL,
        *,
        demand: bool = True,
        begin_s: float | None = None,
    ) -> None:
        assert slot in self.memory
        self.asked.append(("submit", key, demand))
        self.begins_s.append(begin_s)

    def want(self, key: int) -> None:
        self.asked.append(("want", key))

    def resize(self, withdrawn: Sequence[int], granted: Sequence[int]) -> None:
        assert set(withdrawn) <= self.memory
        assert not set(granted) & self.memory
        self.memory = self.memory - set(withdrawn) | set(granted)
        self.asked.append(("resize", len(withdrawn), len(granted)))

    def acquire(self, slot: int) -> None:
        self.asked.append(("acquire", slot))

    def release(self, slot: int) -> None:
        self.asked.append(("release", slot))

    def close(self) -> None: ...

    def end_at_once(self, *keys: int) -> None:
        """From now on copies of these keys (all of them where none is named) end as they begin."""
        submit = ByHand.submit

        def submitted(key: int, slot: int, variant: Variant = Variant.FULL, **how: Any) -> None:
            submit(self, key, slot, variant, **how)
            if not keys or key in keys:
                self.end(key)

        self.submit = submitted  # type: ignore[method-assign]

    def take(self) -> list[tuple[Any, ...]]:
        asked, self.asked = self.asked, []
        return asked

    def end(self, *keys: int) -> None:
        for key in keys:
            self.done(key, None, 7.5)


def made(
    policy: str = "lru",
    *,
    slots: int = 4,
    layers: int = 1,
    streams: int = 1,
    chunked: bool = False,
) -> tuple[Session, ByHand]:
    links: list[ByHand] = []

    def make_link(n_slots: int) -> Any:
        links.append(ByHand(n_slots, streams, chunked=chunked))
        return links[0]

    context = Context(layers, 4, 2, slots)
    session = Session(context, find_policy(policy), make_link, record_bytes=RECORD_BYTES)
    return session, links[0]


class ByExpert(Policy):
    """Expert 1 is left out, 2 has a substitute, 3 is computed on the CPU, others are loaded;
    a prompt's are all loaded."""

    requires = frozenset({"cpu"})
    lossy = True

    def __init__(self, context: Context) -> None:
        self.n_experts = context.n_experts

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        return int(candidates[0])

    def on_miss(self, step: Any, rank: int) -> int:
        answers = (Kind.LOAD, Kind.SKIP, Kind.SUBSTITUTE, Kind.COMPUTE)
        expert = int(step.experts[rank]) % self.n_experts
        return int(Kind.LOAD if step.tokens > 1 else answers[expert])

    def substitute(self, step: Any, rank: int, candidates: Any) -> int:
        return int(candidates[0])


class OnCpu:
    """Experts computed on the CPU, of which joining waits 1.5 s."""

    def __init__(self) -> None:
        self.joined = 0

    def expert(self, key: int) -> Any:
        return "on CPU", key

    def join(self) -> float:
        self.joined += 1
        return 1.5

    def drop(self) -> None: ...

    def close(self) -> None: ...


def test_what_is_not_loaded_comes_first_and_substitutes_before_arrivals() -> None:
    """Layer 1 of 4 experts: 0 is resident; the step wants 2, 1, 0 and 3."""
    links: list[ByHand] = []
    on_cpu: Any = OnCpu()

    def make_link(n_slots: int) -> Any:
        links.append(ByHand(n_slots, 1, chunked=False))
        return links[0]

    spec: Any = PolicySpec("by-expert", ByExpert)
    with Session(
        Context(2, 4, 2, 4),
        spec,
        make_link,
        record_bytes=RECORD_BYTES,
        make_cpu_experts=lambda _: on_cpu,
    ) as session:
        (link,) = links
        link.end_at_once()
        assert [e for e, _ in session.serve(1, *asks(0))] == [0]
        assert on_cpu.joined == 0
        place = session.cache.slot_of(4)
        link.take()
        served = list(session.serve(1, *asks(2, 1, 0, 3)))
        assert served == [
            (1, None),
            (3, ("on CPU", 7)),
            (0, link.slots[place]),
            (2, link.slots[place]),
        ]
        assert link.take() == [("acquire", place), ("release", place)] * 2
        totals = session.totals
        assert (totals.skipped, totals.substituted, totals.cpu_experts) == (1, 1, 1)
        assert (on_cpu.joined, totals.stall_s) == (1, 1.5)


def asks(*experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights of a token that wants ``experts``, heaviest first."""
    n = len(experts)
    return torch.tensor([experts]), torch.linspace(1, 0.5, n).view(1, n)


def test_hits_come_in_router_order_and_then_what_arrives_as_it_arrives() -> None:
    session, link = made(streams=3)
    with session:
        link.end_at_once(1, 3)
        for expert in (1, 3):
            assert [e for e, _ in session.serve(0, *asks(expert))] == [expert]
        link.take()
        items = iter(session.serve(0, *asks(2, 3, 0, 1)))
        assert next(items)[0] == 3
        place = session.cache.slot_of
        # Both missing ones are on their way before the first hit is computed.
        expected = [("submit", 2, True), ("submit", 0, True), ("acquire", place(3))]
        assert link.take() == expected
        assert next(items)[0] == 1
        assert link.take() == [("release", place(3)), ("acquire", place(1))]
        link.end(0, 2)
        assert next(items)[0] == 0
        assert link.take() == [("release", place(1)), ("acquire", place(0))]
        assert next(items)[0] == 2
        assert next(items, None) is None
        assert link.take() == [("release", place(0)), ("acquire", place(2)), ("release", place(2))]
        totals = session.totals
        assert (totals.steps, totals.requests, totals.hits, totals.misses) == (3, 6, 2, 4)


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_no_more_copies_are_under_way_than_there_are_streams(streams: int) -> None:
    session, link = made(streams=streams)
    with session:
        order = [3, 1, 0, 2]
        # Nothing is here, so the first one is waited for: a full link ends its oldest copy.
        submit, under_way = link.submit, []

        def submitted(key: int, slot: int, variant: Variant = Variant.FULL, **how: Any) -> None:
            submit(key, slot, variant, **how)
            under_way.append(key)
            assert len(under_way) <= streams
            if len(under_way) == streams or key == order[-1]:
                first = under_way.pop(0)
                link.end(first)

        link.submit = submitted  # type: ignore[method-assign]
        items = iter(session.serve(0, *asks(*order)))
        served = [next(items)[0]]
        while under_way:
            link.end(under_way.pop(0))
        served += [expert for expert, _ in items]
        assert served == order
        assert [key for _, key, _ in (a for a in link.take() if a[0] == "submit")] == order


def test_in_pieces_guesses_have_streams_of_their_own_and_are_wanted_when_late() -> None:
    """Layer 0 is asked for 0 and guesses experts 2 and 3 of layer 1, which then wants 3 and 1."""
    session, link = made("lru-spec:n=2,staging=4", layers=2, chunked=True)
    with session:
        ahead = torch.tensor([[[0.0, 0.0, 5.0, 9.0]]], dtype=torch.float16)
        output = GateOutput(torch.zeros(1, 4), ahead)
        link.end_at_once(0)
        assert [e for e, _ in session.serve(0, *asks(0), output)] == [0]
        # One guess on the one stream for guesses; the other waits for it, not for the demand.
        assert [a for a in link.take() if a[0] == "submit"] == [
            ("submit", 0, True),
            ("submit", 7, False),
        ]
        output = GateOutput(predicted=torch.full((1, 1, 4), np.nan, dtype=torch.float16))

        def end_when_wanted(key: int) -> None:
            link.asked.append(("want", key))
            link.end(key)

        link.want = end_when_wanted  # type: ignore[method-assign]  # of this link alone
        link.end_at_once(5)
        assert [e for e, _ in session.serve(1, *asks(3, 1), output)] == [3, 1]
        assert link.take()[:2] == [("want", 7), ("submit", 5, True)]
        assert session.totals.late == 1
        assert session.totals.useless_prefetches == 0


def test_a_copy_that_another_made_room_for_begins_where_that_ended() -> None:
    session, link = made(streams=1)
    with session:
        link.end_at_once()
        assert [e for e, _ in session.serve(0, *asks(1, 2))] == [1, 2]
        assert link.begins_s == [None, 7.5]


def test_waiting_alone_is_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two experts one is there when it is asked for; 3.5 s pass until the other is. The policy
    takes 0.25 s to be told of each."""
    session, link = made(streams=2)
    now_s = [10.0]
    clock = SimpleNamespace(perf_counter=lambda: now_s[0])
    monkeypatch.setattr(cache_module, "time", clock)

    def pass_time(seconds: float) -> None:
        now_s[0] += seconds

    session.cache.policy.on_load = lambda *_: pass_time(0.25)  # type: ignore[method-assign]
    with session:
        link.end_at_once(2)
        items = iter(session.serve(0, *asks(1, 2)))
        assert next(items)[0] == 2
        assert session.totals.stall_s == 0

        def wait() -> None:
            pass_time(3.5)
            link.end(1)

        monkeypatch.setattr(session._live.copy_ended, "wait", wait)
        assert next(items)[0] == 1
        assert (session.totals.stall_s, session.totals.decide_s) == (3.5, 0.5)
        assert next(items, None) is None


def test_what_nothing_is_copying_is_not_waited_for() -> None:
    session, _ = made()
    with session:
        session._live._pump = Mock()  # type: ignore[method-assign]
        with pytest.raises(RunError, match="an expert is waited for that nothing is copying"):
            list(session.serve(0, *asks(1)))


def test_memory_follows_the_slots_and_what_is_used_stays() -> None:
    session, link = made(slots=4, streams=3)
    with session:
        link.end_at_once()
        list(session.serve(0, *asks(0, 1, 2)))
        items = iter(session.serve(0, *asks(0, 1)))
        next(items)
        link.take()
        session.resize(0)  # 0 and 1 are of the step; expert 2's slot and the free one go
        assert link.take() == [("resize", 2, 0)]
        assert session.context.slots == 0
        assert next(items)[0] == 1
        assert next(items, None) is None
        assert ("resize", 2, 0) in link.take()
        assert len(link.memory) == 1  # the staging buffer
        session.resize(3)
        assert link.take() == [("resize", 0, 3)]
        session.resize(3)
        assert link.take() == []
