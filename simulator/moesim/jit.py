"""Numba's compiler with the options every kernel of the simulator shares, its code kept on disk.

Importing this imports numba, so modules of kernels are imported where they are first needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from moepolicy.codecache import keep

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def jit(function: Kernel) -> Kernel:
    """Compile ``function`` on its first call. Kernels that call each other share one file: code is
    kept under the file's digest, and no change in another one is noticed. One whose name begins
    with an underscore is called by the others only, and kept with them."""
    if function.__name__.startswith("_"):
        inner = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
        return cast(Kernel, numba.njit(nogil=True, error_model="numpy", **inner)(function))
    kernel = numba.njit(nogil=True, error_model="numpy")(function)
    source = Path(function.__code__.co_filename).read_bytes()
    digest = hashlib.sha256(f"numba {numba.__version__} ".encode() + source).hexdigest()
    keep(kernel, f"{function.__name__}-{digest[:32]}", tell=True)
    return cast(Kernel, kernel)
