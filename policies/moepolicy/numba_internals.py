"""What this project uses of numba and numba does not document: its private names, in one place.

They were read in numba 0.68. `tests/policies/test_numba_internals.py` says which of them a newer
numba no longer has. Importing this imports nothing of numba; each function does when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

READ_IN = "0.68"
"""The numba whose source the names below were read in."""

NAMES = (
    "numba.core.caching.CompileResultCacheImpl",
    "numba.core.caching.FunctionCache._impl_class",
    "numba.core.caching.FunctionCache.load_overload",
    "numba.core.caching.FunctionCache.save_overload",
    "numba.core.registry.cpu_target.target_context",
    "numba.core.runtime.rtsys.initialize",
    "numba.core.typing.templates.infer_getattr",
    "numba.core.typing.templates.make_overload_method_template",
)
"""What is imported. ``dispatcher._cache`` and ``template._resolve`` are used besides."""

NO_ALLOCATION = "_nrt"  # the option of njit that says whether code may make arrays
NEEDS_ALLOCATION = "NRT required"  # what numba says of code that makes arrays and must not


def start_allocator() -> None:
    """Have compiled code be able to make arrays in this process; once or more often."""
    from numba.core.registry import cpu_target
    from numba.core.runtime import rtsys

    rtsys.initialize(cpu_target.target_context)


def keep_in(
    folder: Callable[[], Path], name: str, dispatcher: Any, saved: Callable[[], None]
) -> None:
    """Have ``dispatcher`` look for its code in ``folder`` under ``name`` before it compiles it, and
    leave it there; ``saved`` is called after that. Where a file cannot be read or written, code is
    compiled each time.
    """
    from numba.core.caching import CompileResultCacheImpl, FunctionCache

    class Locator:
        def get_cache_path(self) -> str:
            return str(folder())

        def ensure_cache_path(self) -> None:
            folder().mkdir(parents=True, exist_ok=True)

        def get_source_stamp(self) -> str:
            return name

    class Implementation(CompileResultCacheImpl):  # type: ignore[misc]
        def __init__(self, py_func: Any) -> None:
            self._lineno = py_func.__code__.co_firstlineno
            self._locator = Locator()
            self._filename_base = name

    class KeptCode(FunctionCache):  # type: ignore[misc]
        _impl_class = Implementation

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            try:
                return super().load_overload(sig, target_context)
            except Exception:  # a damaged file: whatever unpickling it may raise
                with suppress(OSError):  # saving would read it once more
                    (folder() / f"{name}.nbi").unlink(missing_ok=True)
            return None

        def save_overload(self, sig: Any, data: Any) -> None:
            with suppress(OSError):
                super().save_overload(sig, data)
                saved()

    dispatcher._cache = KeptCode(dispatcher.py_func)


def resolve_method(name: str, overload: Callable[..., Any]) -> None:
    """Have ``state.name(...)`` of a named tuple be what ``overload`` gives, and a field of that
    name stay a field.

    What numba's ``overload_method`` does, but that another class may have a field of the name.
    """
    from numba import types
    from numba.core.typing.templates import infer_getattr, make_overload_method_template
    from numba.extending import overload as overloaded

    template: Any = make_overload_method_template(types.NamedTuple, name, overload, inline="never")
    resolve = template._resolve

    def of_this_class(self: Any, typ: Any, attr: str) -> Any:
        return None if attr in typ.fields else resolve(self, typ, attr)

    template._resolve = of_this_class
    infer_getattr(template)
    overloaded(overload)(overload)
