"""The parts of `scripts/benchmark.py`: what is measured (cases), where (worker), how (measuring), and what is said."""
