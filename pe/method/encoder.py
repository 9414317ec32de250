"""Encoding texts, the same for every embedder: what is asked for, the batches, and the order of the results.

Legend: I instructions, N texts, B texts of a batch, D embedding size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from pe.data.instructions import default_instruction
from pe.method.backbone import Backbone
from pe.method.packing import budget_on, by_length, to_device, token_batches
from pe.method.requests import Instruction, Requests, Side, Truncation, check_arguments
from pe.method.text_store import TextStore

Floats = npt.NDArray[np.float32]
Embed = Callable[[list[str], list[Any]], Tensor]
"""Texts of a batch and what is read of each -> embeddings `[I, B, D]`."""
logger = logging.get_logger(__name__)


class Encoder(ABC):
    """What embeds texts by a backbone. A subclass says what it reads of a text, and how it embeds a batch.

    Attributes:
        backbone: the decoder.
        name: what tables call it.
        instructions: those it was trained under, by name (see `pe.data.instructions`), `query` and `document` the
            sides' defaults.
        training_sets: the names of the sets it was trained on.
        truncation: counts since it was made.
    """

    backbone: Backbone
    name: str
    truncation: Truncation
    instructions: Mapping[str, str] = MappingProxyType({})
    training_sets: Sequence[str] = ()

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dimensions(self) -> int:
        """D, the size of an embedding."""
        return self.backbone.hidden_size

    @abstractmethod
    def readings(self, requests: Requests, at_most: int | None = None) -> list[Any]:
        """What is read of each text, cut and counted: token ids, or what has them and their number as its length.

        `at_most` cuts texts to fewer tokens than the encoder's own limit.
        """

    @abstractmethod
    def _embed_under(self, wanted: Sequence[Instruction]) -> Embed:
        """What embeds a batch, sorted by length, under each of the instructions."""

    def _at_rest(self) -> AbstractContextManager[object]:
        """Inside it nothing is drawn at random."""
        return nullcontext()

    def tokenize(self, requests: Requests) -> list[list[int]]:
        """Token ids that are read of each text, cut and counted."""
        return self.readings(requests)

    def tokenized(self, requests: Requests, at_most: int | None = None) -> Requests:
        """The requests with what is read of each text (see `readings`), so that no pass tokenises them again."""
        return replace(requests, read=self.readings(requests, at_most))

    def _sorted(self, requests: Requests) -> tuple[list[int], list[Any]]:
        """The order of the texts from short to long, and what is read of each, in that order."""
        read = self.readings(requests) if requests.read is None else requests.read
        order = by_length(read)
        return order, [read[i] for i in order]

    def encode(
        self,
        texts: Iterable[str],
        *,
        instruction: str | None = None,
        side: Side = "query",
        batch_tokens: int = 16_384,
        progress: bool = False,
        store: TextStore | str | Path | None = None,
    ) -> Floats:
        """L2-normalised embeddings `[N, D]` float32 of N texts, in their order.

        Args:
            texts: what to embed.
            instruction: the task, in a sentence; use the one of training for a task seen there. None: the side's
                default, which a warning names once.
            side: whose templates are used.
            batch_tokens: tokens of a packed batch, fewer on a CPU; a longer text stands alone.
            progress: show a progress bar.
            store: where the text pass is kept and looked for first, or the folder of one (see
                `pe/method/text_store.py`).

        Raises:
            ValueError: no instruction and no default, anything but strings, an unknown side, batches of less than a
                token, or a store that cannot be used, by this embedder or at all.
        """
        if instruction is None:
            instruction = self.default_instruction(side)
            logger.warning_once(f"{self.name}: no instruction given, so {side} texts go under {instruction!r}")
        texts, (instruction,) = check_arguments(texts, [instruction], side, batch_tokens)
        with self.backbone.turns.taken(), self.reading_from(store):
            return self._encode(texts, [Instruction(instruction, side)], batch_tokens, progress)[0].numpy(force=True)

    def reading_from(self, store: TextStore | str | Path | None) -> AbstractContextManager[object]:
        """Inside it the text pass is kept in a store, or in the folder of one, and looked for there first.

        Raises:
            ValueError: a store, where the passes over texts have what trains or what is asked in them.
        """
        if store is not None:
            raise ValueError(
                f"text store: {self.name} reads no text apart from what trains or is asked, so nothing can be kept;"
                " leave the store out"
            )
        return nullcontext()

    def default_instruction(self, side: Side = "query") -> str:
        """What a side's texts are embedded under where no instruction is given.

        Raises:
            ValueError: there is none, as in an embedder that no recipe has trained.
        """
        default = default_instruction(self.instructions, side)
        if default is None:
            raise ValueError(
                f"instruction: expected a sentence, got none, and {self.name} has no default (`pe.train` sets one); say"
                " what the texts are embedded for, or set the embedder's `instructions`"
            )
        return default

    @torch.no_grad()
    def _encode(self, texts: list[str], wanted: list[Instruction], batch_tokens: int, progress: bool) -> Tensor:
        """Embeddings `[I, N, D]` float32 on the backbone's device."""
        with self.backbone.turns.taken(), self._at_rest():
            embeddings = torch.empty(len(wanted), len(texts), self.dimensions, device=self.device)
            if not embeddings.numel():
                return embeddings
            read = self.readings(Requests(texts, wanted[:1], [0] * len(texts)))
            embed = self._embed_under(wanted)
            with tqdm(total=len(texts), unit="text", disable=not progress, desc="encode") as bar:
                for batch in token_batches([len(reading) for reading in read], budget_on(self.device, batch_tokens)):
                    rows = embed([texts[i] for i in batch], [read[i] for i in batch])
                    embeddings[:, to_device(batch, self.device)] = rows
                    bar.update(len(batch))
            return embeddings
