"""Experiments that decided what the product does, or will not do; `python -m benchmarks.experiments`."""
