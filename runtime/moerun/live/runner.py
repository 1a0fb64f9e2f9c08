"""A model made ready to run from an expert store: its session, its link, its gates listened to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from moepolicy import WEIGHT_RULES, Context, PolicyError, RoutingRule

from moerun.devices import naming_lack_of_memory
from moerun.kernels.slots import SlotForm
from moerun.links import HostTier
from moerun.live.assembly import check_low, make_cpu_experts, make_link
from moerun.live.batch import Batch, BatchedGeneration
from moerun.live.gates import GateHooks, SessionExperts
from moerun.live.generate import Generation
from moerun.live.kept import CHUNK_TOKENS, KeptCache
from moerun.live.learned import keep
from moerun.live.prompt import context_tokens, encode
from moerun.live.session import Session
from moerun.live.sizing import Sizing
from moerun.live.token_layers import install_token_layers
from moerun.live.weight_rule import find_weight_rule
from moerun.memory.budget import BudgetWatch
from moerun.memory.fit import plan_memory
from moerun.memory.libraries import keep_little
from moerun.memory.peak import Peak
from moerun.memory.plan import MemoryPlan
from moerun.offload.gate_predictor import GatePredictor
from moerun.offload.load import load_offloaded
from moerun.policies import plan_context, refuse_unservable
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore


class Runner:
    """A model served by a session. A context manager; ``close`` ends its threads and hooks."""

    def __init__(
        self,
        store: ExpertStore,
        settings: Settings,
        *,
        report: Callable[[str], None] | None = None,
    ) -> None:
        """Raises RunError or PolicyError before anything big is loaded where it cannot run.

        ``report`` is told that a policy failed and LRU goes on (else: a RuntimeWarning) and, from
        another thread, what became of a change of ``memory_file``.
        """
        refuse_unservable(
            settings.policy,
            low=settings.low is not None,
            machine=settings.machine is not None,
        )
        check_low(store, settings.low)
        self.store = store
        self.settings = settings
        self.form = SlotForm(store.index.shape, store.index.precision, settings.device)
        plan = plan_memory(store, settings)
        self._peak = Peak(store, settings.device)
        if settings.memory_bytes is not None or settings.memory_file is not None:
            keep_little(on_host=settings.device.type == "cpu")
        self.session = Session(
            plan_context(store, settings, plan.slots),
            settings.policy,
            partial(make_link, store, self.form, settings),
            record_bytes=store.record_bytes,
            low_record_bytes=settings.low.record_bytes if settings.low else 0,
            make_cpu_experts=(
                partial(make_cpu_experts, store, settings)
                if "cpu" in settings.policy.requires
                else None
            ),
            compiling=plan.compiling,
            on_policy_failure=(report or _warn) if settings.falls_back else None,
        )
        self._sizing = Sizing(self.session, plan, settings.device)
        self.experts = SessionExperts(self.session)
        """What the model takes its experts from."""
        try:
            with naming_lack_of_memory(settings.device, "loading the weights"):
                self.model, self.tokenizer = load_offloaded(store, settings.device, self.experts)
            install_token_layers(self.model)
            self.predictor = (
                GatePredictor(self.model, settings.predicts) if settings.predicts else None
            )
            self._gates = GateHooks(self.model, self.experts, self.predictor)
            chunk = (settings.prompt_chunk or CHUNK_TOKENS) if settings.exact_reuse else 0
            self.kept = KeptCache(self.model, settings.texts, chunk)
            """The keys and values of the last texts that were to be kept."""
            if settings.policy.routes:
                self._tell_weight_rule()
            self._watch = self._watch_budget(report)
        except BaseException:
            self.session.close()
            raise

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def plan(self) -> MemoryPlan:
        """The memory plan of the run as it is now."""
        return self._sizing.plan

    @property
    def context(self) -> Context:
        """The context of the cache, with its present number of slots."""
        return self.session.context

    @property
    def context_tokens(self) -> int | None:
        """The longest text that memory was planned for; None where no budget was given."""
        return None if self.plan.budget_bytes is None else self.plan.needs.context_tokens

    @property
    def limit_tokens(self) -> int | None:
        """The longest text it takes: what memory was planned for, else the model's; None: any."""
        return self.context_tokens or context_tokens(self.model)

    @property
    def host_tier(self) -> HostTier | None:
        """The cache between disk and device, where there is one that does not hold everything."""
        tier = getattr(self.session.link, "tier", None)
        return tier if isinstance(tier, HostTier) and not tier.whole else None

    @property
    def peak_bytes(self) -> int:
        """The most of the device's memory this run has held, as a budget counts it."""
        return self._peak.n_bytes

    def set_memory(self, budget_bytes: int) -> None:
        """Have another budget from now on: the slots follow from it. Any thread may say so, at
        any time.

        Nothing that is generated changes by it. What the step in progress uses stays until its
        end.

        Raises RunError, changing nothing, for a budget too small for what is not slots or larger
        than the memory there is.
        """
        self._sizing.set_memory(budget_bytes)

    @property
    def arena_bytes(self) -> int:
        """Device memory of all slots, staging included."""
        return self.session.cache.n_slots * self.plan.slot_bytes

    def encode(self, prompt: str) -> torch.Tensor:
        """Token ids, int64[1, tokens], on the model's device."""
        return encode(self.tokenizer, prompt, self.settings.device)

    def generation(
        self,
        on_text: Callable[[str], None] | None = None,
        on_reasoning: Callable[[str], None] | None = None,
        *,
        reuse: bool = False,
    ) -> Generation:
        """A generation by this model, not begun yet; the callbacks receive text as it comes.

        ``reuse``: go on from the keys and values of a text that was generated so, where one begins
        alike, and keep this one's.
        """
        return Generation(*self._for_generation(on_text, on_reasoning, reuse))

    def batched_generation(
        self,
        on_text: Callable[[str], None] | None = None,
        on_reasoning: Callable[[str], None] | None = None,
        *,
        reuse: bool = False,
    ) -> BatchedGeneration:
        """The same for a `Batch`."""
        return BatchedGeneration(*self._for_generation(on_text, on_reasoning, reuse))

    def batch(self) -> Batch:
        """A batch of no texts yet. Raises RunError where the model's cannot be decoded together."""
        return Batch(self.model, self.settings.device)

    def _for_generation(
        self,
        on_text: Callable[[str], None] | None,
        on_reasoning: Callable[[str], None] | None,
        reuse: bool,
    ) -> tuple[Any, ...]:
        kept = self.kept if reuse else None
        made_of = (self.model, self.tokenizer, self.session)
        chunk = self.settings.prompt_chunk or 0
        return (*made_of, on_text, on_reasoning, self.context_tokens, kept, chunk)

    def close(self) -> None:
        """End the threads, and take the hooks off the model."""
        if self._watch:
            self._watch.close()
        self._gates.close()
        if self.predictor:
            self.predictor.close()
        self.session.close()
        if self.settings.learned is not None and self.session.policy_failure is None:
            policy = self.session.cache.policy
            keep(self.settings.learned, policy, self.settings.policy, self.store)

    def _tell_weight_rule(self) -> None:
        """PolicyError where the model's gates make weights by no rule that is known."""
        if (rule := self.weight_rule) is None:
            raise PolicyError(
                f"policy '{self.settings.policy.label}' gives tokens other experts, and the gates "
                f"of {self.store.index.model} make their weights by none of the rules known: "
                f"{', '.join(WEIGHT_RULES)}"
            )
        self.session.set_weight_rule(rule)

    @cached_property
    def weight_rule(self) -> RoutingRule | None:
        """How the model's gates make weights of their logits; None: by no rule that is known.

        The model is asked when this is read first, which must not be while it generates.
        """
        return find_weight_rule(self.model, self.experts)

    def _watch_budget(self, report: Callable[[str], None] | None) -> BudgetWatch | None:
        if (path := self.settings.memory_file) is None:
            return None
        device = self.settings.device
        return BudgetWatch(path, device, self.set_memory, report or (lambda _: None))


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
