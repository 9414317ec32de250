"""Benchmarks: every figure of BENCHMARKS.md, measured side by side and recorded.

On a CPU torch's large tensors stand on huge pages. On small ones what a fault costs decides how long the padded LoRA
step takes, which maps the largest tensors: 4 to 7 s for one batch within a day, while other rows stayed as they were.
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once, at its first tensor
