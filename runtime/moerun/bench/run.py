"""One bench: a model of random weights decodes forced routing under several policies in turns."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from moepolicy import Context, PolicyError, PolicySpec

from moerun.bench.engines import HitsOnly, LentLink, ReleasedEngine, copy_all
from moerun.bench.fit import Room, refuse_too_big
from moerun.bench.generated import GeneratedModel, GeneratedStore, Progress
from moerun.bench.ondisk import write_store
from moerun.bench.routing import ForcedGates, Routing
from moerun.checkpoint.families import find_experts
from moerun.devices import calm_collector
from moerun.errors import RunError, UsageError
from moerun.kernels.slots import SlotForm
from moerun.links import Link, Throttle
from moerun.live.assembly import check_lower, make_aside, make_link
from moerun.live.generate import Timings
from moerun.live.kvcache import new_cache
from moerun.live.sampling import Sampling
from moerun.live.session import Session
from moerun.live.totals import Totals
from moerun.memory.fit import plan_policies
from moerun.memory.peak import Peak
from moerun.memory.plan import MemoryPlan
from moerun.offload.cpu_experts import Aside
from moerun.offload.experts import Sums, attach
from moerun.policies import Refusals, refuse_beyond, refuse_unservable, require_some
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore

RELEASED = "released"
LINK_PROBE_S = 0.5  # what a measurement of the link aims at
_NOTHING = Totals._make([0] * len(Totals._fields))
Report = Callable[[str], None]


class Timed(NamedTuple):
    """One run of one row: seconds of the measured tokens, and what they moved."""

    decode_s: float
    totals: Totals
    bytes_moved: int


@dataclass(frozen=True)
class Plan:
    """What is to be run; token counts are of decoded tokens."""

    policies: tuple[PolicySpec, ...]
    tokens: int
    warm_up: int
    rounds: int
    released: bool

    @property
    def forced_tokens(self) -> int:
        """A first token stands for the prompt."""
        return 1 + self.warm_up + self.tokens

    def check(self, *, low: bool = False) -> None:
        """Raises RunError or PolicyError naming what is out of range, or that a policy needs the
        experts at a lower precision, too, and there is none (``low``)."""
        for name, least in (("tokens", 1), ("warm_up", 0), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"{name.replace('_', '-')} must be {least} or more, not {getattr(self, name)}"
                )
        for policy in self.policies:
            refuse_unservable(policy, low=low)

    def within(self, routing: Routing, refused: Refusals) -> Plan:
        """The plan without the policies that read predictions further ahead than ``routing`` has
        them, which join ``refused``. PolicyError where none is left."""
        fit = []
        for policy in self.policies:
            try:
                refuse_beyond(policy, routing.horizon, f"routing '{routing.source}'")
            except PolicyError as error:
                refused[policy.label] = str(error)
            else:
                fit.append(policy)
        require_some(fit, refused)
        return replace(self, policies=tuple(fit))

    @property
    def spares(self) -> bool:
        """Whether a policy may have experts computed elsewhere than on the device, or nowhere."""
        return any(policy.policy.lossy or "cpu" in policy.requires for policy in self.policies)


class Marked(Timings):
    """Notes when each token came, and calls back when warm-up ends."""

    def __init__(self, warm_up: int, on_warm: Callable[[], None]) -> None:
        super().__init__()
        self._warm_up = warm_up
        self._on_warm = on_warm

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.token_s) == self._warm_up + 1:
            self._on_warm()

    @property
    def measured_s(self) -> float:
        return self.token_s[-1] - self.token_s[self._warm_up]


class Bench(AbstractContextManager["Bench"]):
    """A model, its gates forced, and a link whose slots every policy takes over in its turn."""

    def __init__(
        self,
        generated: GeneratedModel,
        routing: Routing,
        settings: Settings,
        plan: Plan,
        *,
        low: str | None = None,
        folder: Path | None = None,
        sums: Sums = "grouped_mm",
        report: Report | None = None,
        progress: Progress | None = None,
    ) -> None:
        """``settings`` say what `moerun` is told, the policy aside; ``low`` is a second precision
        of the experts. ``folder``: keep them there, on disk. ``sums`` is as for `attach`.

        Raises RunError for what does not fit.
        """
        plan.check(low=low is not None)
        self._sums = sums
        tell = report or (lambda _: None)
        self.generated, self.routing, self.plan = generated, routing, plan
        lower = generated.at(low) if low is not None else None
        # A prompt of one token, then the others.
        context_tokens = 1 + plan.forced_tokens
        self.settings = replace(settings, context_tokens=context_tokens, prompt_tokens=1)
        self.memory = self._plan_memory(lower)
        self.on_disk = folder
        if settings.memory_bytes is not None:
            tell(self.memory.table().rstrip())
        refuse_too_big(self._room(lower), settings.device, on_disk=folder is not None)
        tell(f"making {_expert_bytes(generated, lower) / 1e9:.1f} GB of random experts")
        self.store = self._make_store(generated, folder, progress)
        if lower is not None:
            where = folder / f"low-{low}" if folder else None
            self.settings = replace(self.settings, low=self._make_store(lower, where, progress))
        self._peak = Peak(self.store, settings.device)
        self._n_slots = self.store.n_layers * self.slots + self.memory.staging
        form = SlotForm(generated.shape, generated.index.precision, settings.device)
        self._link = LentLink(make_link(self.store, form, self.settings, self._n_slots))
        try:
            tell("making the model")
            self.model = generated.build(self.store, settings.device)
            self._experts = [module for _, module in find_experts(self.model)]
            self._gates = ForcedGates(self.model, routing)
        except BaseException:
            self._link.owned.close()
            raise
        self.refused: Refusals = {}  # policies that could not run, and why
        self.last_ids: list[int] = []  # what the last run decoded
        self.link_rates: list[float] = []
        self.compute: list[Timed] = []
        self.without_experts: list[Timed] = []  # where a policy spares some
        self.runs: dict[str, list[Timed]] = {policy.label: [] for policy in plan.policies}
        if plan.released:
            self.runs[RELEASED] = []

    @property
    def slots(self) -> int:
        """Of a layer."""
        return self.memory.slots

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
        """Not so where host memory holds only some of the experts, and a disk the others."""
        stores = [store for store in (self.store, self.low) if store]
        all_bytes = sum(store.n_keys * store.record_bytes for store in stores)
        return self.settings.host_bytes is None or self.settings.host_bytes >= all_bytes

    def _plan_memory(self, lower: GeneratedModel | None) -> MemoryPlan:
        """What `moerun` would plan, with room for every policy; RunError where that cannot be."""
        settings = self.settings
        if lower is not None:
            settings = replace(settings, low=GeneratedStore(lower, held=False))
        store = GeneratedStore(self.generated, held=False)
        if settings.low:
            check_lower(store, settings.low)
        plan = plan_policies(store, settings, self.plan.policies, self._context(0))
        plan = replace(plan, slots=min(plan.slots, store.n_experts))
        if plan.slots < 0:
            raise UsageError(f"slots must be 0 or more, not {plan.slots}")
        if plan.slots < 1 and self.plan.released:
            raise UsageError(
                "the released engine needs 1 slot a layer or more: leave --baseline out"
            )
        return plan

    def _context(self, slots: int) -> Context:
        index = self.generated.index
        return Context(
            n_layers=index.n_layers,
            n_experts=index.n_experts,
            top_k=index.top_k,
            slots=slots,
            scope=self.settings.scope,
            counts=self.routing.counts(),
        )

    def _room(self, lower: GeneratedModel | None) -> Room:
        index, memory = self.generated.index, self.memory
        budgeted = self.settings.memory_bytes is not None
        staging_bytes = memory.staging * memory.slot_bytes
        return Room(
            expert_bytes=_expert_bytes(self.generated, lower),
            slot_bytes=memory.slots_bytes - staging_bytes,
            dense_bytes=self.generated.weights_bytes,
            staging_bytes=staging_bytes,
            n_layers=index.n_layers,
            layer_bytes=index.layer_bytes,
            all_slot_bytes=index.n_layers * index.n_experts * memory.slot_bytes if budgeted else 0,
            tier_bytes=self.settings.host_bytes,
        )

    def __exit__(self, *_: object) -> None:
        self._gates.close()
        self._link.owned.close()
        self.store.close()
        if self.low:
            self.low.close()

    def run(self, report: Report | None = None) -> None:
        """All rounds; each measures the link, compute alone, then every policy."""
        tell = report or (lambda _: None)
        tell("warming up")
        self._measure_link()
        self._decode(HitsOnly(self._link.slots, self.store.n_experts), None, tokens=2)
        calm_collector()
        for number in range(1, self.plan.rounds + 1):
            of = f"round {number} of {self.plan.rounds}"
            tell(f"{of}: the link, and compute alone")
            self.link_rates.append(self._measure_link())
            self.compute.append(self._compute_alone())
            if self.plan.spares:
                self.without_experts.append(self._compute_alone(computing=False))
            for policy in self.plan.policies:
                if policy.label in self.runs:
                    tell(f"{of}: {policy.label}")
                    self._try_policy(policy)
            if self.plan.released:
                tell(f"{of}: {RELEASED}")
                self.runs[RELEASED].append(self._run_released())

    def _make_store(
        self, generated: GeneratedModel, folder: Path | None, progress: Progress | None
    ) -> ExpertStore:
        if folder is not None:
            return write_store(generated, folder, progress)
        # A GPU's link copies all records into pinned memory of its own.
        held = self.settings.device.type == "cpu"
        return GeneratedStore(generated, held=held, progress=progress)

    def _measure_link(self) -> float:
        """bytes/s of copies that each begin as the one before ends, as far as a cap lets them."""
        n, n_keys = self._n_slots, self.store.n_keys
        took_s = copy_all(self._link, [(key % n_keys, key) for key in range(n)])
        if self.settings.link_bytes_per_s is not None:
            return self.settings.link_bytes_per_s
        copies = min(max(n, int(LINK_PROBE_S / took_s * n)), 4096)
        if copies > n:
            took_s = copy_all(self._link, [(key % n_keys, key % n) for key in range(copies)])
        return copies * self.store.record_bytes / took_s

    def _compute_alone(self, *, computing: bool = True) -> Timed:
        hits = HitsOnly(self._link.slots, self.store.n_experts, computing=computing)
        timings = self._decode(hits, None)
        return Timed(timings.measured_s, _NOTHING, 0)

    def _try_policy(self, policy: PolicySpec) -> None:
        """Run a policy; one that fails is left out from now on. PolicyError where none is left."""
        try:
            self.runs[policy.label].append(self.run_policy(policy))
        except PolicyError as error:
            self.refused[policy.label] = str(error)
            del self.runs[policy.label]
            require_some([name for name in self.runs if name != RELEASED], self.refused)

    def run_policy(self, policy: PolicySpec) -> Timed:
        session = Session(
            self._context(self.slots),
            policy,
            lambda _n_slots: cast(Link, self._link),
            record_bytes=self.store.record_bytes,
            low_record_bytes=self.low.record_bytes if self.low else 0,
            make_aside=self._make_aside if "cpu" in policy.requires else None,
            compiling=self.memory.compiling,
        )
        with session:
            session.wait_compiled()
            warm: list[Totals] = []
            try:
                timings = self._decode(
                    session, session, lambda: warm.append(session.totals), horizon=policy.horizon
                )
                totals = session.totals.since(warm[0])
            finally:
                session.settle()  # the link is another's next
        return Timed(timings.measured_s, totals, totals.bytes_loaded)

    def _make_aside(self, _lent: Link) -> Aside:
        return make_aside(self.store, self.settings, self._link.owned)

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
        warm: list[tuple[int, int, int]] = []
        timings = self._decode(
            engine, None, lambda: warm.append((engine.hits, engine.misses, engine.bytes_moved))
        )
        hits, misses, moved = (
            now - then
            for now, then in zip(
                (engine.hits, engine.misses, engine.bytes_moved), warm[0], strict=True
            )
        )
        totals = _NOTHING._replace(requests=hits + misses, hits=hits, misses=misses, loads=misses)
        return Timed(timings.measured_s, totals, moved)

    def _decode(
        self,
        provider: Any,
        session: Session | None,
        on_warm: Callable[[], None] = lambda: None,
        *,
        horizon: int = 0,
        tokens: int | None = None,
    ) -> Marked:
        """Decode the forced tokens from the first on, as `moerun` decodes any."""
        attach(self._experts, provider, self._sums)
        self._gates.start(session, horizon=horizon)
        timings = Marked(self.plan.warm_up if tokens is None else 0, on_warm)
        tokens = tokens or self.plan.forced_tokens
        decode_forced(self.model, timings, tokens, new_cache(self.model, 1 + tokens))
        self.last_ids = timings.token_ids
        return timings


def _expert_bytes(generated: GeneratedModel, lower: GeneratedModel | None) -> int:
    return generated.expert_bytes + (lower.expert_bytes if lower else 0)


def decode_forced(model: Any, timings: Marked, tokens: int, cache: Any = None) -> None:
    """Decode after a prompt of one token, with `generate` as it stands; gates are forced before.

    ``cache`` is of keys and values; None for transformers' own.
    """
    prompt = torch.ones((1, 1), dtype=torch.int64, device=model.device)
    config = replace(Sampling(), stop=False).config(model, tokens)
    with torch.inference_mode():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            generation_config=config,
            streamer=timings,
        )


def simulated_tokens_per_s(bench: Bench, machine: str | Path) -> dict[str, float]:
    """What `moesim` predicts for the measured tokens, by policy: asked by its command.

    The simulator starts cold, too: a run of the warm-up alone is taken off. Raises RunError with
    its message where it fails.
    """
    found = {}
    with tempfile.TemporaryDirectory(prefix="moerun-bench-") as folder:
        trace = Path(folder) / "forced.parquet"
        bench.routing.write_trace(trace, bench.generated.index)
        for policy in bench.plan.policies:
            if policy.label in bench.refused:
                continue
            cold_s, all_s = (
                tokens / _simulate(bench, trace, policy.label, machine, tokens)
                for tokens in (1 + bench.plan.warm_up, bench.plan.forced_tokens)
            )
            found[policy.label] = bench.plan.tokens / (all_s - cold_s)
    return found


def _simulate(bench: Bench, trace: Path, policy: str, machine: str | Path, tokens: int) -> float:
    command = [
        *(sys.executable, "-c", "from moesim.cli import main; main()"),
        *("compare", policy, "--trace", str(trace), "--tokens", str(tokens)),
        *("--slots", str(bench.slots), "--scope", bench.settings.scope),
        *("--machine", str(machine), "--expert-bytes", str(bench.store.record_bytes)),
        *("--calibration", str(trace)),  # as the bench counted them: over all forced tokens
        *("--format", "json"),
    ]
    if bench.low:
        command += ["--low-expert-bytes", str(bench.low.record_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        why = last.removeprefix("error: ")
        raise RunError(f"moesim could not simulate policy '{policy}': {why}")
    return float(json.loads(done.stdout)[0]["tokens_per_s"])
