"""The memory plan and the cache of a run, from what was asked for and what the store is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from moepolicy import Context, PolicySpec
from moepolicy.sharing import sharing_class

from moerun.amounts import format_bytes
from moerun.devices import free_bytes, is_here, who_holds
from moerun.errors import RunError
from moerun.kernels.slots import SlotForm
from moerun.memory.compiling import Compiling
from moerun.memory.needs import needs_of
from moerun.memory.plan import MemoryPlan
from moerun.policies import plan_context
from moerun.store.expert_store import ExpertStore

if TYPE_CHECKING:
    from moerun.settings import Settings


def plan_memory(store: ExpertStore, settings: Settings) -> MemoryPlan:
    """How the run's memory is spent. RunError where a budget is too small, or is not there."""
    plan = plan_policies(store, settings, [settings.policy], plan_context(store, settings, 0))
    if plan.budget_bytes is not None and is_here(settings.device):
        require_free(plan.total_bytes, plan.budget_bytes, settings.device)
    return plan


def plan_policies(
    store: ExpertStore, settings: Settings, policies: Sequence[PolicySpec], context: Context
) -> MemoryPlan:
    """A plan in which each of ``policies`` can run. RunError where a budget is too small.

    ``context`` is the cache they are made for, but for its slots.
    """
    # Staging may depend on the parameters, so policies are made to ask them.
    made = [policy.build(context) for policy in policies]
    stores = [each for each in (store, settings.low) if each is not None]
    forms = [SlotForm(each.index.shape, each.index.precision, settings.device) for each in stores]
    all_bytes = sum(each.n_keys * each.record_bytes for each in stores)
    budget_bytes, host_bytes = settings.memory_bytes, settings.host_bytes
    plan = MemoryPlan(
        needs=needs_of(
            store,
            settings.device,
            context_tokens=settings.context_tokens,
            prompt_tokens=_tokens_of_a_pass(settings),
            horizon=max(settings.ahead(policy) for policy in policies),
            copies=settings.copies,
            low=settings.low,
            computes_on_cpu=any("cpu" in policy.requires for policy in policies),
            host_tier_bytes=0 if host_bytes is None else min(host_bytes, all_bytes),
            logit_tokens=settings.logit_tokens,
            texts=settings.texts,
            marks=settings.exact_reuse,
        ),
        budget_bytes=None,
        # A slot more than a layer has experts would never be filled.
        slots=min(
            store.n_experts // 2 if settings.slots is None else settings.slots, store.n_experts
        ),
        n_layers=store.n_layers,
        n_experts=store.n_experts,
        staging=max(policy.staging for policy in made),
        shared=context.scope == "layer" and any(sharing_class(policy) for policy in made),
        slot_bytes=max(form.slot_bytes for form in forms),
        device=_described(settings.device),
        expands=tuple(
            each.index.precision for each, form in zip(stores, forms, strict=True) if form.expands
        ),
    )
    if budget_bytes is None:
        return plan
    if settings.device.type == "cpu":
        return plan.on_host_within(budget_bytes, Compiling.NEVER)
    return plan.within(budget_bytes)


def _tokens_of_a_pass(settings: Settings) -> int | None:
    """The most that one pass reads; None: all of the context."""
    given = (settings.prompt_tokens, settings.prompt_chunk)
    return min((tokens for tokens in given if tokens is not None), default=None)


def _described(device: torch.device) -> str:
    return f"{device}" if is_here(device) else f"{device}, which is not here"


def require_free(n_bytes: int, budget_bytes: int, device: torch.device) -> None:
    """RunError where a device does not have what a budget is about to take."""
    free = free_bytes(device)
    if n_bytes > free:
        raise RunError(
            f"of the {format_bytes(budget_bytes)} asked for, {format_bytes(n_bytes)} are needed "
            f"now and {device} has {format_bytes(free)} free{who_holds(device)}: give less "
            "--memory (or 'auto'), or end what else uses it"
        )
