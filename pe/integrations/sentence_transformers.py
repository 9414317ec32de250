"""A saved PromptEmbedder as a model of sentence-transformers, to encode with and to train:

    model = SentenceTransformer("runs/tiny/model", trust_remote_code=True)
    queries = model.encode_query(texts, prompt="Retrieve semantically similar text")

What sentence-transformers calls a prompt is the instruction here: the soft prompt is written for it, and it is never
put before a text. An input may bring its own, as the pair `(prompt, text)`. A folder's prompts are the instructions of
its training, one of them the default. `encode_document` takes the document's templates, `encode` and `encode_query` the
query's; so do a trainer's columns, by its `router_mapping`. An option that would change nothing is refused.

Legend: B texts, L tokens of the longest, D embedding size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, Self

import torch
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import InputModule
from torch.nn.utils.rnn import pad_sequence

from pe.card import shown
from pe.config import Dtype
from pe.data.instructions import as_prompts, default_instruction
from pe.method.requests import Instruction, Requests, Side, listed
from pe.model import PromptEmbedder

TASKS: dict[str | None, Side] = {None: "query", "query": "query", "document": "document"}
"""The side of each task of sentence-transformers."""


class Features(dict[str, Any]):
    """What a `PromptModule` gives for a batch; sentence-transformers asks it for a user's `output_value` by name."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(
            f"output_value: expected 'sentence_embedding', got {key!r}: the soft prompt is pooled, not a text's tokens"
        )


def refuse_options(options: Mapping[str, object], instead: str) -> None:
    """Raise ValueError for the first option that is given; `instead` says what there is."""
    for name, given in options.items():
        if given:
            raise ValueError(f"{name}: expected none, got {given!r:.80}: {instead}")


def asked(item: object, prompt: str | None) -> tuple[str | None, str]:
    """Instruction and text of an input: its own of a pair, else `prompt`.

    Raises:
        ValueError: neither a text nor a pair.
    """
    own, text = item if isinstance(item, list | tuple) and len(item) == 2 else (prompt, item)
    if not isinstance(text, str) or not isinstance(own, str | None):
        raise ValueError(f"inputs: expected texts, or pairs (prompt, text), got {type(item).__name__}: {item!r:.80}")
    return own, text


def pop_dtype(options: dict[str, Any]) -> Dtype | None:
    """Take `dtype` and `torch_dtype`, each a name or a type of torch, out of `model_kwargs`; loading checks the name.

    Raises:
        ValueError: they differ.
    """
    given = {name: options.pop(name, None) for name in ("dtype", "torch_dtype")}
    names: dict[str, Any] = {name: str(x).removeprefix("torch.") for name, x in given.items() if x is not None}
    if len(set(names.values())) > 1:
        raise ValueError(f"model_kwargs: expected one type, got {', '.join(f'{n}={x}' for n, x in names.items())}")
    return next(iter(names.values()), None)


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
        backbone, config = self.embedder.backbone, self.embedder.config
        trained = getattr(backbone.model.config.get_text_config(), "max_position_embeddings", None)
        positions = min((limit for limit in (backbone.position_limit, trained) if limit is not None), default=math.inf)
        most = positions - config.prompter.soft_tokens
        if not (isinstance(tokens, Integral) and 1 <= tokens <= most):
            raise ValueError(
                f"max_seq_length: expected a whole number from 1 to {most} ({backbone.name} was made for {positions}"
                f" positions, and the prompt takes {config.prompter.soft_tokens}), got {tokens!r}"
            )
        self.embedder.config = dataclasses.replace(config, max_length=int(tokens))

    def get_config_dict(self) -> dict[str, Any]:
        """What a SentenceTransformer shows of the module."""
        config = self.embedder.config
        options = {"layout": config.layout, "reader": config.reader, "skip": config.skip}
        return {"embedder": self.embedder.name, "backbone": shown(self.embedder.backbone.name), **options}

    def get_embedding_dimension(self) -> int:
        return self.embedder.dimensions

    def on_model_ready(self, model: BaseModel) -> None:
        """Give a model without prompts the embedder's: of a folder saved before it had them, or made of modules."""
        prompts = as_prompts(self.embedder.instructions)
        if "query" in prompts and model.default_prompt_name is None and not any(model.prompts.values()):
            model.prompts, model.default_prompt_name = dict(prompts), "query"

    def preprocess(
        self, inputs: Iterable[Any], prompt: str | None = None, task: str | None = None, **others: object
    ) -> dict[str, Any]:
        """What the backbone reads of each text, `input_ids` and `attention_mask` `[B, L]`, and under what.

        A loss may run a part of the rows of all tensors: `row` `[B]` says which of `asked` they are.

        Raises:
            ValueError: an input that is no text and no pair, an unknown task, or another option.
        """
        refuse_options(others, "texts are read as in training; max_seq_length says where they are cut")
        if task not in TASKS:
            raise ValueError(f"task: expected 'query' or 'document', got {task!r}")
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(
                f"prompt: expected one sentence for all inputs, got {prompt!r:.80}; for one a text encode pairs:"
                " encode(list(zip(prompts, texts)))"
            )
        pairs, side = [asked(item, prompt) for item in listed("inputs", inputs)], TASKS[task]
        texts = [text for _, text in pairs]
        ids = self.embedder.readings(Requests(texts, [Instruction("", side)], [0] * len(texts)))
        rows = [torch.tensor(row) for row in ids]
        return {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "row": torch.arange(len(rows)),
            "asked": pairs,
            "side": side,
        }

    def forward(self, features: dict[str, Any], **_: object) -> dict[str, Any]:
        """Add the embeddings `[B, D]` float32 as `sentence_embedding`, with gradient where it is on.

        Raises:
            ValueError: a text without an instruction.
        """
        requests = self._requests(features)
        if self.training or torch.is_grad_enabled():
            found = self.embedder(requests)
        else:
            found = torch.from_numpy(self.embedder.encode_each(requests)).to(self.embedder.device)
        return Features(features, sentence_embedding=found)

    def _requests(self, features: Mapping[str, Any]) -> Requests:
        """The texts of some rows, tokenised already, each under its instruction or else the side's of training."""
        side = features["side"]
        default = default_instruction(self.embedder.instructions, side)
        pairs = [features["asked"][row] for row in features["row"].tolist()]
        under = [Instruction((default if own is None else own) or "", side) for own, _ in pairs]
        if not all(item.text for item in under):
            raise ValueError(
                "prompt: expected the instruction to embed under, got none; give encode(..., prompt='...'), or"
                " SentenceTransformer(..., prompts={'query': '...', 'document': '...'}, default_prompt_name='query'),"
                " to a trainer prompts={'COLUMN': '...'}"
            )
        place = {item: number for number, item in enumerate(dict.fromkeys(under))}
        lengths = features["attention_mask"].sum(1).tolist()
        ids = [row[:length] for row, length in zip(features["input_ids"].tolist(), lengths, strict=True)]
        return Requests([text for _, text in pairs], list(place), [place[item] for item in under], ids)

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
        backend: str = "torch",
        trust_remote_code: bool = False,  # without it this class is not loaded; it changes nothing more
        **others: object,
    ) -> Self:
        """Load a saved PromptEmbedder; `model_kwargs` may have its `backbone`, `prompter`, `dtype` (`torch_dtype`).

        Raises:
            FileNotFoundError, ValueError: see `PromptEmbedder.from_pretrained`; or an option that would change nothing.
        """
        options = dict(model_kwargs or {})
        places = {name: options.pop(name, None) for name in ("backbone", "prompter")}
        dtype = pop_dtype(options)
        if options:
            raise ValueError(
                "model_kwargs: expected no key but 'backbone', 'prompter' and 'dtype' (or 'torch_dtype'), got"
                f" {', '.join(map(repr, options))}"
            )
        if backend != "torch":
            raise ValueError(f"backend: expected 'torch', got {backend!r}: a PromptEmbedder runs nowhere else")
        refuse_options(others, "a PromptEmbedder takes model_kwargs alone")
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
        return cls(PromptEmbedder.from_pretrained(folder, dtype=dtype, **places))
