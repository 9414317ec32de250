"""Where a skip starts on another backbone: there a text's mean alone comes close to the source's embedding of it.

The skip's M solves least squares over many texts, |m M - (2 t - e)|: m is the mean of a text's states on the new
backbone, t the source's embedding, and e what the untrained soft tokens make of the text, so that e + m M points along
t. Of a source wider than the new backbone those directions are kept in which its embeddings vary most, as many as fit;
of a narrower one the other dimensions are zero. What carries over are the cosines between texts, in whatever basis.

Legend: B texts of a batch, S and D widths of source and new backbone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from pe.method.prompted import PromptedEmbedder
from pe.method.requests import Requests

RIDGE = 1e-4
"""Added to the diagonal of the texts' Gram matrix, as a share of its mean."""


def directions(second_moments: Tensor, width: int) -> Tensor:
    """`[S, width]`: orthonormal columns that keep most of what has these second moments `[S, S]`; zeros behind S."""
    size = len(second_moments)
    if size <= width:
        return F.pad(torch.eye(size, dtype=second_moments.dtype, device=second_moments.device), (0, width - size))
    return torch.linalg.eigh(second_moments).eigenvectors.flip(-1)[:, :width]


@torch.no_grad()
def fit_skip(model: PromptedEmbedder, source: PromptedEmbedder, batches: Iterable[Requests]) -> int:
    """Set the fresh skip of `model`, in place, from what `source` makes of the texts; how many texts those were.

    Raises:
        ValueError: `model` has no skip.
    """
    if model.skip is None:
        raise ValueError("skip: expected weighted, got none")
    weight, count = model.skip.weight, 0
    width = len(weight)
    gram, by_prompt = (weight.new_zeros(width, width, dtype=torch.float64) for _ in range(2))
    by_source = weight.new_zeros(width, source.dimensions, dtype=torch.float64)
    moments = weight.new_zeros(source.dimensions, source.dimensions, dtype=torch.float64)
    modes = [(module, module.training) for module in (model, source)]
    try:
        for module, _ in modes:
            module.eval()
        for requests in batches:
            prompted, means = (part.double() for part in model.prompted_and_means(requests))
            wanted = source(requests).to(means)
            gram += means.T @ means
            by_prompt += means.T @ prompted
            by_source += means.T @ wanted
            moments += wanted.T @ wanted
            count += len(wanted)
    finally:
        for module, was_training in modes:
            module.train(was_training)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype, device=gram.device)
    solved = torch.linalg.solve(gram + ridge, 2 * by_source @ directions(moments, width) - by_prompt)
    weight.copy_(solved * (width**0.5 / solved.norm()))
    return count
