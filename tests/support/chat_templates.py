"""Chat templates of several kinds, as published models have them, and their special tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from moerun.checkpoint.hub import resolve
from moerun.offload.load import load_tokenizer
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack


class Style(NamedTuple):
    """A template, the special tokens it is written in, and those of them that end a turn."""

    template: str
    special: tuple[str, ...]
    ends: tuple[str, ...]
    plain: tuple[str, ...] = ()  # tokens of their own that are not special


_CHATML_ANSWER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
STYLES = {
    "chatml": Style(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        ("<|im_end|>",),
    ),
    "llama3": Style(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "\n\n{{ m.content | trim }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}<|eom_id|>"
        "{% else %}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        ("<|eot_id|>", "<|eom_id|>"),
    ),
    "gemma": Style(
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}"
        "\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        ("<end_of_turn>",),
    ),
    "phi": Style(  # the end of the text is written behind the end of the turn
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|end|>"),
        ("<|end|>",),
    ),
    "glm": Style(  # a turn ends where the next begins
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
        "<think>{{ m.reasoning_content if loop.last else '' }}</think>\n{% endif %}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ("<|user|>", "<|assistant|>"),
        ("<|user|>",),
        ("<think>", "</think>"),
    ),
    "qwen3": Style(
        _CHATML_ANSWER + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        ("<|im_end|>",),
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    "mistral": Style(  # calls are a list behind a special token, and end with the text
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% elif m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}"
        "{{ call.function | tojson }}{% endfor %}]</s>{% else %}{{ m.content }}</s>{% endif %}"
        "{% endfor %}",
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "</s>"),
        ("</s>",),
    ),
    "prefilled": Style(
        _CHATML_ANSWER
        + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        ("<|im_end|>",),
        ("<think>", "</think>"),
    ),
    "r1": Style(  # takes reasoning off past answers, and never writes it
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% else %}<|Assistant|>{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
        "<|sentence_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        ("<|User|>", "<|Assistant|>", "<|sentence_end|>"),
        ("<|sentence_end|>",),
        ("<think>", "</think>"),
    ),
    "harmony": Style(
        "<|start|>system<|message|>Reasoning: low. Channels: analysis, final.<|end|>"
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if m.tool_calls %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}"
        "<|channel|>commentary json<|message|>"
        "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
        "{% elif loop.last and not add_generation_prompt %}{% if 'thinking' in m %}"
        "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
        "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        ("<|return|>", "<|call|>"),
    ),
}


def tokenizer_of(style: str) -> Any:
    """The bundled model's tokenizer, taught a style's template and tokens."""
    from tokenizers import AddedToken

    chosen, tokenizer = STYLES[style], load_tokenizer(resolve("tiny"))
    tokenizer.add_tokens([AddedToken(text, special=True) for text in chosen.special])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in chosen.plain])
    tokenizer.chat_template = chosen.template
    return tokenizer


def styled_checkpoint(style: str, folder: Path, *, eos: str | None = None) -> Path:
    """The bundled model with the tokenizer of a style; ``eos`` is that tokenizer's end alone."""
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer_of(style)
    model = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    if eos is not None:
        tokenizer.eos_token = eos
    tokenizer.save_pretrained(folder)
    return folder


def styled_store(style: str, folder: Path) -> ExpertStore:
    return pack(styled_checkpoint(style, folder / "model"), folder / "store", name=style)


@contextmanager
def scripted(model: Any, tokens: Sequence[int]) -> Iterator[None]:
    """The model gives these tokens one after the other, whatever it reads; then its first again."""
    given = iter(tokens)

    def choose(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros_like(logits)
        chosen[..., next(given, tokens[0])] = 1
        return chosen

    hook = model.get_output_embeddings().register_forward_hook(choose)
    try:
        yield
    finally:
        hook.remove()


def spelled(tokenizer: Any, text: str) -> list[int]:
    """A text as the tokens of a model that writes it, special ones among them."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
