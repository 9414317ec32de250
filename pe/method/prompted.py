"""What embeds texts under soft prompts by a frozen decoder, whoever writes the prompts.

In the suffix layout the backbone reads the text once, without gradient, and keeps its keys and values; the soft prompt
follows and is pooled. In the prefix layout (see `pe/method/prefix.py`) the soft prompt stands between instruction and
text.

Legend: B texts, N distinct prompts, K soft tokens, D the backbone's width, H the width of what a lens reads, I
instructions.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pe.config import ModelConfig
from pe.kernels.pool_normalize import Mode
from pe.method.alignment import AlignedPrompts, together
from pe.method.attention import KeyValues
from pe.method.backbone import Backbone
from pe.method.captured import Captured
from pe.method.encoder import Embed, Floats
from pe.method.lens import Lens
from pe.method.loading import Filled
from pe.method.packing import Segments, budget_on, inverse, to_device, token_batches
from pe.method.prefix import embed_behind_prefix
from pe.method.prompt_bank import PromptBank
from pe.method.requests import Instruction, Requests, Side, Texts, Truncation, check_arguments, check_instructions
from pe.method.skip import WeightedSkip, build_skip, unpooled, with_skip
from pe.method.text_store import TextStore
from pe.method.trainable import TrainableModule
from pe.method.turns import in_turn

SOFT_ROWS, SOFT_ROWS_CPU = 32_768, 4096
"""Rows of soft tokens that run at once when texts are encoded under many instructions; on a CPU, what caches hold."""
MOST_PROMPTS = 4096
"""Instructions whose finished prompts are kept."""


class PromptedEmbedder(TrainableModule):
    """A frozen decoder and soft prompts. A subclass says by `_write` who writes them.

    Attributes:
        config: the options.
        name: what tables call it.
        backbone: the decoder; of it only a reader trains.
        skip: what is added of the text's own states, or None; it trains.
        lens: what an instruction changes in an embedding, or None; it trains.
        instructions: those it was trained under, by name (see `pe.data.instructions`), `query` and `document` the
            sides' defaults.
        truncation: counts since the model was made.
        captured: its small passes as CUDA graphs, by which they run with gradient; None: launched one by one. Its
            weights must stay where they are until it is None again.
    """

    def __init__(
        self,
        config: ModelConfig,
        writers: Mapping[str, nn.Module],
        backbone: Backbone,
        *,
        hidden: int,
        skip: WeightedSkip | None = None,
        lens: Lens | None = None,
        instructions: Mapping[str, str] | None = None,
    ) -> None:
        """Put the parts together; a reader, skip or lens that the options ask for and that is not given is a fresh one.

        `writers` are the modules that write prompts, by the attribute that each becomes; `hidden` is H.

        Raises:
            ValueError: texts of `max_length` tokens and the prompt take more positions than the backbone has.
            UnsupportedBackbone: a skip on a backbone whose states cannot be read.
        """
        super().__init__()
        backbone.check_length(config.max_length + config.prompter.soft_tokens)
        self.config = config
        self._writers = tuple(writers)
        for name, writer in writers.items():
            self.add_module(name, writer)
        self.backbone = backbone
        if config.reader == "activated_lora" and not backbone.has_reader:
            backbone.add_reader(config.reader_lora)
        if config.skip != "none":
            backbone.check_states()
        self.skip = build_skip(config.skip, backbone.hidden_size, backbone.device) if skip is None else skip
        if lens is None and config.lens_rank:
            lens = Lens(backbone.hidden_size, hidden, config.lens_rank, backbone.device)
        self.lens = lens
        self.instructions = dict(instructions or {})
        self.truncation = Truncation()
        self.captured: Captured | None = None
        self._bank: PromptBank[Instruction, AlignedPrompts] = PromptBank(MOST_PROMPTS)

    # What a subclass says.

    @abstractmethod
    def _write(self, readings: Sequence[tuple[Filled, Filled]]) -> tuple[AlignedPrompts, Tensor]:
        """Prompts for N pairs of an instruction alone and of it with a text; of each what a lens reads, `[N, H]`."""

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random numbers."""
        return self.backbone.has_dropout

    def _new_captured(self) -> Captured:
        return Captured(None, self.backbone)

    # From texts to embeddings.

    @in_turn
    def forward(self, requests: Requests | Texts) -> Tensor:
        """L2-normalised embeddings `[B, D]` float32, in the order of the texts, with gradient."""
        if self.config.layout == "suffix":
            states, skipped, gates, back = self._read_and_prompt(requests)
            return self._through_lens(with_skip(self.pool_prompt(states), skipped), gates)[back]
        assert isinstance(requests, Requests)
        order, ids = self._sorted(requests)
        part = requests.part(order)
        return self._behind_prefix(part, ids, *self.write_prompts(part))[inverse(order, self.device)]

    def _through_lens(self, embeddings: Tensor, gates: Tensor | None) -> Tensor:
        """Unit vectors `[B, D]` as each text's instruction turns them."""
        return embeddings if self.lens is None or gates is None else self.lens(embeddings, gates)

    @in_turn
    def prompted_and_means(self, requests: Requests) -> tuple[Tensor, Tensor]:
        """What the soft tokens make of each text, and the mean that its skip starts from: unit vectors `[B, D]` each.

        Raises:
            ValueError: no skip.
        """
        order, ids = self._sorted(requests)
        texts, _ = self.read(ids)
        if texts.pooled is None:
            raise ValueError("skip: expected weighted, got none")
        states = self.prompt_states(texts, *self.write_prompts(requests.part(order)))
        back = inverse(order, self.device)
        return self.pool_prompt(states)[back], texts.pooled[back]

    @in_turn
    def readings(self, requests: Requests, at_most: int | None = None) -> list[list[int]]:
        """What the backbone reads of each text, cut to `max_length` tokens, or to `at_most`, and counted."""
        templates = self.config.templates
        texts = [
            Filled(getattr(templates, requests.instruction(place).side).text, text=text)
            for place, text in enumerate(requests.texts)
        ]
        ids = self.backbone.text_tokenizer(texts, lead=self.config.layout == "suffix")
        return self.truncation.cut_to(self.config.max_length, ids, at_most)

    def prompter_text(self, instruction: Instruction, text: str | None = None) -> Filled:
        """What a prompt is written from."""
        template: str = getattr(self.config.templates, instruction.side).prompter
        if text is None:
            template = template.partition("{text}")[0].rstrip()
        return Filled(template, instruction.text, text or "")

    def prefix_text(self, instruction: Instruction) -> Filled:
        """What the backbone reads before the soft prompt in the prefix layout."""
        return Filled(getattr(self.config.templates, instruction.side).prefix, instruction.text)

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
        return self._written([(head, whole) for head, whole, _ in place]), [place[key] for key in read]

    def _written(self, readings: Sequence[tuple[Filled, Filled]]) -> AlignedPrompts:
        """As `_write`, with the gates of a lens."""
        prompts, hidden = self._write(readings)
        return prompts if self.lens is None else replace(prompts, gates=self.lens.gates(hidden))

    @in_turn
    def read(self, ids: Sequence[Sequence[int]]) -> tuple[KeyValues, Tensor | None]:
        """The frozen text pass, and what the skip makes of it: unit vectors `[B, D]`, or None without a skip."""
        if self.skip is None:
            return self.backbone.read(ids, exact=self.training), None
        texts = self.backbone.read(ids, self.skip.pool, exact=self.training)
        return texts, self.skip(texts.pooled)

    @in_turn
    def read_texts(self, requests: Requests) -> Texts:
        """The frozen text pass alone, for a later `forward`, whichever weights train in between.

        Raises:
            ValueError: the prefix layout, where texts follow the prompt.
        """
        if self.config.layout != "suffix":
            raise ValueError(f"layout: texts are read before their prompts in 'suffix', got {self.config.layout!r}")
        order, ids = self._sorted(requests)
        context = self.backbone.read(ids, None if self.skip is None else unpooled, exact=self.training)
        return Texts(requests.part(order), order, context)

    def _read_and_prompt(self, requests: Requests | Texts) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """States `[B, K, D]` of the soft tokens behind each text, what a skip adds, the gates of a lens, and where each
        text is.

        The text pass goes first: a GPU is busy with it while the prompting LLM's many small kernels are launched.
        """
        if isinstance(requests, Texts):
            order, part, context = requests.order, requests.requests, requests.context
            skipped = self._skipped(context)
        else:
            order, ids = self._sorted(requests)
            part = requests.part(order)
            context, skipped = self.read(ids)
        prompts, index = self.write_prompts(part)
        states = self.prompt_states(context, prompts, index)
        return states, skipped, prompts.gates_of(index), inverse(order, self.device)

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
        rows = self.backbone.prompt_rows(prompts.ids(index), prompts.prompts, prompts.weight)
        segments = Segments((k,) * len(index), self.device)
        if self.captured is not None and torch.is_grad_enabled() and context_index is None:
            hidden = self.captured.states(rows, segments, context)
        else:
            hidden, _ = self.backbone(rows, segments, context=context, context_index=context_index)
        return hidden.unflatten(0, (len(index), k))

    def pool_prompt(self, states: Tensor) -> Tensor:
        """Unit vectors `[B, D]` of soft-token states `[B, K, D]`."""
        count, k = states.shape[:2]
        return self.backbone.pool(states.flatten(0, 1), Segments((k,) * count, states.device), self._mode)

    @property
    def _mode(self) -> Mode:
        return "last" if self.config.pooling == "last" else "mean"

    def _behind_prefix(
        self, requests: Requests, ids: Sequence[Sequence[int]], prompts: AlignedPrompts, index: Sequence[int]
    ) -> Tensor:
        heads = [self.prefix_text(requests.instruction(i)) for i in range(len(index))]
        return embed_behind_prefix(self.backbone, ids, heads, prompts, index, self._mode)

    # Encoding.

    @contextlib.contextmanager
    def reading_from(self, store: TextStore | str | Path | None) -> Iterator[None]:
        """Inside it the text pass is kept in a store, or in the folder of one, and looked for there first.

        Raises:
            ValueError: the prefix layout, a folder that cannot be used, or one for a backbone of unknown content.
            UnsupportedBackbone: its states, which an entry holds, cannot be read.
        """
        if store is None:
            yield
            return
        if self.config.layout != "suffix":
            raise ValueError(
                "text store: expected the suffix layout, where texts are read apart from their prompts, got"
                f" {self.config.layout!r}; leave the store out"
            )
        with contextlib.nullcontext(store) if isinstance(store, TextStore) else TextStore.open(store) as opened:
            if opened.is_shared and self.backbone.revision is None:
                raise ValueError(
                    f"{opened.name}: expected a backbone loaded from a folder or the hub, whose content is known, got"
                    f" {self.backbone.name!r} of unknown content; keep its texts in memory"
                )
            if self.config.skip == "none":  # else they were checked when the embedder was made
                self.backbone.check_states()
            with self.backbone.reading_from(opened):
                yield

    def encode_many(
        self,
        texts: Iterable[str],
        *,
        instructions: Iterable[str],
        side: Side = "query",
        batch_tokens: int = 16_384,
        progress: bool = False,
        store: TextStore | str | Path | None = None,
    ) -> Floats:
        """As `encode`, under I instructions at once: `[I, N, D]`; in the suffix layout they share the text pass."""
        with self.backbone.turns.taken(), self.reading_from(store):
            return self.encode_tensor(
                texts, instructions=instructions, side=side, batch_tokens=batch_tokens, progress=progress
            ).numpy(force=True)

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
        return self._encode(texts, [Instruction(text, side) for text in instructions], batch_tokens, progress)

    def _embed_under(self, wanted: Sequence[Instruction]) -> Embed:
        """In the suffix layout a batch's text pass serves all; where texts change no prompt, the bank has them."""
        bank = self._prompts_of(wanted) if self.config.conditioning == "instruction" else None

        def prompts_of(requests: Requests, part: slice) -> tuple[AlignedPrompts, list[int]]:
            return self.write_prompts(requests) if bank is None else (bank.part(part), list(requests.index))

        def embed(texts: list[str], ids: list[Any]) -> Tensor:
            count, parts = len(texts), []
            if self.config.layout == "prefix":
                for place, item in enumerate(wanted):
                    requests = Requests(texts, [item], [0] * count)
                    prompts, index = prompts_of(requests, slice(place, place + 1))
                    parts.append(self._behind_prefix(requests, ids, prompts, index))
                return torch.stack(parts)
            context, skipped = self.read(ids)
            most = SOFT_ROWS_CPU if self.device.type == "cpu" else SOFT_ROWS
            at_once = max(1, most // (count * self.config.prompter.soft_tokens))
            for first in range(0, len(wanted), at_once):
                group = wanted[first : first + at_once]
                requests = Requests(texts * len(group), group, [n for n in range(len(group)) for _ in texts])
                prompts, index = prompts_of(requests, slice(first, first + at_once))
                rows = self._embed_behind(context, skipped, prompts, index, list(range(count)) * len(group))
                parts.append(rows.unflatten(0, (len(group), count)))
            return torch.cat(parts)

        return embed

    @torch.no_grad()
    def encode_each(self, requests: Requests, batch_tokens: int = 16_384) -> Floats:
        """As `encode`, each of N texts under its own instruction: `[N, D]`.

        In the suffix layout a text that comes several times is read once; each further instruction costs K tokens.
        """
        with self.backbone.turns.taken(), self._at_rest():
            embeddings = torch.empty(len(requests.texts), self.dimensions, device=self.device)
            if not embeddings.numel():
                return embeddings.numpy(force=True)
            read = self.readings(requests) if requests.read is None else requests.read
            is_shared = self.config.conditioning == "instruction"
            bank = self._prompts_of(requests.instructions) if is_shared else None
            places: dict[tuple[int, ...], list[int]] = {}
            for place, ids in enumerate(read):
                places.setdefault(tuple(ids), []).append(place)
            k, groups = self.config.prompter.soft_tokens, list(places.items())
            costs = [len(ids) + k * len(group) for ids, group in groups]
            for batch in token_batches(costs, budget_on(self.device, batch_tokens)):
                own = [place for n in batch for place in groups[n][1]]
                part = requests.part(own)
                prompts, index = self.write_prompts(part) if bank is None else (bank, list(part.index))
                if self.config.layout == "prefix":
                    rows = self._behind_prefix(part, [read[place] for place in own], prompts, index)
                else:
                    context, skipped = self.read([groups[n][0] for n in batch])
                    behind = [text for text, n in enumerate(batch) for _ in groups[n][1]]
                    rows = self._embed_behind(context, skipped, prompts, index, behind)
                embeddings[to_device(own, self.device)] = rows
            return embeddings.numpy(force=True)

    def _embed_behind(
        self,
        context: KeyValues,
        skipped: Tensor | None,
        prompts: AlignedPrompts,
        index: Sequence[int],
        context_index: Sequence[int],
    ) -> Tensor:
        """Embeddings `[B, D]` by prompt `index[b]` behind text `context_index[b]` of those that were read."""
        states = self.prompt_states(context, prompts, index, context_index)
        own = None if skipped is None else skipped[to_device(context_index, self.device)]
        return self._through_lens(with_skip(self.pool_prompt(states), own), prompts.gates_of(index))

    @torch.no_grad()
    def prompt_bank(self, instructions: Iterable[Instruction]) -> Tensor:
        """Finished prompts `[N, K, D]` in the backbone's input space, written once for each instruction.

        They are written anew when a weight that they depend on has moved or changed (see `pe/method/prompt_bank.py`).

        Raises:
            ValueError: the prompts also depend on the text, or no sequence of `Instruction`, each with a sentence.
        """
        if self.config.conditioning != "instruction":
            raise ValueError("conditioning: a prompt bank needs 'instruction', got 'instruction_and_text'")
        wanted = check_instructions(instructions)
        with self.backbone.turns.taken():
            return self._prompts_of(wanted).prompts

    def _prompts_of(self, instructions: Sequence[Instruction]) -> AlignedPrompts:
        """The bank's prompts and gates of these instructions, in the backbone's input space."""
        writers = [getattr(self, name) for name in self._writers]
        parts = [*writers, self.lens or nn.Identity(), self.backbone.model.get_input_embeddings()]
        return together(self._bank.get(instructions, parts, lambda missing: map(self._finished, missing)))

    def _finished(self, instruction: Instruction) -> AlignedPrompts:
        head = self.prompter_text(instruction)
        written = self._written([(head, head)])
        rows = self.backbone.prompt_rows(written.ids([0]), written.prompts, written.weight)
        return AlignedPrompts(rows[None], None, written.gates)

    # Training.

    @in_turn
    @torch.no_grad()
    def start(self, instructions: Sequence[Instruction]) -> None:
        """Tell a new embedder the instructions of its training; a lens learns what they have in common."""
        if self.lens is not None:
            heads = [self.prompter_text(item) for item in instructions]
            self.lens.start_at(self._write([(head, head) for head in heads])[1])

    @in_turn
    def use_graphs(self, on: bool) -> None:
        """From now on run the small passes with gradient by CUDA graphs, or no longer.

        That needs a GPU, the suffix layout, a backbone that is not sharded, and no dropout, whose random numbers a
        recording takes in another order; prompts that depend on the text, too, are launched. Weights must stay where
        they are meanwhile.
        """
        is_here = self.device.type == "cuda" and not self.backbone.is_sharded
        is_possible = is_here and self.config.layout == "suffix" and not self.has_dropout
        self.captured = self._new_captured() if on and is_possible else None

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that train, by part: those that write prompts, reader, skip, lens."""

        def of(part: nn.Module | None) -> list[nn.Parameter]:
            return [] if part is None else list(part.parameters())

        parts = {name: of(getattr(self, name)) for name in self._writers}
        parts |= {"reader": self.backbone.reader_parameters(), "skip": of(self.skip), "lens": of(self.lens)}
        training = {name: [p for p in parameters if p.requires_grad] for name, parameters in parts.items()}
        return {name: parameters for name, parameters in training.items() if parameters}
