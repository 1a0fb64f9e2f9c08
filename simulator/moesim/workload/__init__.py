"""A routing trace as the expert steps that every engine replays."""
