"""The parts of `scripts/benchmark.py`: cases, the worker of a side, measuring and the report."""
