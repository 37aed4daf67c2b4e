"""Benchmarks of the repository: suites for pytest-benchmark, committed results, and the renderer of their page."""
