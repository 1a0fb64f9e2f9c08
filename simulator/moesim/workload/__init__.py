"""A routing trace as the expert steps that every engine replays."""

DEFAULT_TRACE = "tiny"  # the sample that is replayed where a command or function is told of none
