"""The prefix layout: instruction and soft prompt once for each distinct prompt, then the texts behind them.

Legend: B texts, N prompts, K soft tokens, D the backbone's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pe.kernels.pool_normalize import Mode
from pe.method.alignment import AlignedPrompts
from pe.method.backbone import Backbone
from pe.method.loading import Filled
from pe.method.packing import Segments, pack, to_device


def embed_behind_prefix(
    backbone: Backbone,
    ids: Sequence[Sequence[int]],
    heads: Sequence[Filled],
    prompts: AlignedPrompts,
    index: Sequence[int],
    mode: Mode,
) -> Tensor:
    """Embeddings `[B, D]` of texts of token ids, sorted by length, each behind its head and prompt `index[b]` of N.

    Texts of one prompt have one head.
    """
    head_of = dict(zip(index, heads, strict=True))
    used = sorted(head_of)
    head_ids = backbone.text_tokenizer([head_of[n] for n in used])
    pieces = [
        piece
        for n, row in zip(used, head_ids, strict=True)
        for piece in (to_device(row, backbone.device), prompts.ids([n]))
    ]
    segments = Segments(tuple(len(row) + prompts.prompts.shape[1] for row in head_ids), backbone.device)
    rows = backbone.prompt_rows(torch.cat(pieces), prompts.prompts, prompts.weight)
    _, prefix = backbone(rows, segments, keep=True)
    flat, texts = pack(ids, backbone.device)
    place = {n: position for position, n in enumerate(used)}
    hidden, _ = backbone(backbone.token_rows(flat), texts, context=prefix, context_index=[place[n] for n in index])
    return backbone.pool(hidden, texts, mode)
