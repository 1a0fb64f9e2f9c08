"""Opens the weights of a checkpoint in whichever format of files they are."""

from __future__ import annotations

from pathlib import Path

from moerun.checkpoint.gguf.files import GgufWeights
from moerun.checkpoint.gguf.header import is_gguf
from moerun.checkpoint.published.weights import PublishedCheckpoint
from moerun.checkpoint.weights import Weights


def open_weights(path: Path) -> Weights:
    """The tensors of a checkpoint: a folder of safetensors files, or a GGUF file.

    Raises RunError where a file is missing or damaged.
    """
    return GgufWeights(path) if is_gguf(path) else PublishedCheckpoint(path)
