"""One bench: a model of random weights decodes forced routing under several policies in turns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, cast

from moepolicy import Context, PolicyError, PolicySpec
from moepolicy.refusals import Refusals

from moerun.bench.decoding import ForcedDecoder, MeasuredTimings
from moerun.bench.engines import HitsOnly, LentLink, ReleasedEngine, link_bytes_per_s
from moerun.bench.fit import bench_memory, fit_slots, refuse_too_big
from moerun.bench.generated import GeneratedModel
from moerun.bench.ondisk import make_store
from moerun.bench.routing import ForcedRouting
from moerun.bench.schedule import BenchSchedule
from moerun.devices import freeze_loaded_objects
from moerun.kernels.slots import SlotForm
from moerun.links import Link, Throttle
from moerun.live.assembly import make_cpu_experts, make_link
from moerun.live.gates import SessionExperts
from moerun.live.session import Session
from moerun.live.totals import Totals
from moerun.memory.libraries import keep_little
from moerun.memory.peak import Peak
from moerun.offload.cpu_experts import CpuExperts
from moerun.offload.experts import Sums
from moerun.policies import require_some, with_constants
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.progress import Notify, RecordProgress, silent

RELEASED = "released"


class Timed(NamedTuple):
    """One run of one row: seconds of the measured tokens, and what they moved."""

    decode_s: float
    totals: Totals
    bytes_moved: int


@dataclass
class BenchResults:
    """What the rounds measured, one entry a round.

    link_rates       bytes/s of the link alone
    compute          decoding with every expert there
    without_experts  decoding without computing any, where a policy spares some
    runs             by policy, and the released engine's
    refused          policies that could not run, and why
    """

    link_rates: list[float] = field(default_factory=list)
    compute: list[Timed] = field(default_factory=list)
    without_experts: list[Timed] = field(default_factory=list)
    runs: dict[str, list[Timed]] = field(default_factory=dict)
    refused: Refusals = field(default_factory=dict)


class Bench(AbstractContextManager["Bench"]):
    """A model, its gates forced, and a link whose slots every policy takes over in its turn.

    The class is long because the runs of a round share one model, one link and one memory plan.
    """

    def __init__(
        self,
        generated: GeneratedModel,
        routing: ForcedRouting,
        settings: Settings,
        schedule: BenchSchedule,
        *,
        low: str | None = None,
        folder: Path | None = None,
        sums: Sums = "grouped_mm",
        report: Notify | None = None,
        progress: RecordProgress | None = None,
    ) -> None:
        """``settings`` say what `moerun` is told, without the policy; ``low`` is a second precision
        of the experts. ``folder``: keep them there, on disk. ``sums`` is as for `attach`.

        Raises RunError for what does not fit.
        """
        schedule.check(low=low is not None, machine=settings.machine is not None)
        tell, released = report or silent, schedule.released
        self.generated, self.routing, self.schedule = generated, routing, schedule
        self.on_disk = folder
        labels = [policy.label for policy in schedule.policies]
        self.results = BenchResults(runs={name: [] for name in labels + [RELEASED] * released})
        # A prompt of one token, then the others.
        context_tokens = 1 + schedule.forced_tokens
        self.settings = replace(settings, context_tokens=context_tokens, prompt_tokens=1)
        lower = generated.at(low) if low is not None else None
        self._low_bytes = lower.index.layout.record_bytes if lower else None
        self._fit(lower, tell)
        with ExitStack() as opened:
            self._make(lower, sums, opened, tell, progress)
            self._opened = opened.pop_all()

    def _fit(self, lower: GeneratedModel | None, tell: Notify) -> None:
        """Plan the memory; RunError where this machine has too little."""
        generated, settings = self.generated, self.settings
        self.memory = fit_slots(generated, lower, settings, self.schedule, self._context(0))
        if settings.memory_bytes is not None:
            tell(self.memory.table().rstrip())
        needed = bench_memory(generated, lower, settings, self.memory)
        refuse_too_big(needed, settings.device, on_disk=self.on_disk is not None)
        tell(f"making {needed.expert_bytes / 1e9:.1f} GB of random experts")

    def _make(
        self,
        lower: GeneratedModel | None,
        sums: Sums,
        opened: ExitStack,
        tell: Notify,
        progress: RecordProgress | None,
    ) -> None:
        """Experts, link and model; ``opened`` closes them."""
        folder, device = self.on_disk, self.settings.device
        self.store = opened.enter_context(make_store(self.generated, folder, device, progress))
        if lower is not None:
            where = folder / f"low-{lower.precisions.expert}" if folder else None
            low = opened.enter_context(make_store(lower, where, device, progress))
            self.settings = replace(self.settings, low=low)
        self._peak = Peak(self.store, device)
        if self.settings.memory_bytes is not None:
            keep_little(on_host=device.type == "cpu")
        n_slots = self.store.n_layers * self.slots + self.memory.staging
        form = SlotForm(self.generated.shape, self.generated.index.precision, device)
        self._link = LentLink(make_link(self.store, form, self.settings, n_slots))
        opened.callback(self._link.owned.close)
        tell("making the model")
        self.model = self.generated.build(self.store, device)
        self._decoder = ForcedDecoder(self.model, self.routing, sums)
        opened.callback(self._decoder.close)

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def slots(self) -> int:
        """Slots of a layer."""
        return self.memory.slots

    @property
    def last_ids(self) -> list[int]:
        """The tokens that the last run decoded."""
        return self._decoder.last_ids

    @property
    def peak_bytes(self) -> int:
        """The most of the device's memory it has held, as a budget counts it; on the CPU without
        the experts in memory, which stand for a disk."""
        return self._peak.n_bytes

    @property
    def low(self) -> ExpertStore | None:
        """The experts at the lower precision."""
        return self.settings.low

    @property
    def link_has_one_rate(self) -> bool:
        """False where host memory holds some of the experts, and a disk the others."""
        stores = [store for store in (self.store, self.low) if store]
        all_bytes = sum(store.n_keys * store.record_bytes for store in stores)
        return self.settings.host_bytes is None or self.settings.host_bytes >= all_bytes

    def _context(self, slots: int) -> Context:
        index = self.generated.index
        context = Context(
            n_layers=index.n_layers,
            n_experts=index.n_experts,
            top_k=index.top_k,
            slots=slots,
            scope=self.settings.scope,
            counts=self.routing.counts(),
        )
        policies, machine = self.schedule.policies, self.settings.machine
        return with_constants(context, index, self._low_bytes, machine, policies)

    def run(self, report: Notify | None = None) -> None:
        """All rounds; each measures the link, compute alone, then every policy."""
        tell, results = report or silent, self.results
        tell("warming up")
        self._measure_link()
        self._decoder.decode(self._hits_only(), MeasuredTimings(0), tokens=2)
        freeze_loaded_objects()
        for number in range(1, self.schedule.rounds + 1):
            of = f"round {number} of {self.schedule.rounds}"
            tell(f"{of}: the link, and compute alone")
            results.link_rates.append(self._measure_link())
            results.compute.append(self._compute_alone())
            if self.schedule.spares:
                results.without_experts.append(self._compute_alone(computing=False))
            for policy in self.schedule.policies:
                if policy.label in results.runs:
                    tell(f"{of}: {policy.label}")
                    self._try_policy(policy)
            if self.schedule.released:
                tell(f"{of}: {RELEASED}")
                results.runs[RELEASED].append(self._run_released())

    def _measure_link(self) -> float:
        return link_bytes_per_s(self._link, self.store, self.settings.link_bytes_per_s)

    def _hits_only(self, *, computing: bool = True) -> HitsOnly:
        return HitsOnly(self._link.slots, self.store.n_experts, computing=computing)

    def _compute_alone(self, *, computing: bool = True) -> Timed:
        timings, hits = self._timings(), self._hits_only(computing=computing)
        self._decoder.decode(hits, timings, self.schedule.forced_tokens)
        return Timed(timings.measured_s, Totals(), 0)

    def _timings(self, on_warm: Callable[[], None] = lambda: None) -> MeasuredTimings:
        return MeasuredTimings(self.schedule.warm_up, on_warm)

    def _try_policy(self, policy: PolicySpec) -> None:
        """Run a policy; one that fails is left out from now on. PolicyError where none is left."""
        results = self.results
        try:
            results.runs[policy.label].append(self.run_policy(policy))
        except PolicyError as error:
            results.refused[policy.label] = str(error)
            del results.runs[policy.label]
            require_some([name for name in results.runs if name != RELEASED], results.refused)

    def run_policy(self, policy: PolicySpec) -> Timed:
        """One run, from a cold cache. Raises PolicyError where the policy fails."""
        session = Session(
            self._context(self.slots),
            policy,
            lambda _n_slots: cast(Link, self._link),
            record_bytes=self.store.record_bytes,
            low_record_bytes=self.low.record_bytes if self.low else 0,
            make_cpu_experts=self._make_cpu_experts if "cpu" in policy.requires else None,
            compiling=self.memory.compiling,
        )
        if self.routing.weight_rule is not None:
            session.set_weight_rule(self.routing.weight_rule)
        with session:
            session.wait_compiled()
            warm: list[Totals] = []
            timings = self._timings(lambda: warm.append(session.totals))
            tokens, horizon = self.schedule.forced_tokens, policy.horizon
            experts = SessionExperts(session)
            try:
                self._decoder.decode(experts, timings, tokens, experts, horizon=horizon)
                totals = session.totals.since(warm[0])
            finally:
                session.settle()  # the link is another's next
        return Timed(timings.measured_s, totals, totals.bytes_loaded)

    def _make_cpu_experts(self, _lent: Link) -> CpuExperts:
        return make_cpu_experts(self.store, self.settings, self._link.owned)

    def _run_released(self) -> Timed:
        rate = self.settings.link_bytes_per_s
        engine = ReleasedEngine(
            self._link,
            n_layers=self.store.n_layers,
            n_experts=self.store.n_experts,
            slots=self.slots,
            record_bytes=self.store.record_bytes,
            throttle=Throttle(rate) if rate else None,
            device=self.settings.device,
        )
        timings = self._timings(engine.restart_counts)
        self._decoder.decode(engine, timings, self.schedule.forced_tokens)
        return Timed(timings.measured_s, engine.totals, engine.bytes_moved)
