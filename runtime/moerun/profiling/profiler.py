"""Measures this machine with this model: the constants of a machine profile that moesim reads.

Everything is measured on live decoding as it will be used: LRU on a part of the experts, behind
the link that is asked for, with the waiting taken out. (With all experts resident the caches of
an idle-free processor are warmer, and the constants too good.) Each run gives means, so that the
constants add up to the time it took; the profile holds the medians over interleaved runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import NamedTuple, Self

import torch
from moepolicy import find_policy
from moepolicy.amounts import counted

from moerun.checkpoint.families import find_experts
from moerun.devices import freeze_loaded_objects
from moerun.live.gates import SessionExperts
from moerun.live.prompt import context_tokens
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.live.work import Generated
from moerun.offload.experts import attach
from moerun.profiling.compute import ComputeCost, StepTimes, Stopwatch, costs
from moerun.profiling.cpu import CpuCost, CpuExpertBench
from moerun.profiling.link import LinkCost, measure_link
from moerun.profiling.undisturbed import UNDISTURBED_WAIT, least_disturbed
from moerun.ranges import check_rounds
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.progress import Notify, silent

DECODING_S = 2.0  # what one run aims at, where it is not told how long to decode
DECODED_TOKENS = (16, 192)  # but not fewer or more
PROMPT_TOKENS = 64
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
class MachineProfile:
    """``waited`` is the share of its time that the most disturbed turn waited for a processor;
    ``device`` is "gpu" or "cpu"."""

    name: str
    description: str
    link: LinkCost
    compute: ComputeCost
    cpu: CpuCost
    device: str
    waited: float = 0.0

    @property
    def note(self) -> str:
        """A warning where other programs disturbed the measurement, else ""."""
        if self.waited <= UNDISTURBED_WAIT:
            return ""
        return (
            f"unreliable: other programs kept the measurement waiting for "
            f"{100 * self.waited:.0f} % of the time"
        )

    def to_toml(self) -> str:
        """The profile as `moesim compare --machine FILE` reads it."""
        lines = [
            f"name = {_quoted(self.name)}",
            'source = "measured"',
            f"device = {_quoted(self.device)}",
            f"description = {_quoted('; '.join(filter(None, (self.description, self.note))))}",
        ]
        sections: list[tuple[str, LinkCost | ComputeCost | CpuCost]]
        sections = [("link", self.link), ("compute", self.compute), ("cpu", self.cpu)]
        for section, values in sections:
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {_number(value)}" for key, value in asdict(values).items()]
        return "\n".join(lines) + "\n"


class Turn(NamedTuple):
    """What one turn of a profiler measured."""

    link: LinkCost
    compute: ComputeCost
    cpu: CpuCost


def measure(
    store: ExpertStore,
    settings: Settings,
    name: str,
    *,
    repeats: int = REPEATS,
    report: Notify | None = None,
) -> MachineProfile:
    """Profile ``store`` with the device, link and slots of ``settings``; takes some seconds.

    Where other programs keep the processors from it, up to three times as long, and the profile's
    description says so if that did not help. ``report`` is told of each turn.
    """
    check_rounds(repeats)
    tell = report or silent
    with Profiler(store, settings) as profiler:
        turns = least_disturbed(profiler.turn, repeats, lambda n: tell(f"measuring, turn {n}"))
        profile = profiler.result(name, [turn.found for turn in turns])
    return replace(profile, waited=max(turn.waited for turn in turns))


class Profiler:
    """Measures in turns, between which other things may be measured: machines change their pace."""

    def __init__(
        self,
        store: ExpertStore,
        settings: Settings,
        *,
        prompt: str | None = None,
        decoded_tokens: int | None = None,
    ) -> None:
        """``prompt`` is what to read (None: some text); ``decoded_tokens`` is how many are to
        follow (None: as many as take some seconds).

        Attention costs more the longer the text, and prefetching the more it copies: measure with
        the text that will be run.
        """
        self._store = store
        self._settings = settings
        self._watching_s: list[float] = []
        with ExitStack() as stack:
            self._plain, self._guessing = (
                stack.enter_context(
                    _Bench(
                        store, replace(settings, policy=find_policy(policy)), prompt, decoded_tokens
                    )
                )
                for policy in ("lru", "lru-spec")
            )
            runner = self._plain.runner
            module = find_experts(runner.model)[0][1]
            self._cpu_experts = CpuExpertBench(store, settings, runner.session.link, module)
            stack.callback(self._cpu_experts.close)
            self._stack = stack.pop_all()
        self._plain.run()  # the first one warms up
        self._guessing.run()
        freeze_loaded_objects()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def turn(self) -> Turn:
        """Measure everything once."""
        link, n_bytes = measure_link(self._store, self._settings), self._store.record_bytes
        runs = self._plain.run(), self._guessing.run()
        self._watching_s += [run.watching_s for run in runs]
        watching_s = median(self._watching_s)
        cost, guessing = (costs(run.steps, link, n_bytes, watching_s) for run in runs)
        # Experts computed during a prefetch are slower, too: that is a cost of prefetching.
        experts = self._store.index.top_k
        extra_s = guessing.layer_s - cost.layer_s + experts * (guessing.expert_s - cost.expert_s)
        cost = replace(cost, prefetch_s=max(extra_s, 0.0))
        return Turn(link, cost, self._cpu_experts.run())

    def result(self, name: str, turns: Sequence[Turn]) -> MachineProfile:
        """The medians over ``turns``."""
        index = self._store.index
        return MachineProfile(
            name=name,
            description=f"Measured by moerun profile with {index.model} ({index.expert_label} "
            f"experts of {self._store.record_bytes} bytes) on {self._settings.device}, "
            f"{counted(torch.get_num_threads(), 'thread')}: right for this model at this "
            "precision.",
            link=LinkCost.median_of([turn.link for turn in turns]),
            compute=ComputeCost.median_of([turn.compute for turn in turns]),
            cpu=CpuCost.median_of([turn.cpu for turn in turns]),
            device="cpu" if self._settings.device.type == "cpu" else "gpu",
        )


class Watched(NamedTuple):
    """A run's steps, and how much longer each of them took than unwatched."""

    steps: list[StepTimes]
    watching_s: float


class _Bench:
    """A model to be run and timed again and again."""

    def __init__(
        self,
        store: ExpertStore,
        settings: Settings,
        prompt: str | None,
        decoded_tokens: int | None,
    ) -> None:
        self.runner = Runner(store, settings)
        self.runner.session.wait_compiled()
        self._watch = Stopwatch(self.runner.experts, self.runner.session, settings.device)
        limit = context_tokens(self.runner.model) or (1 << 30)
        self.prompt = self.runner.encode(TEXT if prompt is None else prompt)
        if prompt is None:
            self.prompt = self.prompt[:, : max(2, min(PROMPT_TOKENS, limit // 2))]
        self._room = limit - self.prompt.shape[1] - 1
        self._asked = decoded_tokens
        self._tokens = min(DECODED_TOKENS[0], self._room)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()

    def run(self) -> Watched:
        """A prompt and its decoding, unwatched and watched; the first, short one says how long
        the next may be."""
        self._attach(self.runner.experts)
        alone = self._generate()
        self._attach(self._watch)
        self._watch.steps.clear()
        watched = self._generate()
        least, most = DECODED_TOKENS
        aim = min(max(round(DECODING_S * watched.tokens_per_s), least), most)
        self._tokens = min(self._asked or aim, self._room)
        steps = watched.decoded_tokens * self.runner.store.n_layers
        watching_s = (watched.decode_s - alone.decode_s) / steps
        return Watched(list(self._watch.steps), watching_s)

    def _attach(self, provider: SessionExperts | Stopwatch) -> None:
        attach([module for _, module in find_experts(self.runner.model)], provider)

    def _generate(self) -> Generated:
        sampling = Sampling(max_new_tokens=self._tokens + 1, stop=False)
        return self.runner.generation().run(self.prompt, sampling)


def _quoted(text: str) -> str:
    # A JSON string is a TOML basic string.
    return json.dumps(text, ensure_ascii=False)


def _number(value: float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else f"{value:.6g}"
