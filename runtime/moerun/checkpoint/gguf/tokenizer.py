"""The tokenizer of a GGUF file, made by transformers' converter, and kept as its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moerun.checkpoint.gguf.header import read_header
from moerun.errors import RunError

_FILES = ("tokenizer.json", "tokenizer_config.json")
_BESIDE = "put the model's tokenizer.json and tokenizer_config.json next to the file"
# Names under which llama.cpp splits text as GPT-2 does, which is what transformers falls back on.
_AS_GPT2 = ("gpt-2", "olmo", "phi-2", "mpt", "jais")


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF model; None where the file has none.

    The files tokenizer.json and tokenizer_config.json next to the model stand before the model's
    own vocabulary. Raises RunError where transformers cannot convert that.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if _has_files(path):
        try:
            return AutoTokenizer.from_pretrained(path.parent)
        except Exception as error:  # tokenizer classes fail in their own ways
            raise RunError(f"the tokenizer next to {path} cannot be used: {error}") from error
    if "tokenizer.ggml.model" not in read_header(path).metadata:
        return None
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    try:
        architecture, described, told = get_gguf_tokenizer(str(path))
        backend, more = convert_gguf_tokenizer(architecture, described)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **told, **more)
    except Exception as error:  # the converter believes what the file says
        reason = f"{error}".strip().splitlines() or [type(error).__name__]
        raise RunError(
            f"transformers cannot convert the tokenizer of {path} ({reason[0]}): {_BESIDE}"
        ) from error


def tokenizer_note(path: Path) -> str | None:
    """What a person should know of the tokenizer: that text may be split otherwise, or not at all;
    None where there is nothing to tell."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    told = read_header(path).metadata
    if _has_files(path):
        return None
    if "tokenizer.ggml.model" not in told:
        return f"{path.name} has no tokenizer, and text cannot be generated: {_BESIDE}"
    rule = told.get("tokenizer.ggml.pre", "gpt-2")
    if told["tokenizer.ggml.model"] != "gpt2" or rule in (*_AS_GPT2, *GGUF_PRE_TOKENIZER_SPLITS):
        return None
    return (
        f"transformers does not know how {path.name} splits text ({rule!r}) and splits it as GPT-2 "
        f"does, which may give other tokens: {_BESIDE}, and pack again"
    )


def _has_files(path: Path) -> bool:
    return all((path.parent / name).is_file() for name in _FILES)
