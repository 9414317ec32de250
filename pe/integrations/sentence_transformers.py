"""A saved PromptEmbedder as a model of sentence-transformers, for encoding:

    model = SentenceTransformer("runs/tiny/model", trust_remote_code=True)
    queries = model.encode_query(texts, prompt="Retrieve semantically similar text")

What sentence-transformers calls a prompt is the instruction here: the soft prompt is written for it, and it is never
put before a text. `encode_document` takes the document's templates, `encode` and `encode_query` the query's.

Legend: B texts, D embedding size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Self

import torch
from sentence_transformers.base.modules import InputModule

from pe.model import PromptEmbedder, listed


class PromptModule(InputModule):
    """The one module of a SentenceTransformer; its embeddings are of length one.

    Args:
        embedder: what encodes.
    """

    save_in_root = False

    def __init__(self, embedder: PromptEmbedder) -> None:
        super().__init__()
        self.embedder = embedder
        self.tokenizer = embedder.backbone.text_tokenizer.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Tokens at which a text is cut."""
        return self.embedder.config.max_length

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        config = dataclasses.replace(self.embedder.config, max_length=tokens)
        self.embedder.backbone.check_length(tokens + config.prompter.soft_tokens)
        self.embedder.config = config

    def get_config_dict(self) -> dict[str, Any]:
        """What a SentenceTransformer shows of the module."""
        config = self.embedder.config
        shown = {"layout": config.layout, "reader": config.reader, "skip": config.skip}
        return {"embedder": self.embedder.name, "backbone": self.embedder.backbone.name, **shown}

    def get_embedding_dimension(self) -> int:
        return self.embedder.dimensions

    def preprocess(
        self, inputs: Iterable[Any], prompt: str | None = None, task: str | None = None, **_: object
    ) -> dict[str, Any]:
        """The texts as they are, with the instruction and the side they are encoded under.

        Raises:
            ValueError: no instruction, or an input that is no text.
        """
        if not prompt:
            raise ValueError(
                "prompt: expected the instruction to embed under, got none; give encode(..., prompt='...'), or"
                " SentenceTransformer(..., prompts={'query': '...', 'document': '...'}, default_prompt_name='query')"
            )
        texts = listed("inputs", inputs)
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"inputs: expected texts, got {type(text).__name__}: {text!r:.80}")
        return {"texts": texts, "instruction": prompt, "side": "document" if task == "document" else "query"}

    def forward(self, features: dict[str, Any], **_: object) -> dict[str, Any]:
        """Add the embeddings `[B, D]` float32 as `sentence_embedding`.

        Raises:
            ValueError: training is asked for.
        """
        if self.training and torch.is_grad_enabled():
            raise ValueError("PromptModule only encodes; train with `python -m pe.train`")
        rows = self.embedder.encode_tensor(
            features["texts"], instructions=[features["instruction"]], side=features["side"]
        )
        return features | {"sentence_embedding": rows[0]}

    def save(self, output_path: str, *_: object, **__: object) -> None:
        self.embedder.save_pretrained(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        *,
        model_kwargs: dict[str, Any] | None = None,
        **_: object,
    ) -> Self:
        """Load a saved PromptEmbedder; `model_kwargs` may have its `backbone` and `dtype`.

        Raises:
            FileNotFoundError, ValueError: see `PromptEmbedder.from_pretrained`; or another key in `model_kwargs`.
        """
        options = dict(model_kwargs or {})
        backbone, dtype = options.pop("backbone", None), options.pop("dtype", None)
        if options:
            raise ValueError(
                f"model_kwargs: expected no key but 'backbone' and 'dtype', got {', '.join(map(repr, options))}"
            )
        folder = cls.load_dir_path(
            model_name_or_path,
            subfolder=subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        if folder is None:
            raise FileNotFoundError(f"{model_name_or_path}: no folder {subfolder!r} there; save the model again")
        return cls(PromptEmbedder.from_pretrained(folder, backbone=backbone, dtype=dtype))
