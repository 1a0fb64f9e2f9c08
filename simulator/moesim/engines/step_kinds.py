"""Kinds of step: how a step came by each of its experts.

Two bits a rank, above the lowest bit, which says if a pass begins; 0: the expert was there.
`moesim.engines.onepass_kernel` finds the kinds, `moesim.engines.onepass` times one of each.
"""

from __future__ import annotations

INTO_FREE = 1
INTO_EMPTIED = 2
BYPASSED = 3
