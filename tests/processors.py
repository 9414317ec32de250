"""What a processor must have for a test to say something."""

from __future__ import annotations

import pytest
import torch

from pe.method.quantized import has_eight_bits

sums_int8_exactly = pytest.mark.skipif(
    not has_eight_bits("int8", torch.device("cpu")),
    reason="this processor lacks AVX-512 VNNI: it adds pairs of int8 products in 16 bits, which they overflow",
)
