"""Policies that misbehave, written as source files by a seed: what an author's mistakes look like.

A policy has a sound rule of eviction, and one to three deeds, each in a hook and from some call on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# What a hook does; {n} and {k} are small numbers by the seed.
RAISES = (
    'raise ValueError("my table is empty")',
    'raise ValueError("a line\\nand another\\n\\tand more")',
    "raise KeyError(incoming_or_step)",
    "raise StopIteration",
    "raise RuntimeError",
    "raise MemoryError",
    "raise SystemExit(0)",
    'raise SystemExit("gone")',
    "raise GeneratorExit",
    "raise AssertionError",
    "raise Unspeakable()",
    "raise Beyond()",
    'raise OSError(28, "No space left on device")',
    'raise UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")',
    'raise "text"',
    "return 1 // 0",
    "return self.nothing_of_the_kind",
    "return deeper(1)",
    "return np.zeros(3)[7]",
    "import sys; sys.exit(3)",
    "x = np.empty(1 << 50)",
)
SLOW = ("time.sleep(0.0{n})", "sum(range({n}000))")
GROWS = (
    "self.log.append(incoming_or_step)",
    "self.grown = np.append(self.grown, 1.0)",
    "self.grown = np.concatenate([self.grown, self.grown])[: 1 << {n}]",
    "self.number *= 3",
    "self.number = None",
    "self.scores = self.scores.tolist()",
    "self.scores = np.zeros({n})",
    "self.scores[:] = np.nan",
    "self.scores[:] = -np.inf",
    "self.staging = 0",
    "self.stage_prefetches = not self.stage_prefetches",
    "del self.scores",
    "self.__dict__.clear()",
)
TOUCHES_STEP = (
    "step.experts[:] = 0",
    "step.experts[:] = step.experts[::-1].copy()",
    "step.experts[0] += 1",
    "step.experts.sort()",
    "step.weights[:] = 0",
    "step.weights /= 2",
    "step.logits.sort()",
    "step.logits[:] = np.nan",
    "step.predicted[:] = 0",
    "step.predicted.fill(np.nan)",
    "step.token_ids[:] = 0",
    "np.negative(step.logits, out=step.logits)",
    "step.experts.resize(0)",
    "step.layer = 0",
    "self.kept_step = step",
    "self.context.counts[:] = 0",
    "self.context.counts.sort()",
)
TOUCHES_CANDIDATES = (
    "candidates[:] = incoming_or_step",
    "candidates[0] = -1",
    "candidates.sort(); candidates[:] = candidates[::-1].copy()",
    "candidates.base[:] = 0",
    "self.kept = candidates",
    "self.kept[:] = 1",
)
ANY_ANSWER = (
    *("return -2", "return None", 'return "0"', "return 2.5", "return float('nan')", "return True"),
    *("return [0]", "return 1 << 40", "return 1 << 70", "return -(1 << 62)", "return np.array(3)"),
    *("return np.array([1, 2])", "return np.float32('inf')", "return lambda: 0", "return 10**6"),
    *("return self", "return (yes for yes in ())", "return {n}", "return -1", "return 0"),
)
VICTIMS = (
    *ANY_ANSWER,
    "return incoming_or_step",
    "return int(candidates[0]) + self.n_experts",
    "return (layer + 1) * self.n_experts",
    "return candidates",
    "return candidates[:1]",
    "return candidates[-1]",
    "return float(candidates[0])",
    "return np.float64(candidates[0])",
    "return str(candidates[0])",
    "return int(candidates[np.argmax(self.scores[candidates])])",
    "return -1 if self.calls[0] % 2 else int(candidates[-1])",
)
PREFETCHES = (
    *ANY_ANSWER,
    "return len(keys) + 1",
    "keys[:] = 0; return len(keys)",
    "keys[:] = np.arange(len(keys)); return len(keys)",
    "keys[:] = np.arange(len(keys))[::-1]; return len(keys)",
    "keys[:] = step.experts[0]; return len(keys)",
    "keys[:2] = -1; return 2",
    "keys[:2] = len(keys); return 2",
    "keys[0] = 1 << 40; return 1",
    "keys[0] = np.nan; return 1",
    "keys[0] = -(1 << 31); return 1",
    "keys[: {n}] = {k}; return {n}",
    "keys[:2] = step.experts[:2]; return 2",
    "keys[:1] = (step.experts[0] + {n}) % len(keys); return 1",
    "keys.resize(10**6); return 10**6",
    "self.kept = keys; return {n}",
    "return np.int32(2)",
)
MISSES = (
    *ANY_ANSWER,
    *("return LOAD", "return SKIP", "return LOW", "return SUBSTITUTE", "return COMPUTE"),
    *("return SKIP if rank else LOAD", "return float(SKIP)", "return Kind.HIT", "return rank + 10"),
)
SUBSTITUTES = (
    *VICTIMS,
    "candidates[0] = (layer + 1) * self.n_experts; return int(candidates[0])",
    "return int(step.experts[rank])",
    "return int(candidates[0])",
)
ROUTES = (
    "chosen[:] = -1",
    "chosen[:] = len(resident)",
    "chosen[:] = chosen[0]",
    "chosen[:] = np.arange(len(chosen))",
    "chosen[:] = np.argsort(step.logits)[: len(chosen)]",
    "chosen += step.layer * self.n_experts",
    "chosen[0] = 1 << 30",
    "chosen[0] = np.nan",
    "chosen.resize(1)",
    "chosen[:] = np.flatnonzero(resident)[: len(chosen)]",
    "resident[:] = True",
    "self.kept = chosen",
    "step.weights[:] = 9",
    "step.logits[:] = 0; chosen[:] = np.arange(len(chosen))",
    "return 3",
)
DEEDS: dict[str, tuple[str, ...]] = {
    "on_step": (*RAISES, *SLOW, *GROWS, *TOUCHES_STEP, *TOUCHES_STEP, "return 7"),
    "on_hit": (*RAISES, *SLOW, *GROWS),
    "on_load": (*RAISES, *SLOW, *GROWS),
    "on_evict": (*RAISES, *SLOW, *GROWS),
    "victim": (*RAISES, *SLOW, *GROWS, *TOUCHES_CANDIDATES, *VICTIMS, *VICTIMS),
    "retain": (*RAISES, *TOUCHES_CANDIDATES, *VICTIMS),
    "prefetch": (*RAISES, *SLOW, *TOUCHES_STEP, *PREFETCHES, *PREFETCHES),
    "on_miss": (*RAISES, *TOUCHES_STEP, *MISSES, *MISSES),
    "precision": (*RAISES, *ANY_ANSWER, "return LOW", "return LOAD"),
    "substitute": (*RAISES, *TOUCHES_STEP, *TOUCHES_CANDIDATES, *SUBSTITUTES),
    "route": (*RAISES, *ROUTES, *ROUTES),
    "__init__": (*RAISES, "self.number = 1 << 70", "self.staging = 0", "pass"),
}
SIGNATURES = {
    "on_step": "self, step",
    "on_hit": "self, key, now",
    "on_load": "self, key, speculative, now",
    "on_evict": "self, key",
    "victim": "self, layer, incoming, candidates",
    "retain": "self, layer, key, candidates",
    "prefetch": "self, step, keys",
    "on_miss": "self, step, rank",
    "precision": "self, step, rank",
    "substitute": "self, step, rank, candidates",
    "route": "self, step, row, resident, chosen",
}
SOUND = {
    "victim": "return int(candidates[np.argmin(self.used[candidates])])",
    "retain": "return -1",
    "prefetch": "return 0",
    "on_miss": "return LOAD",
    "precision": "return LOW",
    "substitute": "return -1",
    "on_hit": "self.used[key] = now",
    "on_load": "self.used[key] = now",
}
SUBJECT = {"victim": "incoming", "retain": "key", "on_hit": "key", "on_load": "key"} | {
    "on_evict": "key"
}
SHARES = (
    "return None",
    "return [total]",
    "return np.full(context.n_layers, total)",
    "return np.full(context.n_layers, total / context.n_layers)",
    "return [total // context.n_layers] * context.n_layers",
    "return {total}",
    "return [[-1], [2, 3]]",
    "raise SystemExit",
    "raise ValueError('shares')",
)
HEAD = '''"""A policy by seed {seed}."""

import time

import numpy as np
from moepolicy import Kind, Policy
from moepolicy.kinds import COMPUTE, LOAD, LOW, SKIP, SUBSTITUTE


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Beyond(BaseException):
    pass


def deeper(n):
    return deeper(n + 1) + 1


class Hostile(Policy):
'''


@dataclass(frozen=True)
class Hostile:
    """A policy's source, and whether it declares itself lossless."""

    source: str
    lossless: bool
    deeds: tuple[str, ...]


def hostile(seed: str) -> Hostile:
    """The policy of a seed."""
    rng = random.Random(seed)
    lossless = rng.random() < 0.7
    hooks = [hook for hook in DEEDS if hook != "route" or not lossless]
    done = {hook: rng.choice(DEEDS[hook]) for hook in rng.sample(hooks, rng.choice((1, 1, 2, 3)))}
    if not lossless and "on_miss" not in done and rng.random() < 0.5:
        done["on_miss"] = rng.choice(MISSES)
    parts = [HEAD.format(seed=seed), _declarations(rng, lossless), _init(done, rng)]
    parts += [_hook(hook, done, rng) for hook in SIGNATURES if hook in done or hook in _NEEDED]
    if rng.random() < 0.08:
        done["share_slots"] = rng.choice(SHARES)
        parts.append(
            f"    @classmethod\n    def share_slots(cls, total, context):\n"
            f"        {done['share_slots']}\n"
        )
    deeds = tuple(f"{hook}: {deed}" for hook, deed in done.items())
    return Hostile("\n".join(parts), lossless, deeds)


_NEEDED = ("victim", "on_hit", "on_load")
_REQUIRES = ("logits", "weights", "predictions", "tokens", "counts", "cpu", "low")


def _declarations(rng: random.Random, lossless: bool) -> str:
    requires = sorted({need for need in _REQUIRES if rng.random() < 0.25})
    lines = [f"requires = frozenset({requires!r})"]
    if not lossless:
        lines.append("lossy = True")
    odd = ("staging = 0", "staging = -3", "staging = 1 << 40", "staging = 2.5", 'staging = "3"',
           "staging = None", "staging = True", "stage_prefetches = None", "always_evicts = True",
           'stage_prefetches = "no"', "horizon = 0", "horizon = 100", 'lossy = "no"',
           "lossy = None", 'requires = "logits"', 'requires = frozenset({"magic"})',
           "welcomes = None", "only = 'eviction'", "made_of = (int,)", "horizon = 2")  # fmt: skip
    if rng.random() < 0.12:
        lines.append(rng.choice(odd))
    lines.append(f"staging = {rng.choice((1, 1, 2, 5))}" if len(lines) < 3 else "pass")
    return "".join(f"    {line}\n" for line in lines)


def _init(done: dict[str, str], rng: random.Random) -> str:
    deed = _filled(done.get("__init__", "pass"), rng)
    return f"""    def __init__(self, context):
        self.n_experts = context.n_experts
        self.used = np.zeros(context.n_keys, np.int64)
        self.scores = np.zeros(context.n_keys)
        self.calls = np.zeros(1, np.int64)
        self.number = 1
        incoming_or_step = context
        {deed}
        {_STATE if _keeps(done) else "pass"}
"""


_STATE = "self.log, self.grown, self.kept, self.context = [], np.ones(1), np.ones(1), context"


def _keeps(done: dict[str, str]) -> bool:
    """Whether a deed has state that no compiled code can have."""
    return any(word in deed for deed in done.values() for word in ("log", "grown", "kept", "text"))


def _hook(hook: str, done: dict[str, str], rng: random.Random) -> str:
    lines = [f"def {hook}({SIGNATURES[hook]}):"]
    if hook in done:
        subject = SUBJECT.get(hook, "step")
        deed = _filled(done[hook], rng).replace("incoming_or_step", subject)
        if hook == "substitute":
            deed = deed.replace("(layer + 1)", "(step.layer + 1)")
        start = rng.choice((1, 1, 5, 20))
        lines += ["    self.calls[0] += 1", f"    if self.calls[0] >= {start}:", f"        {deed}"]
    lines.append(f"    {SOUND.get(hook, 'return')}")
    return "".join(f"    {line}\n" for line in lines)


def _filled(deed: str, rng: random.Random) -> str:
    return deed.replace("{n}", str(rng.randrange(1, 9))).replace("{k}", str(rng.randrange(24)))
