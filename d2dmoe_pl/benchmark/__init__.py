"""Is the converted model faster than the dense one, on the clock? Timed in turn, in one process, against the ideal."""

from d2dmoe_pl.benchmark.command import benchmark_parser, run_benchmark

__all__ = ["benchmark_parser", "run_benchmark"]
