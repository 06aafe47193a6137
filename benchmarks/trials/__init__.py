"""Trials of what may go wrong, many times over: `python -m benchmarks.trials --help`."""
