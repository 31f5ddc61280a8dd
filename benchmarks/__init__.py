"""Scripts that measure; their figures stand in BENCHMARKS.md."""
