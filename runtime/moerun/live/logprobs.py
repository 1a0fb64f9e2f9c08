"""Log-probabilities of tokens, by the model's own logits, before any penalty or temperature."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor
from transformers.modeling_outputs import MoeModelOutputWithPast

# So many rows of logits, in the model's precision and twice in float32, are within what the memory
# plan has for sampling a token.
SCORED_ROWS = 4


class TokenLogprob(NamedTuple):
    """A token and how likely the model took it for.

    logprob  the natural logarithm of its probability; None for the first token of a text
    top      the likeliest tokens at its place with theirs, likeliest first
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class LogprobRecorder(LogitsProcessor):  # type: ignore[misc]
    """Notes the log-probabilities of each place before anything changes them.

    Stands first among a sequence's processors; ``took`` is told the token that was chosen.
    """

    def __init__(self, n_top: int) -> None:
        self.tokens: list[TokenLogprob] = []
        """One for each token that was chosen."""
        self._n_top = n_top
        self._latest: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` [1, vocabulary] as they are."""
        self._latest = scores.float().log_softmax(-1)
        return scores

    def took(self, token: int) -> None:
        """Note that ``token`` was chosen."""
        assert self._latest is not None
        self.tokens += token_logprobs(self._latest, torch.tensor([token]), self._n_top)


def token_logprobs(logprobs: torch.Tensor, tokens: torch.Tensor, n_top: int) -> list[TokenLogprob]:
    """Of logprobs [places, vocabulary] those of tokens, int64[places], and the top ones."""
    chosen = logprobs.gather(-1, tokens.to(logprobs.device)[:, None])[:, 0].tolist()
    top = logprobs.topk(min(n_top, logprobs.shape[-1]), dim=-1)
    tops = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, (ids, values) in zip(tokens.tolist(), chosen, tops, strict=True)
    ]


class PromptStates:
    """The hidden states that the passes over a prompt ended in, from which its logits are made."""

    def __init__(self, prompt_tokens: int) -> None:
        self._left = prompt_tokens
        self._hidden: list[torch.Tensor] = []  # [1, tokens, width] of each pass

    @contextmanager
    def kept(self, model: Any) -> Generator[None]:
        """Keep those of the next passes of ``model``, until the prompt has been read."""

        def keep(_module: Any, _arguments: Any, output: Any) -> None:
            if self._left > 0:
                self._hidden.append(output.last_hidden_state)
                self._left -= self._hidden[-1].shape[1]

        hook = model.base_model.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def logprobs(self, model: Any, prompt_ids: torch.Tensor, n_top: int) -> list[TokenLogprob]:
        """Of the tokens of prompt_ids, int64[1, tokens], whose states are kept.

        The logits of a few places are there at a time: those of a whole prompt may be larger than
        the rest of the run.
        """
        hidden = torch.cat(self._hidden, dim=1) if len(self._hidden) > 1 else self._hidden[0]
        ids = prompt_ids[0].cpu()
        found = [TokenLogprob(int(ids[0]), None)]
        with _headed(model) as head:
            for start in range(0, len(ids) - 1, SCORED_ROWS):
                rows = hidden[:, start : min(start + SCORED_ROWS, len(ids) - 1)]
                scored = head(rows)[0].float().log_softmax(-1)
                found += token_logprobs(scored, ids[start + 1 : start + 1 + len(scored)], n_top)
        return found


@contextmanager
def _headed(model: Any) -> Generator[Any]:
    """What makes logits [1, rows, vocabulary] of hidden states [1, rows, width].

    Some models scale or cap what their last matrix gives, in their own forward(), which is
    therefore run with given states in the place of its layers.
    """
    states: list[torch.Tensor] = []

    def forward(*_: Any, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=states[-1])

    def head(hidden: torch.Tensor) -> torch.Tensor:
        states[:] = [hidden]
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        logits: torch.Tensor = model.forward(input_ids=ids, use_cache=False).logits
        return logits

    base = model.base_model
    base.forward = forward  # of this instance, over the class's own
    try:
        yield head
    finally:
        del base.forward
