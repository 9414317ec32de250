"""A text encoder with instructions as an mteb model.

The instruction of a task is the caller's, else the task's own prompt, else the one of the task's type in mteb, else
its description. Queries and documents follow mteb's prompt type; a symmetric task has none and takes the query side
throughout.

Legend: N texts, D embedding size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from mteb.abstasks.abstask import get_abstask_prompt
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from torch import nn

from pe.data.benchmarks import trained_tasks
from pe.data.tasks import Floats, check_embeddings
from pe.method.prompted import PromptedEmbedder
from pe.method.requests import Side

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import Array, BatchedInput
    from torch.utils.data import DataLoader


class TextEncoder(Protocol):
    """What is scored: `PromptEmbedder`, or anything with its `encode`."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str:
        """A hash of all that decides the embeddings: scores are kept under it."""
        ...

    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str,
        side: Side = "query",
        batch_tokens: int = 16_384,
        progress: bool = False,
    ) -> Floats:
        """L2-normalised embeddings `[N, D]` float32, in the order of the texts."""
        ...


def details(encoder: TextEncoder) -> dict[str, Any]:
    """Fields of `ModelMeta` that an embedder of ours knows; none of any other."""
    if not isinstance(encoder, PromptedEmbedder):
        return {}
    tables = [module.weight for module in encoder.modules() if isinstance(module, nn.Embedding)]
    weights = list(encoder.parameters())
    return {
        "embed_dim": encoder.dimensions,
        "n_parameters": sum(weight.numel() for weight in weights),
        "n_embedding_parameters": sum(weight.numel() for weight in set(tables)),
        "memory_usage_mb": sum(weight.nbytes for weight in weights) / 2**20,
        "max_tokens": encoder.config.max_length,
        "training_datasets": trained_tasks(encoder.training_sets) or None,
        "open_weights": True,
    }


class MtebEncoder(AbsEncoder):
    """`encoder` as a model for `mteb.evaluate`; each distinct text of a symmetric task is encoded once.

    A cache of mteb keeps scores under the revision that the encoder has now: wrap it anew when it has been trained.

    Args:
        encoder: what is scored.
        instructions: by task name for its queries (and for all texts of a symmetric task), by `NAME-document` for its
            documents. Other instructions give other scores, so they are part of the name that mteb keeps scores under.
        batch_tokens: tokens of a batch.
    """

    def __init__(
        self, encoder: TextEncoder, *, instructions: Mapping[str, str] | None = None, batch_tokens: int = 16_384
    ) -> None:
        self.model = encoder
        self.instructions = dict(instructions or {})
        if empty := [name for name, sentence in self.instructions.items() if not sentence.strip()]:
            raise ValueError(f"instructions: {empty[0]}: expected a sentence, got {self.instructions[empty[0]]!r}")
        self.batch_tokens = batch_tokens
        self._seen: dict[str, Floats] = {}
        self._seen_under: tuple[str, str, str] = ("", "", "")
        name = encoder.name if "/" in encoder.name else f"pe/{encoder.name}"
        meta: dict[str, Any] = details(encoder) | {
            "name": name,
            "revision": encoder.revision,
            "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["PyTorch"],
            "use_instructions": True,
        }
        if self.instructions:
            content = json.dumps(self.instructions, sort_keys=True).encode()
            meta["experiment_kwargs"] = {"instructions": hashlib.sha256(content).hexdigest()[:12]}
        self.mteb_model_meta: ModelMeta = ModelMeta.create_empty(meta)

    def instruction(self, task: TaskMetadata, side: Side) -> str:
        """The sentence that texts of one side of a task are encoded under; documents without one take the queries'."""
        own: Mapping[str, Any] = task.prompt if isinstance(task.prompt, dict) else {"query": task.prompt}
        document = self.instructions.get(f"{task.name}-document") or own.get("document")
        if side == "document" and document:
            return str(document)
        query = self.instructions.get(task.name) or own.get("query")
        return str(query or get_abstask_prompt(task.name) or task.description)

    def get_instruction(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> str:
        return self.instruction(task_metadata, "document" if prompt_type is PromptType.document else "query")

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Array:
        """Embeddings `[N, D]` of the texts of `inputs`; mteb's `batch_size` is not used (batches go by tokens).

        Raises:
            ValueError: the encoder returned another shape, or values that are not finite.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        instruction = self.get_instruction(task_metadata, prompt_type)
        side: Side = "document" if prompt_type is PromptType.document else "query"
        # Sides are searched in chunks of a corpus that may be large: only symmetric tasks keep what they have seen.
        seen = self._keep(task_metadata.name, instruction) if prompt_type is None else {}
        new = [text for text in dict.fromkeys(texts) if text not in seen]
        if new:
            progress = bool(kwargs.get("show_progress_bar", False))
            rows = self.model.encode(
                new, instruction=instruction, side=side, batch_tokens=self.batch_tokens, progress=progress
            )
            seen.update(zip(new, check_embeddings(self.model.name, rows, len(new)), strict=True))
        return np.stack([seen[text] for text in texts])

    def _keep(self, task: str, instruction: str) -> dict[str, Floats]:
        """Embeddings by text of this task under this instruction by the encoder as it is; others are let go."""
        now = (self.model.revision, task, instruction)
        if self._seen_under != now:
            self._seen, self._seen_under = {}, now
        return self._seen
