"""What libraries keep for themselves, and how to have them keep little where there is a budget."""

from __future__ import annotations

import ctypes
import os

# More than the shapes of one token in a model's layers, which come again in every layer. Each takes
# up to 0.9 MiB, measured: those of one thread lie within what a plan counts for libraries.
KEPT_OPERATIONS = 24
RETURNED_BYTES = 128 << 10
"""A block of so many bytes goes back to the system when it is freed: what glibc begins with. Of
what a token takes only logits are as large; what a prompt takes is."""
# Of malloc.h, and what sets them for a whole process.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
_MALLOC_TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_threshold")


def keep_little(*, on_host: bool) -> None:
    """Have libraries keep little, since a budget is to be kept to; ``on_host``: of host memory."""
    _keep_few_operations()
    if on_host:
        return_freed_blocks()


def _keep_few_operations() -> None:
    """Let torch keep KEPT_OPERATIONS of oneDNN's operations, unless the environment says how many.

    In bfloat16 oneDNN makes one for each shape, such as each number of tokens that an expert gets,
    and each length of a text that attention is computed over. torch and oneDNN keep 1,024 of them,
    by a thread and in all: 800 MiB. Where there is a budget that is too much; where there is none,
    a prompt is read some 20 % faster with all of them. Both ask the environment when they make the
    first, so this comes too late in a process that has computed in bfloat16 before.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_OPERATIONS))


def return_freed_blocks() -> None:
    """Have glibc's malloc give blocks of RETURNED_BYTES or more back when they are freed, and at
    once what it has kept of them. Nothing where the environment sets malloc up, or the C library
    is another.

    glibc itself takes the size of each such block that is freed, up to 32 MiB, for the size below
    which blocks lie side by side in its heap. What is freed there stays resident while a later
    block is in use, and up to 64 MiB at the end do anyway: measured, 30 to 85 MiB while prompts of
    1,501 tokens are read, by chance, since it depends on the order in which threads allocate. A
    prompt takes 8 % more CPU time this way with hidden states of 2,048 numbers and 17
    to 19 % more with 256 and 512, and a decoded token takes no more.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or _malloc_is_set_up():
        return
    for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        library.mallopt(parameter, RETURNED_BYTES)
    library.malloc_trim(0)


def _malloc_is_set_up() -> bool:
    """Whether the environment says what malloc is to keep."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    named = [name in os.environ for name in _MALLOC_VARIABLES]
    return any(named) or any(name in tunables for name in _MALLOC_TUNABLES)
