"""Benchmarks: every figure of BENCHMARKS.md, measured side by side and recorded."""
