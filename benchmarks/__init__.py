"""Timings of the operators: what is timed stands in registry.py, how in run.py, what came out in results/."""
