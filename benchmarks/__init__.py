"""Benchmarks: wall time and peak memory of whole processes, as ratios to a floor measured in the same run."""
