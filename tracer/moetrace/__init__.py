"""Record which experts a model chooses, as a trace that moeroute reads and moesim replays."""
