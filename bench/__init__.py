"""Benchmarks: every figure of BENCHMARKS.md and `bench/tables/`, measured side by side and recorded.

On a CPU torch's large tensors stand on huge pages. On small ones what a fault costs, which changes within a day,
decides how long the steps take that map the largest tensors, padded LoRA's above all.
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once, at its first tensor
