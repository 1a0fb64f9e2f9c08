"""The configuration and the tokenizer of a store: copied, or made of a GGUF header."""

from __future__ import annotations

import shutil
from pathlib import Path

from moerun.checkpoint.gguf.header import is_gguf
from moerun.checkpoint.gguf.tokenizer import gguf_tokenizer
from moerun.checkpoint.source import ModelSource

_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_NOT_COPIED = ("index.json", "safetensors.index.json")


def write_side_files(model: ModelSource, folder: Path) -> None:
    """Configuration, tokenizer and the like of ``model`` into a store's ``folder``."""
    source = model.checkpoint.path
    if is_gguf(source):
        model.config.save_pretrained(folder)
        if (tokenizer := gguf_tokenizer(source)) is not None:
            tokenizer.save_pretrained(folder)
        return
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if not file.name.endswith(_NOT_COPIED):
                shutil.copyfile(file, folder / file.name)
