"""PromptEmbedder: prompting LLM, alignment and frozen backbone as one text embedder.

In the suffix layout the backbone reads the text once, without gradient, and keeps its keys and values; the soft prompt
follows and is pooled. In the prefix layout the soft prompt stands between instruction and text: one pass for each
distinct prompt, whose keys and values all its texts attend to.

Legend: B texts, N distinct prompts, K soft tokens, D the backbone's width, I instructions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm.auto import tqdm
from transformers.utils import logging

from pe.alignment import AlignedPrompts, Alignment, build_alignment, together
from pe.attention import KeyValues
from pe.backbone import Backbone
from pe.captured import Captured
from pe.config import Dtype, ModelConfig
from pe.instructions import default_instruction
from pe.lens import Lens
from pe.loading import Filled
from pe.packing import Segments, by_length, fitting, inverse, pack, to_device, token_batches
from pe.prompting import PromptingLLM, SoftPrompts
from pe.records import RecordError, check_unicode
from pe.saving import Parts, find, read, write
from pe.skip import LinearSkip, around, as_they_are, build_skip
from pe.trainable import TrainableModule
from pe.turns import in_turn

Side = Literal["query", "document"]
SIDES: tuple[Side, ...] = ("query", "document")
SOFT_ROWS, SOFT_ROWS_CPU = 32_768, 4096
"""Rows of soft tokens that run at once when texts are encoded under many instructions; on a CPU, what caches hold."""

MOST_WRITTEN = 256
"""Sets of prompts of a frozen prompting LLM that are kept."""
SAMPLED = 16
"""Values of each weight that are compared to notice that it was written through `.data`; less than twice as many."""
Version = tuple[tuple[tuple[torch.device, torch.dtype, int], ...], int]
Item = TypeVar("Item")
_optimizer_steps = 0
logger = logging.get_logger(__name__)


def _count_step(*_: object) -> None:
    """A fused optimiser writes weights without raising their version, so its steps are counted for the prompt bank."""
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class Instruction(NamedTuple):
    """What a prompt is written for."""

    text: str
    side: Side = "query"


@dataclass(frozen=True)
class Requests:
    """Texts to embed, each under one of the instructions.

    Attributes:
        texts: B texts.
        instructions: the distinct instructions.
        index: for each text the place of its instruction.
        read: what the model reads of each text, where it has been tokenised already (see `PromptEmbedder.tokenized`).
    """

    texts: Sequence[str]
    instructions: Sequence[Instruction]
    index: Sequence[int]
    read: Sequence[Any] | None = field(default=None, compare=False)

    def instruction(self, place: int) -> Instruction:
        return self.instructions[self.index[place]]

    def part(self, places: Sequence[int]) -> Requests:
        """The requests at some places, in that order."""
        read = None if self.read is None else [self.read[i] for i in places]
        return Requests([self.texts[i] for i in places], self.instructions, [self.index[i] for i in places], read)


@dataclass(frozen=True)
class Texts:
    """Requests whose texts the frozen backbone has read, in the suffix layout; no weight that trains was in it.

    Attributes:
        requests: shortest text first.
        order: the places where they stood before.
        context: keys and values and, where the embedder has a skip, each token's state `[T, D]` before the last layer.
    """

    requests: Requests
    order: list[int]
    context: KeyValues

    def tensors(self) -> list[Tensor]:
        """All that a step reads of them on the device."""
        states = self.context.pooled
        small = [self.context.segments.cu_seqlens, *([] if states is None else [states])]
        return [*small, *(x for pair in self.context.layers for x in pair)]


@dataclass
class Truncation:
    """How many texts were tokenised, and how many of them were cut to `max_length`.

    A prompting LLM that reads the text as well cuts it by its own tokens: `prompter_cut` of its readings.
    """

    texts: int = 0
    cut: int = 0
    prompter_cut: int = 0

    def __str__(self) -> str:
        readings = f", {self.prompter_cut:,} readings of the prompting LLM too" if self.prompter_cut else ""
        return f"{self.cut:,} of {self.texts:,} texts truncated{readings}"


def has_dropout(prompter: nn.Module, backbone: Backbone | None = None) -> bool:
    """Whether training draws random numbers: in the prompting LLM, or in the reader; the backbone is in eval mode."""
    readers = backbone.named_modules() if backbone else ()
    active = [*prompter.modules(), *(part for name, part in readers if "lora_dropout" in name)]
    config = prompter.model.config.to_dict() if isinstance(prompter, PromptingLLM) else {}
    rates = [value for name, value in config.items() if "dropout" in name or name.endswith("pdrop")]
    rates += [part.p for part in active if isinstance(part, nn.Dropout)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def weights_version(module: nn.Module) -> Version | None:
    """Where the weights are, and a number that grows with their changes but a fused optimiser's and those of `.data`.

    None for tensors of inference mode, which count no changes.
    """
    parameters = list(module.parameters())
    if any(p.is_inference() for p in parameters):
        return None
    return tuple((p.device, p.dtype, p.data_ptr()) for p in parameters), sum(p._version for p in parameters)


def sample(module: nn.Module) -> tuple[float, ...]:
    """Some values of each weight, spread over it: written through `.data`, as averages are, weights raise no version.

    A write that leaves these values as they are is not noticed.
    """
    weights = [p.detach().reshape(-1) for p in module.parameters()]
    # An even stride would meet the same few columns of a matrix in every row
    return tuple(torch.cat([w[:: len(w) // SAMPLED | 1] for w in weights]).tolist()) if weights else ()


def listed(name: str, given: Iterable[Item], of: str = "strings") -> list[Item]:
    """What was given, read once: an iterator has nothing left for a second reading.

    Raises:
        ValueError: a string, whose characters would be the items; a mapping or a table, whose keys would be; a set,
            which has no order; or what cannot be iterated at all.
    """
    if isinstance(given, str):
        raise ValueError(f"{name}: expected a sequence of {of}, got a single string; wrap it in a list")
    is_iterable = hasattr(given, "__iter__") or hasattr(given, "__getitem__")
    if not is_iterable or isinstance(given, Mapping | set | frozenset) or getattr(given, "ndim", 1) != 1:
        raise ValueError(
            f"{name}: expected a sequence of {of}, got {type(given).__name__}; give them as a list, in the order that"
            " their results shall have"
        )
    return list(given)


def check_arguments(
    texts: Iterable[str], instructions: Iterable[str], side: str, batch_tokens: int = 1
) -> tuple[list[str], list[str]]:
    """Texts and instructions as lists, each read once.

    Raises:
        ValueError: what is no sequence of texts, an unknown side, or batches of nothing, and what to give instead.
    """
    found = listed("texts", texts), listed("instructions", instructions)
    for name, given in zip(("texts", "instructions"), found, strict=True):
        for place, text in enumerate(given):
            if not isinstance(text, str):
                raise ValueError(f"{name}: expected strings, got {type(text).__name__} at place {place}: {text!r:.80}")
            if name == "instructions" and not text.strip():
                raise ValueError(f"instructions: expected a sentence, got {text!r} at place {place}")
            try:
                check_unicode(f"{name}, place {place}", text)
            except RecordError as bad:
                raise ValueError(str(bad)) from bad
    if side not in SIDES:
        raise ValueError(f"side: expected {' or '.join(map(repr, SIDES))}, got {side!r}")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens}")
    return found


class PromptEmbedder(TrainableModule):
    """A frozen decoder that embeds texts under soft prompts.

    Threads may share one: their calls queue, each for its whole length. While `pe.train.fit` trains it, calls of other
    threads raise `BeingTrained`. Beside a training loop of one's own they embed by the weights that they find; an
    optimiser's step is no call, and keeps clear of them within `with model.backbone.turns.taken():`.

    Attributes:
        config: the options.
        name: what tables call it.
        prompter, alignment, backbone: its parts; only the first two (and a reader) train.
        skip: what goes around the soft prompt, where anything does; it trains too.
        lens: what an instruction changes in an embedding, where anything; it trains too.
        instructions: those it was trained under, by name (see `pe.instructions`), `query` and `document` the sides'
            defaults; saved with it.
        truncation: counts since the model was made.
        captured: its small passes as CUDA graphs, by which they run with gradient; None: launched one by one. Its
            weights must stay where they are until it is None again.
    """

    def __init__(
        self,
        config: ModelConfig,
        prompter: PromptingLLM,
        alignment: Alignment,
        backbone: Backbone,
        skip: LinearSkip | None = None,
        instructions: Mapping[str, str] | None = None,
        lens: Lens | None = None,
    ) -> None:
        """Put the parts together; a reader, skip or lens that the options ask for and that is not given is a fresh one.

        Raises:
            ValueError: texts of `max_length` tokens and the prompt take more positions than the backbone has.
            UnsupportedBackbone: a skip on a backbone whose states cannot be read.
        """
        super().__init__()
        backbone.check_length(config.max_length + config.prompter.soft_tokens)
        self.config = config
        self.name = "PromptEmbedder"
        self.prompter, self.alignment, self.backbone = prompter, alignment, backbone
        if config.reader == "activated_lora" and not backbone.has_reader:
            backbone.add_reader(config.reader_lora)
        if config.skip != "none":
            backbone.check_states()
        self.skip = build_skip(config.skip, backbone.hidden_size, backbone.device) if skip is None else skip
        self.lens = self._fresh_lens() if lens is None else lens
        self.instructions = dict(instructions or {})
        self.truncation = Truncation()
        self.captured: Captured | None = None
        self._bank: dict[Instruction, AlignedPrompts] = {}
        self._bank_version: tuple[object, ...] = ()
        self._written: dict[Hashable, SoftPrompts] = {}

    @classmethod
    def from_config(cls, config: ModelConfig, device: torch.device | str = "cpu") -> PromptEmbedder:
        """An untrained embedder of the models that `config` names.

        Raises:
            FileNotFoundError, UnsupportedBackbone, UnsupportedPrompter: see the parts.
            ValueError: texts of `max_length` tokens and the prompt take more positions than the backbone has.
        """
        device = torch.device(device)
        prompter = PromptingLLM.from_pretrained(config.prompter, device)
        backbone = Backbone.from_pretrained(config.backbone, device)
        alignment = build_alignment(prompter, backbone, config.alignment)
        return cls(config, prompter, alignment, backbone)

    def _fresh_lens(self) -> Lens | None:
        rank = self.config.lens_rank
        return Lens(self.dimensions, self.prompter.hidden_size, rank, self.device) if rank else None

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dimensions(self) -> int:
        """D, the size of an embedding."""
        return self.backbone.hidden_size

    @property
    def revision(self) -> str:
        """Content hash of all that training changes, and of the options."""
        tokenizers = [part.text_tokenizer.behaviour for part in (self.prompter, self.backbone)]
        digest = hashlib.blake2b(repr((self.config, self.backbone.revision, tokenizers)).encode(), digest_size=8)
        for name, tensor in self._own_state().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()

    # From texts to embeddings.

    @in_turn
    def forward(self, requests: Requests | Texts) -> Tensor:
        """L2-normalised embeddings `[B, D]` float32, in the order of the texts, with gradient."""
        if self.config.layout == "suffix":
            states, skipped, gates, back = self._read_and_prompt(requests)
            return self._through_lens(around(self.pool_prompt(states), skipped), gates)[back]
        assert isinstance(requests, Requests)
        order, ids, part = self._sorted(requests)
        embeddings = self._embed_behind_prefix(part, ids, *self.write_prompts(part))
        return embeddings[inverse(order, self.device)]

    def _through_lens(self, embeddings: Tensor, gates: Tensor | None) -> Tensor:
        """Unit vectors `[B, D]` as each text's instruction turns them."""
        return embeddings if self.lens is None or gates is None else self.lens(embeddings, gates)

    def _gates_of(self, prompts: AlignedPrompts, index: Sequence[int]) -> Tensor | None:
        """`[B, R]` of prompt `index[b]` for each text."""
        return None if prompts.gates is None else prompts.gates[to_device(index, self.device)]

    @in_turn
    def prompted_and_means(self, requests: Requests) -> tuple[Tensor, Tensor]:
        """What the soft tokens make of each text, and the mean that its skip starts from: unit vectors `[B, D]` each.

        Raises:
            ValueError: no skip.
        """
        order, ids, part = self._sorted(requests)
        texts, _ = self.read(ids)
        if texts.pooled is None:
            raise ValueError("skip: expected linear or weighted, got none")
        states = self.prompt_states(texts, *self.write_prompts(part))
        back = inverse(order, self.device)
        return self.pool_prompt(states)[back], texts.pooled[back]

    @in_turn
    def tokenize(self, requests: Requests) -> list[list[int]]:
        """What the backbone reads of each text, cut to `max_length` tokens and counted."""
        templates = self.config.templates
        texts = [
            Filled(getattr(templates, requests.instruction(place).side).text, text=text)
            for place, text in enumerate(requests.texts)
        ]
        ids = self.backbone.text_tokenizer(texts, lead=self.config.layout == "suffix")
        self.truncation.texts += len(ids)
        self.truncation.cut += sum(len(row) > self.config.max_length for row in ids)
        return [row[: self.config.max_length] for row in ids]

    def tokenized(self, requests: Requests) -> Requests:
        """The requests with what the backbone reads of each text, so that no pass tokenises them again."""
        return replace(requests, read=self.tokenize(requests))

    @in_turn
    def write_prompts(self, requests: Requests) -> tuple[AlignedPrompts, list[int]]:
        """Prompts for the requests, and which one each text uses.

        What several texts have in common is written once: conditioned on the instruction alone, one prompt each.
        """
        with_text = self.config.conditioning == "instruction_and_text"
        read = []
        for i, text in enumerate(requests.texts):
            instruction = requests.instruction(i)
            head = self.prompter_text(instruction)
            before = self.prefix_text(instruction) if self.config.layout == "prefix" else None
            read.append((head, self.prompter_text(instruction, text) if with_text else head, before))
        place = {key: number for number, key in enumerate(dict.fromkeys(read))}
        return self._align([(head, whole) for head, whole, _ in place]), [place[key] for key in read]

    def prompter_text(self, instruction: Instruction, text: str | None = None) -> Filled:
        """What the prompting LLM reads."""
        template: str = getattr(self.config.templates, instruction.side).prompter
        if text is None:
            template = template.partition("{text}")[0].rstrip()
        return Filled(template, instruction.text, text or "")

    def prefix_text(self, instruction: Instruction) -> Filled:
        """What the backbone reads before the soft prompt in the prefix layout."""
        return Filled(getattr(self.config.templates, instruction.side).prefix, instruction.text)

    @in_turn
    def prompter_ids(self, readings: Sequence[tuple[Filled, Filled]]) -> list[list[int]]:
        """Token ids that the prompting LLM reads, for pairs of an instruction alone and of it with a text.

        The instruction is read whole, the text up to `max_length` tokens.
        """
        heads = dict.fromkeys(head for head, _ in readings)
        lengths = dict(zip(heads, map(len, self.prompter.text_tokenizer(list(heads))), strict=True))
        limits = [lengths[head] + self.config.max_length for head, _ in readings]
        read = self.prompter.text_tokenizer([whole for _, whole in readings])
        self.truncation.prompter_cut += sum(len(row) > limit for row, limit in zip(read, limits, strict=True))
        return [row[:limit] for row, limit in zip(read, limits, strict=True)]

    def _align(self, readings: Sequence[tuple[Filled, Filled]]) -> AlignedPrompts:
        requests = self.prompter_ids(readings)
        of_instruction = self.config.conditioning == "instruction"
        if not any(p.requires_grad for p in self.prompter.parameters()):
            prompts = self._frozen_prompts(requests, keep=of_instruction)
        else:
            self._written.clear()  # a fused optimiser raises no version: what was written before it must not be found
            captured = self.captured if torch.is_grad_enabled() and of_instruction else None
            prompts = (captured.prompts if captured else self.prompter)(requests)
        aligned = self.alignment(SoftPrompts(prompts.tokens.to(self.device), prompts.hidden.to(self.device)))
        return aligned if self.lens is None else replace(aligned, gates=self.lens.gates(prompts.hidden))

    @torch.no_grad()
    def _frozen_prompts(self, requests: list[list[int]], *, keep: bool) -> SoftPrompts:
        """What a frozen prompting LLM writes; with `keep` once for the same requests, weights and precision."""
        keep = keep and not (self.training and has_dropout(self.prompter)) and not torch.is_inference_mode_enabled()
        version = weights_version(self.prompter) if keep else None
        if version is None:
            written: SoftPrompts = self.prompter(requests)
            return written
        kind = self.prompter.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (version, precision, tuple(map(tuple, requests)))
        if key not in self._written:
            if len(self._written) >= MOST_WRITTEN:
                self._written.clear()
            self._written[key] = self.prompter(requests)
        return self._written[key]

    @in_turn
    def read(self, ids: Sequence[Sequence[int]]) -> tuple[KeyValues, Tensor | None]:
        """The frozen text pass, and what goes around the soft prompt: unit vectors `[B, D]`, or None."""
        if self.skip is None:
            return self.backbone.read(ids), None
        texts = self.backbone.read(ids, self.skip.pool)
        return texts, self.skip(texts.pooled)

    @in_turn
    def read_texts(self, requests: Requests) -> Texts:
        """The frozen text pass alone, for a later `forward`, whichever weights train in between.

        Raises:
            ValueError: the prefix layout, where texts follow the prompt.
        """
        if self.config.layout != "suffix":
            raise ValueError(f"layout: texts are read before their prompts in 'suffix', got {self.config.layout!r}")
        order, ids, part = self._sorted(requests)
        return Texts(part, order, self.backbone.read(ids, None if self.skip is None else as_they_are))

    def _read_and_prompt(self, requests: Requests | Texts) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """States `[B, K, D]` of the soft tokens behind each text, what goes around them, the gates of a lens, and where
        each text is.

        The text pass goes first: a GPU is busy with it while the prompting LLM's many small kernels are launched.
        """
        if isinstance(requests, Texts):
            order, part, context = requests.order, requests.requests, requests.context
            skipped = self._skipped(context)
        else:
            order, ids, part = self._sorted(requests)
            context, skipped = self.read(ids)
        prompts, index = self.write_prompts(part)
        states, gates = self.prompt_states(context, prompts, index), self._gates_of(prompts, index)
        return states, skipped, gates, inverse(order, self.device)

    def _skipped(self, context: KeyValues) -> Tensor | None:
        """What `read` says of the skip, of a context with the states themselves."""
        if self.skip is None:
            return None
        assert context.pooled is not None
        assert isinstance(context.segments, Segments)
        skipped: Tensor = self.skip(self.skip.pool(context.pooled, context.segments))
        return skipped

    @in_turn
    def prompt_states(
        self,
        context: KeyValues,
        prompts: AlignedPrompts,
        index: Sequence[int],
        context_index: Sequence[int] | None = None,
    ) -> Tensor:
        """The K-token pass of the suffix layout: states `[B, K, D]` of prompt `index[b]` behind segment b."""
        k = prompts.prompts.shape[1]
        ids = self._soft_ids(index, k)
        rows = self.backbone.prompt_rows(ids, prompts.prompts, prompts.weight)
        segments = Segments((k,) * len(index), self.device)
        if self.captured is not None and torch.is_grad_enabled() and context_index is None:
            hidden = self.captured.states(rows, segments, context)
        else:
            hidden, _ = self.backbone(rows, segments, context=context, context_index=context_index)
        return hidden.unflatten(0, (len(index), k))

    def pool_prompt(self, states: Tensor) -> Tensor:
        """Unit vectors `[B, D]` of soft-token states `[B, K, D]`."""
        count, k = states.shape[:2]
        segments = Segments((k,) * count, states.device)
        mode: Literal["last", "mean"] = "last" if self.config.pooling == "last" else "mean"
        return self.backbone.pool(states.flatten(0, 1), segments, mode)

    def _embed_behind_prefix(
        self, requests: Requests, ids: list[list[int]], prompts: AlignedPrompts, index: list[int]
    ) -> Tensor:
        """The prefix layout: instruction and soft prompt once for each prompt, then the texts."""
        k = prompts.prompts.shape[1]
        owners = dict(zip(index, (requests.instruction(i) for i in range(len(index))), strict=True))
        used = sorted(owners)
        instruction_ids = self.backbone.text_tokenizer([self.prefix_text(owners[n]) for n in used])
        pieces = [
            piece
            for n, row in zip(used, instruction_ids, strict=True)
            for piece in (to_device(row, self.device), self._soft_ids([n], k))
        ]
        segments = Segments(tuple(len(row) + k for row in instruction_ids), self.device)
        rows = self.backbone.prompt_rows(torch.cat(pieces), prompts.prompts, prompts.weight)
        _, prefix = self.backbone(rows, segments, keep=True)
        flat, texts = pack(ids, self.device)
        place = {n: position for position, n in enumerate(used)}
        hidden, _ = self.backbone(
            self.backbone.token_rows(flat), texts, context=prefix, context_index=[place[n] for n in index]
        )
        mode: Literal["last", "mean"] = "last" if self.config.pooling == "last" else "mean"
        return self.backbone.pool(hidden, texts, mode)

    def _soft_ids(self, index: Sequence[int], k: int) -> Tensor:
        """Negative ids of the K rows of each prompt (see `kernels/prompt_rows.py`), `[B * K]`."""
        prompts = to_device(index, self.device)
        return (-1 - (prompts[:, None] * k + torch.arange(k, device=self.device))).flatten()

    def _sorted(self, requests: Requests) -> tuple[list[int], list[list[int]], Requests]:
        ids = self.tokenize(requests) if requests.read is None else requests.read
        order = by_length(ids)
        return order, [ids[i] for i in order], requests.part(order)

    # Encoding.

    def encode(
        self,
        texts: Iterable[str],
        *,
        instruction: str | None = None,
        side: Side = "query",
        batch_tokens: int = 16_384,
        progress: bool = False,
    ) -> np.ndarray:
        """L2-normalised embeddings `[N, D]` float32 of N texts, in their order.

        Args:
            texts: what to embed.
            instruction: the task, in a sentence; use the one of training for a task seen there. None: the side's
                default, which a warning names once.
            side: whose templates are used.
            batch_tokens: tokens of a packed batch, fewer on a CPU; a longer text stands alone.
            progress: show a progress bar.

        Raises:
            ValueError: no instruction and no default, or see `encode_tensor`.
        """
        if instruction is None:
            instruction = self.default_instruction(side)
            logger.warning_once(f"{self.name}: no instruction given, so {side} texts go under {instruction!r}")
        return self.encode_many(
            texts, instructions=[instruction], side=side, batch_tokens=batch_tokens, progress=progress
        )[0]

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

    def encode_many(
        self,
        texts: Iterable[str],
        *,
        instructions: Iterable[str],
        side: Side = "query",
        batch_tokens: int = 16_384,
        progress: bool = False,
    ) -> np.ndarray:
        """As `encode`, under I instructions at once: `[I, N, D]`; in the suffix layout they share the text pass."""
        return self.encode_tensor(
            texts, instructions=instructions, side=side, batch_tokens=batch_tokens, progress=progress
        ).numpy(force=True)

    @torch.no_grad()
    def encode_tensor(
        self,
        texts: Iterable[str],
        *,
        instructions: Iterable[str],
        side: Side = "query",
        batch_tokens: int = 16_384,
        progress: bool = False,
    ) -> Tensor:
        """Embeddings `[I, N, D]` float32 of N texts under I instructions at once, on the model's device.

        In the suffix layout each further instruction costs K tokens a text.

        Raises:
            ValueError: anything but strings, an unknown side, or batches of less than a token.
        """
        texts, instructions = check_arguments(texts, instructions, side, batch_tokens)
        with self.backbone.turns.taken():
            was_training = self.training
            self.eval()
            try:
                return self._encode(texts, [Instruction(text, side) for text in instructions], batch_tokens, progress)
            finally:
                self.train(was_training)

    def _encode(self, texts: Sequence[str], wanted: list[Instruction], batch_tokens: int, progress: bool) -> Tensor:
        everything = Requests(texts, wanted[:1], [0] * len(texts))
        ids = self.tokenize(everything) if wanted else []
        embeddings = torch.empty(len(wanted), len(texts), self.dimensions, device=self.device)
        bank = self._prompts_of(wanted) if ids and self.config.conditioning == "instruction" else None
        with tqdm(total=len(texts), unit="text", disable=not progress, desc="encode") as bar:
            for batch in token_batches([len(row) for row in ids], fitting(batch_tokens, self.device)):
                places = to_device(batch, self.device)
                part = [texts[i] for i in batch], [ids[i] for i in batch]
                embeddings[:, places] = self._encode_batch(*part, wanted, bank)
                bar.update(len(batch))
        return embeddings

    def _encode_batch(
        self, texts: Sequence[str], ids: list[list[int]], wanted: Sequence[Instruction], bank: AlignedPrompts | None
    ) -> Tensor:
        """`[I, B, D]` of one batch, sorted by length already; `bank` of all I where texts change no prompt."""
        count = len(texts)
        if self.config.layout == "prefix":
            parts = []
            for place, item in enumerate(wanted):
                requests = Requests(texts, [item], [0] * count)
                prompts, index = self._encode_prompts(requests, bank, slice(place, place + 1))
                parts.append(self._embed_behind_prefix(requests, ids, prompts, index))
            return torch.stack(parts)
        context, skipped = self.read(ids)
        rows = SOFT_ROWS_CPU if self.device.type == "cpu" else SOFT_ROWS
        at_once = max(1, rows // (count * self.config.prompter.soft_tokens))
        parts = []
        for first in range(0, len(wanted), at_once):
            group = wanted[first : first + at_once]
            requests = Requests(list(texts) * len(group), group, [n for n in range(len(group)) for _ in texts])
            prompts, index = self._encode_prompts(requests, bank, slice(first, first + at_once))
            states = self.prompt_states(context, prompts, index, list(range(count)) * len(group))
            pooled = around(self.pool_prompt(states).unflatten(0, (len(group), count)), skipped)
            gates = self._gates_of(prompts, index)
            parts.append(self._through_lens(pooled.flatten(0, 1), gates).unflatten(0, (len(group), count)))
        return torch.cat(parts)

    def _encode_prompts(
        self, requests: Requests, bank: AlignedPrompts | None, part: slice
    ) -> tuple[AlignedPrompts, list[int]]:
        return self.write_prompts(requests) if bank is None else (bank.part(part), list(requests.index))

    @torch.no_grad()
    def prompt_bank(self, instructions: Iterable[Instruction]) -> Tensor:
        """Finished prompts `[N, K, D]` in the backbone's input space, written once for each instruction.

        They are written anew when a weight has moved or changed, any optimiser has taken a step since, or one of the
        sampled values of a weight that writes prompts is another.

        Raises:
            ValueError: the prompts also depend on the text, or no sequence of `Instruction`, each with a sentence.
        """
        if self.config.conditioning != "instruction":
            raise ValueError("conditioning: a prompt bank needs 'instruction', got 'instruction_and_text'")
        wanted = listed("instructions", instructions, "Instruction")
        for place, item in enumerate(wanted):
            if not isinstance(item, Instruction):
                raise ValueError(
                    f"instructions: expected pe.model.Instruction, got {type(item).__name__} at place {place}:"
                    f" {item!r:.80}"
                )
        check_arguments((), [item.text for item in wanted], SIDES[0])
        with self.backbone.turns.taken():
            return self._prompts_of(wanted).prompts

    def _prompts_of(self, instructions: Sequence[Instruction]) -> AlignedPrompts:
        """The bank's prompts and gates of these instructions, in the backbone's input space."""
        version = weights_version(self)
        parts = [self.prompter, self.alignment, *([] if self.lens is None else [self.lens])]
        now = version, _optimizer_steps, *map(sample, parts)
        if version is None or now != self._bank_version:
            self._bank, self._bank_version = {}, now
            self._written.clear()
        for item in instructions:
            if item not in self._bank:
                head = self.prompter_text(item)
                aligned = self._align([(head, head)])
                ids = self._soft_ids([0], aligned.prompts.shape[1])
                rows = self.backbone.prompt_rows(ids, aligned.prompts, aligned.weight)
                self._bank[item] = AlignedPrompts(rows[None], None, aligned.gates)
        return together([self._bank[item] for item in instructions])

    # Training.

    @in_turn
    @torch.no_grad()
    def start_lens(self, instructions: Sequence[Instruction]) -> None:
        """Tell a lens, where there is one, what the instructions of training have in common."""
        if self.lens is not None:
            heads = [self.prompter_text(item) for item in instructions]
            self.lens.start_at(self.prompter(self.prompter_ids([(head, head) for head in heads])).hidden)

    @in_turn
    def use_graphs(self, on: bool) -> None:
        """From now on run the small passes with gradient by CUDA graphs, or no longer.

        That needs a GPU, the suffix layout and no dropout, whose random numbers a recording takes in another order;
        prompts that depend on the text, too, are launched. Weights must stay where they are meanwhile.
        """
        is_fast = self.device.type == "cuda" and self.config.layout == "suffix"
        is_possible = is_fast and not has_dropout(self.prompter, self.backbone)
        self.captured = Captured(self.prompter, self.backbone) if on and is_possible else None

    # What trains, and what is saved.

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that train, by part: prompter, alignment, reader, skip, lens."""
        parts = {
            "prompter": [p for p in self.prompter.parameters() if p.requires_grad],
            "alignment": [p for p in self.alignment.parameters() if p.requires_grad],
            "reader": [p for p in self.backbone.reader_parameters() if p.requires_grad],
            "skip": [] if self.skip is None else list(self.skip.parameters()),
            "lens": [] if self.lens is None else list(self.lens.parameters()),
        }
        return {name: parameters for name, parameters in parts.items() if parameters}

    def _own_state(self) -> dict[str, Tensor]:
        frozen = {id(p) for name, p in self.backbone.named_parameters() if ".reader." not in name}
        return {name: p.detach() for name, p in self.named_parameters() if id(p) not in frozen}

    def save_pretrained(self, path: str | Path, *, include_backbone: bool = False, card: str = "") -> None:
        """Write the embedder to a folder: whole or not at all.

        The backbone, and the base of a prompting LLM with adapters, are stored by name and revision; their weights only
        with `include_backbone`, or where they are in the folder that is written anew. An earlier saved embedder in
        `path` is replaced with all that stands in its folder, files of yours too; a link is replaced, what it leads to
        stays as it is. Until the new one is whole the earlier one stays. On Linux they change places at once; elsewhere
        a process that is killed between two moves leaves the earlier one in `NAME.saving-*/former`.

        Raises:
            FileExistsError: the folder holds something other than a saved PromptEmbedder.
        """
        parts = Parts(
            self.config, self.prompter, self.alignment, self.backbone, self.skip, self.instructions, self.lens
        )
        write(parts, Path(path), include_backbone=include_backbone, card=card)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        backbone: str | None = None,
        prompter: str | None = None,
        dtype: Dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> PromptEmbedder:
        """Load what `save_pretrained` wrote, also where sentence-transformers has saved it since.

        Args:
            path: the folder, or a name of the hub.
            revision: branch, tag or commit on the hub; a folder has none.
            backbone: where the backbone is now, if it is neither where it was nor at the same place as seen from the
                embedder's folder or from one above.
            prompter: the same of the base model of a prompting LLM with adapters; any other is in the folder.
            dtype: type of its weights, as in `BackboneConfig`; None: as in training.
            device: where everything goes.

        Raises:
            FileNotFoundError: no saved PromptEmbedder there, a file of it is missing, or its backbone is not found.
            ValueError: another format, a damaged file, an unknown dtype, a backbone or base whose content has changed,
                or a `prompter` for a prompting LLM that needs none.
        """
        folder = find(Path(path), revision)
        parts = read(folder, backbone=backbone, prompter=prompter, dtype=dtype, device=torch.device(device))
        model = cls(*parts).eval()
        model.name = Path(path).name
        return model
