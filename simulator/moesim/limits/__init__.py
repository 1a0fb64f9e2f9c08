"""What no policy can beat: the fewest loads and the least time, knowing the future."""

from moesim.limits.bounds import Limits, limits_of
from moesim.limits.loads import Shares, min_loads
from moesim.limits.time import min_time_ns

__all__ = ["Limits", "Shares", "limits_of", "min_loads", "min_time_ns"]
