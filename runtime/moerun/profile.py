"""Measures this machine with this model: the constants of a machine profile that moesim reads.

Everything is measured on live decoding as it will be used: LRU on a part of the experts, behind
the link that is asked for, with the waiting taken out. (With all experts resident the caches of
an idle-free processor are warmer, and the constants too good.) Each run gives means, so that the
constants add up to the time it took; the profile holds the medians over interleaved runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from queue import SimpleQueue
from statistics import fmean, median
from typing import Any, Self

import torch
from moepolicy import find_policy

from moerun.asidecost import AsideBench, CpuCost
from moerun.devices import calm_collector
from moerun.errors import RunError
from moerun.experts import attach
from moerun.families import find_experts
from moerun.forms import SlotForm
from moerun.generate import Sampling, context_tokens
from moerun.runner import Runner, Settings, make_link
from moerun.session import Session
from moerun.store import ExpertStore

DECODING_S = 2.0  # what one run aims at, where it is not told how long to decode
DECODED_TOKENS = (16, 192)  # but not fewer or more
PROMPT_TOKENS = 64
LINK_COPIES = 64
REPEATS = 5
TEXT = (
    "Call me Ishmael. Some years ago - never mind how long precisely - having little or no money "
    "in my purse, and nothing particular to interest me on shore, I thought I would sail about a "
    "little and see the watery part of the world. It is a way I have of driving off the spleen, "
    "and regulating the circulation. Whenever I find myself growing grim about the mouth; whenever "
    "it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing "
    "before coffin warehouses, and bringing up the rear of every funeral I meet; then, I account "
    "it high time to get to sea as soon as I can."
)


@dataclass(frozen=True)
class LinkCost:
    """``latency_s`` is what a copy that compute waits for takes beyond its bytes."""

    bytes_per_s: float
    latency_s: float
    streams: int


@dataclass(frozen=True)
class ComputeCost:
    """Seconds; the entries are those of moesim's profiles.

    token_s          once a forward pass: embedding, head, sampling, the loop around them
    layer_s          a layer outside its experts: attention, norms, gate, policy, locks
    layer_token_s    each further token of a batch in such a layer
    prefetch_s       more in a layer where the policy predicts and fetches ahead: the gates it
                     asks, and what its copies take from compute
    expert_s         one expert's compute for one token
    expert_token_s   each further token in it
    """

    token_s: float
    layer_s: float
    layer_token_s: float
    prefetch_s: float
    expert_s: float
    expert_token_s: float

    @classmethod
    def median_of(cls, runs: list[Self]) -> Self:
        return cls(**{f.name: median(getattr(run, f.name) for run in runs) for f in fields(cls)})


@dataclass(frozen=True)
class MachineProfile:
    name: str
    description: str
    link: LinkCost
    compute: ComputeCost
    cpu: CpuCost

    def to_toml(self) -> str:
        """The profile as `moesim compare --machine FILE` reads it."""
        lines = [
            f"name = {_quoted(self.name)}",
            'source = "measured"',
            f"description = {_quoted(self.description)}",
        ]
        sections: list[tuple[str, LinkCost | ComputeCost | CpuCost]]
        sections = [("link", self.link), ("compute", self.compute), ("cpu", self.cpu)]
        for section, values in sections:
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {_number(value)}" for key, value in asdict(values).items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class StepTimes:
    """One step: when its gate had chosen, when its last expert was done, what each one took."""

    layer: int
    tokens: int
    entered_s: float
    left_s: float
    stall_s: float
    experts: tuple[tuple[int, float], ...]  # tokens, seconds

    @property
    def serving_s(self) -> float:
        """What serving took besides computing experts and waiting for them: policy and locks."""
        spent_s = self.left_s - self.entered_s
        return spent_s - self.stall_s - sum(seconds for _, seconds in self.experts)


class Stopwatch:
    """Stands between the model and its session, and notes when each step and expert ran."""

    def __init__(self, session: Session, device: torch.device) -> None:
        self._session = session
        self._device = device
        self.steps: list[StepTimes] = []

    def serve(
        self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> Iterator[tuple[int, Any]]:
        tokens = len(top_k_index)
        used = [1] * self._session.context.n_experts
        if tokens > 1:
            used = torch.bincount(top_k_index.flatten(), minlength=len(used)).tolist()
        experts = []
        stalled_s = self._session.totals.stall_s
        entered_s = self._now()
        for expert, slot in self._session.serve(layer, top_k_index, top_k_weights):
            given_s = self._now()
            yield expert, slot
            experts.append((used[expert], self._now() - given_s))
        left_s = self._now()
        stall_s = self._session.totals.stall_s - stalled_s
        self.steps.append(StepTimes(layer, tokens, entered_s, left_s, stall_s, tuple(experts)))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def measure(
    store: ExpertStore, settings: Settings, name: str, *, repeats: int = REPEATS
) -> MachineProfile:
    """Profile ``store`` with the device, link and slots of ``settings``; takes some seconds."""
    if repeats < 1:
        raise RunError(f"repeats must be 1 or more, not {repeats}")
    with Profiler(store, settings) as profiler:
        for _ in range(repeats):
            profiler.turn()
        return profiler.result(name)


class Profiler:
    """Measures in turns, between which other things may be measured: machines change their pace."""

    def __init__(
        self,
        store: ExpertStore,
        settings: Settings,
        *,
        lengths: tuple[int, int | None] = (PROMPT_TOKENS, None),
    ) -> None:
        """``lengths``: tokens to read and to decode (None: as many as take some seconds).

        Attention costs more the longer the text: measure at the lengths that will be run.
        """
        self._store = store
        self._settings = settings
        self._costs: list[ComputeCost] = []
        self._links: list[LinkCost] = []
        self._cpus: list[CpuCost] = []
        with ExitStack() as stack:
            self._plain, self._guessing = (
                stack.enter_context(
                    _Bench(store, replace(settings, policy=find_policy(policy)), *lengths)
                )
                for policy in ("lru", "lru-spec")
            )
            runner = self._plain.runner
            module = find_experts(runner.model)[0][1]
            self._aside = AsideBench(store, settings, runner.session.link, module)
            stack.callback(self._aside.close)
            self._stack = stack.pop_all()
        self._plain.run()  # the first one warms up
        self._guessing.run()
        calm_collector()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def turn(self) -> None:
        """Measure everything once."""
        cost, guessing = self._plain.run(), self._guessing.run()
        # Experts computed beside a prefetch are slower, too: that is the prefetching's to bear.
        experts = self._store.index.top_k
        extra_s = guessing.layer_s - cost.layer_s + experts * (guessing.expert_s - cost.expert_s)
        extra_s = max(extra_s, 0.0)
        self._costs.append(replace(cost, prefetch_s=extra_s))
        self._links.append(measure_link(self._store, self._settings))
        self._cpus.append(self._aside.run())

    def result(self, name: str) -> MachineProfile:
        """The medians over all turns."""
        index = self._store.index
        return MachineProfile(
            name=name,
            description=f"Measured by moerun profile with {index.model} ({index.precision} "
            f"experts of {self._store.record_bytes} bytes) on {self._settings.device}, "
            f"{torch.get_num_threads()} threads: right for this model at this precision.",
            link=LinkCost(
                bytes_per_s=median(link.bytes_per_s for link in self._links),
                latency_s=median(link.latency_s for link in self._links),
                streams=self._settings.streams,
            ),
            compute=ComputeCost.median_of(self._costs),
            cpu=CpuCost.median_of(self._cpus),
        )


class _Bench:
    """A model to be run and timed again and again."""

    def __init__(
        self,
        store: ExpertStore,
        settings: Settings,
        prompt_tokens: int,
        decoded_tokens: int | None,
    ) -> None:
        self.runner = Runner(store, settings)
        self.runner.session.wait_compiled()
        self.watch = Stopwatch(self.runner.session, settings.device)
        attach([module for _, module in find_experts(self.runner.model)], self.watch)
        limit = context_tokens(self.runner.model) or (1 << 30)
        prompt_tokens = max(2, min(prompt_tokens, limit // 2))
        text = self.runner.encode(TEXT)
        self.prompt = text.repeat(1, -(-prompt_tokens // text.shape[1]))[:, :prompt_tokens]
        self._room = limit - prompt_tokens - 1
        self._asked = decoded_tokens
        self._tokens = min(DECODED_TOKENS[0], self._room)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()

    def run(self) -> ComputeCost:
        """One prompt and its decoding; the first, short one says how long the next may be."""
        self.watch.steps.clear()
        sampling = Sampling(max_new_tokens=self._tokens + 1, stop=False)
        generated = self.runner.generation().run(self.prompt, sampling)
        least, most = DECODED_TOKENS
        aim = min(max(round(DECODING_S * generated.tokens_per_s), least), most)
        self._tokens = min(self._asked or aim, self._room)
        return costs(self.watch.steps)


def costs(steps: list[StepTimes]) -> ComputeCost:
    """The constants of one run: of whole passes, a prompt's first, then one token each."""
    decode = [step for step in steps if step.tokens == 1]
    prompt = [step for step in steps if step.tokens > 1]
    pairs = list(pairwise(decode))
    between = [b.entered_s - a.left_s for a, b in pairs if b.layer > 0]
    around = [b.entered_s - a.left_s for a, b in pairs if b.layer == 0]
    layer_s = fmean(between) + fmean(step.serving_s for step in decode)
    # Not of steps with a stall: what is computed beside a copy is slower, but off the clock.
    calm = [step for step in decode if not step.stall_s] or decode
    expert_s = fmean(seconds for step in calm for _, seconds in step.experts)
    batched = list(pairwise(prompt))
    batch_layer_s = fmean(b.entered_s - a.left_s + b.serving_s for a, b in batched if b.layer > 0)
    calls = [call for step in prompt for call in step.experts]
    further = sum(tokens - 1 for tokens, _ in calls)
    excess_s = sum(seconds for _, seconds in calls) - len(calls) * expert_s
    return ComputeCost(
        token_s=max(fmean(around) - fmean(between), 0.0),
        layer_s=layer_s,
        layer_token_s=max((batch_layer_s - layer_s) / (prompt[0].tokens - 1), 0.0),
        prefetch_s=0.0,
        expert_s=expert_s,
        expert_token_s=max(excess_s / further, 0.0) if further else 0.0,
    )


def measure_link(store: ExpertStore, settings: Settings) -> LinkCost:
    """The rate of copies behind each other, or the cap; and what a lone copy waits beyond that.

    The latency is taken where it matters: it is how long compute stands still for one missing
    expert, less that expert's bytes at the rate.
    """
    rate = settings.link_bytes_per_s or _raw_rate(store, settings)
    waits = []
    with Runner(store, replace(settings, policy=find_policy("lru"), slots=0)) as runner:
        for i in range(LINK_COPIES):
            before_s = runner.session.totals.stall_s
            layer, expert = divmod(i % store.n_keys, store.n_experts)
            _consume(runner.session, layer, torch.tensor([[expert]]))
            waits.append(runner.session.totals.stall_s - before_s)
    latency_s = max(median(waits) - store.record_bytes / rate, 0.0)
    return LinkCost(bytes_per_s=rate, latency_s=latency_s, streams=settings.streams)


def _raw_rate(store: ExpertStore, settings: Settings) -> float:
    """bytes/s of copies that each begin as the one before ends."""
    form = SlotForm(store.index.shape, store.index.precision, settings.device)
    link = make_link(store, form, settings, 1)
    ended: SimpleQueue[Exception | None] = SimpleQueue()
    left = LINK_COPIES

    def on_copied(key: int, error: Exception | None) -> None:
        nonlocal left
        left -= 1
        if error is None and left:
            link.submit((key + 1) % store.n_keys, 0)
        else:
            ended.put(error)

    link.start(on_copied)
    try:
        began_s = time.perf_counter()
        link.submit(0, 0)
        if (error := ended.get()) is not None:
            raise error
        return LINK_COPIES * store.record_bytes / (time.perf_counter() - began_s)
    finally:
        link.close()


def _consume(session: Session, layer: int, ids: torch.Tensor) -> None:
    """Ask for experts as a model would, and compute nothing."""
    weights = torch.full(ids.shape, 1.0 / ids.shape[1], device=ids.device)
    for _ in session.serve(layer, ids, weights):
        pass


def _quoted(text: str) -> str:
    # A JSON string is a TOML basic string.
    return json.dumps(text, ensure_ascii=False)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"
