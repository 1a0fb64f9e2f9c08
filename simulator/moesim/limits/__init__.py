"""What no policy can beat: the fewest loads and the least time, knowing the future."""

from moesim.limits.gap import Gap, gap_closed
from moesim.limits.loads import min_loads
from moesim.limits.time import min_time_ns

__all__ = ["Gap", "gap_closed", "min_loads", "min_time_ns"]
