"""Hit ratios for every cache size from one pass over a trace."""
