"""Measuring this machine for the simulator, and comparing predictions with live runs."""
