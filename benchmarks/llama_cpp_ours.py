"""moerun as `llama_cpp.py` runs it: a process that opens a store, then answers a line a run.

The tokens are forced by a logits processor; all else is what `moerun generate` does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from memory_group import peak_bytes_of, usage_bytes
from moepolicy import find_policy
from moerun.commands.prepare import quiet_libraries
from moerun.devices import freeze_loaded_objects
from moerun.kernels import blocks, decode
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.live.token_layers import TokenLayer
from moerun.offload.gate_predictor import find_routers
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from transformers import LogitsProcessor

MARGIN_BYTES = 64 << 20  # of a limit: what the allocator and the interpreter take while it runs


class Forced(LogitsProcessor):  # type: ignore[misc]
    """Lets one token through at each place, and notes which would have been the likeliest."""

    def __init__(self, tokens: list[int]) -> None:
        self._left = [*tokens, 0]
        self.best: list[int] = []
        self.logits: list[float] = []
        self.cpu_s = [time.process_time()]

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [1, vocabulary] of which one is finite."""
        self.cpu_s.append(time.process_time())
        self.best.append(int(scores[0].argmax()))
        self.logits = [round(value, 4) for value in scores[0, :64].tolist()]
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._left.pop(0)] = 0
        return forced


class Clock:
    """Seconds spent in parts of a pass, by name: first the prompt's, then the tokens'."""

    def __init__(self) -> None:
        self.seconds: list[dict[str, float]] = [{}, {}]
        self.phase = 0
        self._within: list[str] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time noted as ``name`` and what it is called within."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            self._within.append(name)
            path, phase, began_s = "/".join(self._within), self.phase, time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                part = self.seconds[phase]
                part[path] = part.get(path, 0.0) + time.perf_counter() - began_s
                self._within.pop()

        return call


class Ours:
    def __init__(self, case: dict[str, Any]) -> None:
        self._case = case
        store = ExpertStore.open(Path(case["store"]))
        policy = find_policy(case["policy"])
        if case["limit_bytes"] is None:
            settings = Settings(policy=policy, slots=store.n_experts)
        else:
            left = case["limit_bytes"] - usage_bytes(Path(case["group"])) - MARGIN_BYTES
            settings = Settings(
                policy=policy,
                memory_bytes=left,
                context_tokens=case["context"],
                prompt_tokens=len(case["prompt"]),
                cold=True,
            )
        self.runner = Runner(store, settings)
        freeze_loaded_objects()
        if case["limit_bytes"] is not None:
            self._use_what_is_left(left)

    def _use_what_is_left(self, budget_bytes: int) -> None:
        """Give the slots what a plan kept back for the most that a run might take, and this one
        does not: as `--memory-file` does for a run that is watched."""
        self.run()
        group = Path(self._case["group"])
        spare_bytes = self._case["limit_bytes"] - peak_bytes_of(group) - MARGIN_BYTES
        if spare_bytes > 0:
            self.runner.set_memory(budget_bytes + spare_bytes)

    def run(self) -> dict[str, Any]:
        """Seconds of the prompt and of each token after it, and what the policy's cache did."""
        case = self._case
        forced = Forced(case["tokens"])
        sampling = Sampling(stop=False, max_new_tokens=len(case["tokens"]) + 1)
        prompt = torch.tensor([case["prompt"]])
        done = self.runner.generation().run(prompt, sampling, forced)
        ends = done.token_s
        return {
            "prompt_s": done.prompt_s,
            "token_s": [ends[i + 1] - ends[i] for i in range(len(ends) - 1)],
            "cpu_s": [forced.cpu_s[1] - forced.cpu_s[0], forced.cpu_s[-1] - forced.cpu_s[1]],
            "best": forced.best,
            "logits": forced.logits,
            "hit_ratio": done.totals.hit_ratio,
            "stall_s": done.totals.stall_s,
            "slots": self.runner.context.slots,
        }

    def parts(self) -> dict[str, Any]:
        """Seconds of one run by where they went, of the prompt and of all tokens after it."""
        clock = Clock()
        with _clocked(self.runner, clock):
            run = self.run()
        whole = [run["prompt_s"], sum(run["token_s"])]
        return {"parts": clock.seconds, "whole_s": whole, "tokens": len(run["token_s"])}


@contextmanager
def _clocked(runner: Runner, clock: Clock) -> Iterator[None]:
    model = runner.model
    patched: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, part: str) -> None:
        before = owner.__dict__.get(name)
        patched.append((owner, name, before))
        setattr(owner, name, clock.timed(part, getattr(owner, name)))

    for layer in model.model.layers:
        patch(layer.self_attn, "forward", "attention")  # of a prompt
        if isinstance(token_layer := vars(layer).get("forward"), TokenLayer):
            patch(token_layer, "attend", "attention")
        patch(layer.mlp, "forward", "experts")
    for router in find_routers(model):
        patch(router, "forward", "gate")
    patch(model.lm_head, "forward", "head")
    patch(model, "forward", "pass")
    patch(runner.session, "serve", "policy")
    for kernels in (blocks, decode):
        patch(kernels, "run_here", "kernel")
        patch(kernels, "run_on_all", "kernel")
    hook = model.lm_head.register_forward_hook(lambda *_: setattr(clock, "phase", 1))
    try:
        yield
    finally:
        hook.remove()
        for owner, name, before in patched:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def main() -> None:
    """Open the store at the first line on stdin; "parts" asks where the time goes, any other line
    for a run."""
    sys.stdin.readline()
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case["threads"])
    quiet_libraries()
    ours = Ours(case)
    print(json.dumps({"slots": ours.runner.context.slots}), flush=True)
    while line := sys.stdin.readline():
        print(json.dumps(ours.parts() if line.strip() == "parts" else ours.run()), flush=True)


if __name__ == "__main__":
    main()
