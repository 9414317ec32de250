"""What the baselines share: how a text is read under an instruction, and pooling behind it.

Legend: N texts, D embedding size, T tokens of a packed row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from pe.method.backbone import Backbone
from pe.method.loading import Filled, TextTokenizer
from pe.method.packing import Segments, to_device
from pe.method.requests import Requests, Truncation
from pe.method.token_weights import TokenWeights, standardize

Pooling = Literal["mean", "last", "weighted"]

INSTRUCT = "Instruct: {instruction}\nQuery:{text}"
BARE = "{text}"


@dataclass(frozen=True)
class Reading:
    """Token ids of one text behind its instruction, and the place where the text begins."""

    ids: list[int]
    start: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Templates:
    """What stands before a text; `{text}` comes last and `{instruction}` is filled in."""

    query: str = INSTRUCT
    document: str = BARE

    def __post_init__(self) -> None:
        for name in ("query", "document"):
            template = getattr(self, name)
            if not template.endswith("{text}"):
                raise ValueError(f"templates.{name}: expected a template that ends with {{text}}, got {template!r}")

    def read(
        self, tokenizer: TextTokenizer, requests: Requests, max_length: int, truncation: Truncation
    ) -> list[Reading]:
        """The texts' token ids behind their instructions' ids; only the text is cut, to `max_length` tokens.

        Texts are tokenised apart from the instruction, as PromptEmbedder does, so all read the same tokens.
        """
        filled = [Filled(getattr(self, item.side).removesuffix("{text}"), item.text) for item in requests.instructions]
        written = [head for head in dict.fromkeys(filled) if str(head)]
        heads = dict(zip(written, tokenizer(written), strict=True))
        bare = [filled[place] not in heads for place in requests.index]
        readings: list[Reading | None] = [None] * len(requests.texts)
        for lead in (True, False):
            places = [i for i, is_bare in enumerate(bare) if is_bare == lead]
            for i, ids in zip(places, tokenizer([requests.texts[i] for i in places], lead=lead), strict=True):
                truncation.texts += 1
                truncation.cut += len(ids) > max_length
                head = heads.get(filled[requests.index[i]], [])
                readings[i] = Reading(head + ids[:max_length], len(head))
        return [reading for reading in readings if reading is not None]


def pool(
    backbone: Backbone,
    hidden: Tensor,
    readings: Sequence[Reading],
    pooling: Pooling,
    token_weights: TokenWeights | None = None,
) -> Tensor:
    """L2-normalised embeddings `[N, D]` of packed states `[T, D]`: mean over the text alone, or the last token.

    In a weighted mean `token_weights` reads each state, standardised.
    """
    segments = Segments(tuple(map(len, readings)), hidden.device)
    if pooling == "last":
        return backbone.pool(hidden, segments, "last")
    own = None if token_weights is None else token_weights(standardize(hidden))
    if own is None and not any(reading.start for reading in readings):
        return backbone.pool(hidden, segments, "mean")
    starts = to_device([reading.start for reading in readings], hidden.device)
    lengths = to_device(segments.lengths, hidden.device)
    first = starts.repeat_interleave(lengths, output_size=segments.total)
    weights = (segments.positions >= first).float()
    weights = weights if own is None else weights * own
    return backbone.pool(hidden, segments, "weighted", token_weights=weights)


def short_name(model: str) -> str:
    """`tiny-qwen3` of `models/tiny-qwen3`."""
    return Path(model).name


def content_hash(state: Mapping[str, Tensor], *options: object) -> str:
    """A hash of named tensors and options: what an embedder's scores are kept under."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    digest.update(repr(options).encode())
    return digest.hexdigest()
