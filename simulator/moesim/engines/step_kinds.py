"""Kinds of step: how each expert came that a step missed.

Two bits an expert, that of the copy that started first lowest. Without any, every expert was there.
`moesim.engines.replay` counts the kinds, `moesim.engines.step_times` says what one of each takes.
"""

from __future__ import annotations

INTO_FREE = 1
INTO_EMPTIED = 2
BYPASSED = 3

BITS = 2
