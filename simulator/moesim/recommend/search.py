"""The search for options: one after the other is chosen by simulation, and what each is worth
said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from moepolicy import find_policy
from moeroute import TraceError
from moeroute.models import NATIVE, PACKED, PLAIN

from moesim.engines.compilations import Compilations
from moesim.errors import SimulationError
from moesim.machine.profile import Machine
from moesim.recommend.budget import Budget, dense_bytes
from moesim.recommend.model import ModelToRun
from moesim.result import Result
from moesim.simulation import check_needs, simulate, workload_for
from moesim.workload.steps import Workload

# Lossless policies that run live, the simplest first: a later one has to be faster.
POLICIES = ("lru", "lfu", "class-lru", "s3-fifo", "foresight", "foresight-bypass")
AHEAD = ("foresight-ahead", "foresight-spec")  # that choose by themselves what to fetch ahead
DEPTHS = (1, 2, 3, 4)  # likeliest experts of the next layer that are fetched ahead
NO_PREFETCH = "none"
WHOLE = "whole"  # a prompt is read at once
SCOPES = ("layer", "global")  # a cache for each layer, or one for all
STREAMS = (1, 2, 3)
WORTH = 0.01  # what a less simple option must gain
WORTH_BITS = 0.05  # what fewer bits must gain, and what slower reading of a prompt must
PROMPT_CHUNK = 512  # tokens of a prompt that are read at a time where all at once take much memory
REPLAYED = 256  # tokens that are simulated


def _compilations() -> Compilations:
    """Many short runs: together they pay for compiling, and what is compiled is used at once."""
    return Compilations(worth_compiling=0, worth_loading=0)


@dataclass(frozen=True)
class Options:
    """What `moerun` is told."""

    precision: str
    attention: str = NATIVE
    policy: str = "lru"
    scope: str = "layer"
    streams: int = 1
    prompt_chunk: int | None = None  # None: a prompt is read at once


@dataclass(frozen=True)
class Trial:
    """Options simulated: ``slots`` and ``result`` are None where the model does not fit."""

    options: Options
    slots: int | None
    result: Result | None

    @property
    def speed(self) -> float:
        """Simulated tokens/s; 0 where the model does not fit."""
        return 0.0 if self.result is None else self.result.speed


@dataclass(frozen=True)
class OptionStep:
    """One step of the search: what was decided, what was compared, and what it is worth."""

    what: str
    chosen: str
    before: Trial
    after: Trial
    tried: Sequence[tuple[str, Trial]]

    @property
    def gain(self) -> float | None:
        """Tokens/s more, as a share; None where nothing ran before."""
        return self.after.speed / self.before.speed - 1 if self.before.speed else None


@dataclass
class Search:
    """Simulates options for one model, budget and machine, each once."""

    wanted: ModelToRun
    machine: Machine
    budget: Budget
    least_bits: int
    fixed: dict[str, str]  # options that were given: precision, attention, policy
    tell: Callable[[str], None]
    compilations: Compilations = field(default_factory=_compilations)
    _found: dict[Options, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "policy" in self.fixed:
            self.policies, self.depths = [self.fixed["policy"]], []
        else:
            self.policies = [name for name in POLICIES if self._may_run(name)]
            self.depths = [n for n in DEPTHS if self._may_run(f"lru+gate(n={n})")]
        specs = [find_policy(name) for name in self.policies]
        specs += [find_policy(f"lru+gate(n={n})") for n in self.depths]
        specs += [find_policy(name) for name in self._ahead()]
        self.workload: Workload = workload_for(self.wanted.trace, specs).head(REPLAYED)
        shape = self.wanted.shape
        sizes = self.wanted.trace.meta.expert_bytes if shape is None else shape.expert_bytes()
        if not sizes:
            raise SimulationError(
                "nothing says how big an expert is: name the model, not its trace alone"
            )
        self.sizes = sizes

    def _may_run(self, name: str) -> bool:
        """Whether the trace has what a policy needs."""
        try:
            check_needs(self.wanted.trace, find_policy(name))
        except TraceError:
            return False
        return True

    def _ahead(self) -> list[str]:
        """Policies that fetch ahead by themselves and may be chosen."""
        free = "policy" not in self.fixed
        return [name for name in AHEAD if free and self._may_run(name)]

    def run(self) -> list[OptionStep]:
        """Decide precision, attention, policy, depth, scope, streams and how a prompt is read;
        the last first where nothing fits that reads a whole prompt at once."""
        start = self.trial(Options(self.precisions()[0], self.attentions()[0], self.policies[0]))
        steps = self._rest(start)
        if steps[-1].after.result is None:
            chunked = self.trial(replace(start.options, prompt_chunk=PROMPT_CHUNK))
            first = OptionStep("prompt chunk", str(PROMPT_CHUNK), start, chunked, [])
            return [first, *self._rest(chunked)]
        if self.wanted.shape is None:
            return steps  # what a prompt takes is not known
        whole = steps[-1].after
        chunks = (None, PROMPT_CHUNK)
        return [*steps, self._step("prompt chunk", whole, chunks, "prompt_chunk", WORTH_BITS)]

    def _rest(self, start: Trial) -> list[OptionStep]:
        """Decide all but how a prompt is read."""
        precisions = self.precisions()
        steps = [self._step("precision", start, precisions, "precision", WORTH_BITS)]
        steps.append(
            self._step("attention", steps[-1].after, self.attentions(), "attention", WORTH_BITS)
        )
        steps.append(self._step("policy", steps[-1].after, self.policies, "policy", WORTH))
        if self.depths or self._ahead():
            steps.append(self._prefetch(steps[-1].after))
        steps.append(self._step("scope", steps[-1].after, SCOPES, "scope", WORTH))
        if self.machine.experts_in == "host":
            steps.append(self._step("streams", steps[-1].after, STREAMS, "streams", WORTH))
        return steps

    def precisions(self) -> list[str]:
        """Those that may be chosen, the most bits first."""
        if "precision" in self.fixed:
            if self.fixed["precision"] not in self.sizes:
                raise SimulationError(
                    f"the model has no size for precision '{self.fixed['precision']}'; it has "
                    f"{', '.join(self.sizes)}"
                )
            return [self.fixed["precision"]]
        own = next(iter(self.sizes))
        found = [own, *(name for name in PACKED if name in self.sizes and name != own)]
        allowed = [name for name in found if bits(name) >= self.least_bits]
        return allowed or [own]

    def attentions(self) -> list[str]:
        """Precisions of attention that may be chosen."""
        if "attention" in self.fixed:
            return [self.fixed["attention"]]
        if self.wanted.shape is None:
            return [NATIVE]
        return [NATIVE, *(name for name in PACKED if bits(name) >= self.least_bits)]

    def _step(
        self,
        what: str,
        before: Trial,
        values: Iterable[str | int | None],
        option: str,
        worth: float,
    ) -> OptionStep:
        """Choose one option's value: the first, unless a later one gains enough."""
        self.tell(what)
        tried = []
        for value in values:
            options = replace(before.options, **{option: value})  # type: ignore[arg-type]
            tried.append((WHOLE if value is None else str(value), self.trial(options)))
        chosen, best = tried[0]
        for name, trial in tried[1:]:
            if trial.speed > best.speed * (1 + worth):
                chosen, best = name, trial
        return OptionStep(what, chosen, before, best, tried)

    def _prefetch(self, before: Trial) -> OptionStep:
        """Whether the next layer's likeliest experts are fetched ahead, and how many."""
        policy = before.options.policy
        named = {str(n): f"{policy}+gate(n={n})" for n in self.depths}
        named |= {f"by {name}, in place of {policy}": name for name in self._ahead()}
        step = self._step("prefetch depth", before, [policy, *named.values()], "policy", WORTH)
        names = {policy: NO_PREFETCH} | {spec: depth for depth, spec in named.items()}
        tried = [(names[spec], trial) for spec, trial in step.tried]
        return replace(step, chosen=names[step.chosen], tried=tried)

    def trial(self, options: Options, *, limits: bool = False) -> Trial:
        """Simulate ``options``, or remember that; with ``limits`` what no policy can beat, too."""
        if options not in self._found or limits:
            self._found[options] = self._simulated(options, self.budget, limits=limits)
        return self._found[options]

    def with_memory(self, options: Options, memory_bytes: int) -> Trial:
        """The same options in another budget."""
        return self._simulated(options, replace(self.budget, memory_bytes=memory_bytes))

    def _simulated(self, options: Options, budget: Budget, *, limits: bool = False) -> Trial:
        shape, meta = self.wanted.shape, self.wanted.trace.meta
        dense = dense_bytes(shape, meta, options.attention)
        size, spec = self.sizes[options.precision], find_policy(options.policy)
        slots = budget.slots(self.workload, spec, size, dense, options.prompt_chunk)
        if slots is None:
            return Trial(options, None, None)
        if shape is not None:
            read = shape.dense(options.attention)
            meta = replace(
                meta,
                layer_bytes=read.layer_bytes,
                token_bytes=read.token_bytes,
                expert_params=shape.expert_params,
            )
        link = replace(self.machine.link, streams=options.streams)
        result = simulate(
            self.workload.sized(meta),
            spec,
            replace(self.machine, link=link),
            slots=slots,
            scope=options.scope,
            expert_bytes=size,
            limits=limits,
            compilations=self.compilations,
        )
        return Trial(options, slots, result)


def bits(precision: str) -> int:
    """Bits of a weight; 8 for fp8, and 4 for mxfp4."""
    if precision in PACKED:
        return PACKED[precision][0]
    if precision in PLAIN:
        return 8 * PLAIN[precision]
    return {"mxfp4": 4, "fp8": 8}.get(precision, 16)
