"""PromptEmbedder: prompting LLM, alignment and frozen backbone as one text embedder.

Legend: N prompts, P the width of the prompting LLM, D the backbone's width.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from pe.config import Dtype, ModelConfig
from pe.hub import CARD, Upload, card_data, loading, with_data
from pe.method.alignment import AlignedPrompts, Alignment, build_alignment
from pe.method.backbone import Backbone
from pe.method.captured import Captured
from pe.method.lens import Lens
from pe.method.loading import Filled, commit_of
from pe.method.prompt_bank import PromptBank
from pe.method.prompted import PromptedEmbedder
from pe.method.prompting import PromptingLLM, SoftPrompts
from pe.method.requests import Instruction, Requests, Side, Texts, Truncation
from pe.method.skip import WeightedSkip
from pe.method.turns import in_turn
from pe.saving import Parts, Told, find, read, read_told, write

__all__ = ["Instruction", "PromptEmbedder", "Requests", "Side", "Texts", "Truncation"]

MOST_WRITTEN = 1024
"""Prompts of a frozen prompting LLM that are kept."""


class PromptEmbedder(PromptedEmbedder):
    """A frozen decoder that embeds texts under soft prompts, which a prompting LLM writes for an instruction.

    Threads may share one: their calls queue, each for its whole length. While `pe.train.fit` trains it, calls of other
    threads raise `BeingTrained`. Beside a training loop of one's own they embed by the weights that they find; an
    optimiser's step is no call, and keeps clear of them within `with model.backbone.turns.taken():`.

    Attributes:
        prompter, alignment: what writes prompts and carries them over to the backbone; they train, and a reader of the
            backbone, a skip and a lens (see `PromptedEmbedder`, as for the other attributes).
    """

    prompter: PromptingLLM
    alignment: Alignment

    def __init__(
        self,
        config: ModelConfig,
        prompter: PromptingLLM,
        alignment: Alignment,
        backbone: Backbone,
        skip: WeightedSkip | None = None,
        instructions: Mapping[str, str] | None = None,
        lens: Lens | None = None,
        training_sets: Sequence[str] = (),
    ) -> None:
        """Put the parts together; see `PromptedEmbedder`."""
        writers = {"prompter": prompter, "alignment": alignment}
        hidden = prompter.hidden_size
        super().__init__(config, writers, backbone, hidden=hidden, skip=skip, lens=lens, instructions=instructions)
        self.name = "PromptEmbedder"
        self.training_sets = tuple(training_sets)
        self._told = Told(None, {})
        self._frozen: PromptBank[tuple[int, ...], SoftPrompts] = PromptBank(MOST_WRITTEN)

    @classmethod
    def from_config(
        cls, config: ModelConfig, device: torch.device | str = "cpu", mesh: DeviceMesh | None = None
    ) -> PromptEmbedder:
        """An untrained embedder of the models that `config` names.

        With a mesh of processes each holds a part of the backbone (see `pe/method/sharded.py`).

        Raises:
            FileNotFoundError, UnsupportedBackbone, UnsupportedPrompter: see the parts.
            ValueError: texts of `max_length` tokens and the prompt take more positions than the backbone has.
        """
        device = torch.device(device)
        prompter = PromptingLLM.from_pretrained(config.prompter, device)
        backbone = Backbone.from_pretrained(config.backbone, device, mesh)
        alignment = build_alignment(prompter, backbone, config.alignment)
        return cls(config, prompter, alignment, backbone)

    @property
    def revision(self) -> str:
        """Content hash of all that training changes, and of the options."""
        tokenizers = [part.text_tokenizer.behaviour for part in (self.prompter, self.backbone)]
        return self._digest(repr((self.config, self.backbone.revision, tokenizers)))

    def _digest(self, options: str = "") -> str:
        """Content hash of all that training changes, and of some options."""
        digest = hashlib.blake2b(options.encode(), digest_size=8)
        for name, tensor in self._own_state().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()

    def _own_state(self) -> dict[str, Tensor]:
        frozen = {id(p) for name, p in self.backbone.named_parameters() if ".reader." not in name}
        return {name: p.detach() for name, p in self.named_parameters() if id(p) not in frozen}

    # Writing prompts.

    @property
    def has_dropout(self) -> bool:
        return self.prompter.has_dropout or self.backbone.has_dropout

    def _new_captured(self) -> Captured:
        return Captured(self.prompter, self.backbone)

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

    def _write(self, readings: Sequence[tuple[Filled, Filled]]) -> tuple[AlignedPrompts, Tensor]:
        """Prompts of the prompting LLM, carried over; and the hidden states `[N, P]` that began them."""
        ids = self.prompter_ids(readings)
        of_instruction = self.config.conditioning == "instruction"
        if self._writes_once:
            prompts = self._kept(ids)
        elif self.captured is not None and torch.is_grad_enabled() and of_instruction:
            prompts = self.captured.prompts(ids)
        else:
            prompts = self.prompter(ids)
        here = SoftPrompts(prompts.tokens.to(self.device), prompts.hidden.to(self.device))
        return self.alignment(here), here.hidden[:, 0]

    @property
    def _writes_once(self) -> bool:
        """Whether prompts stay as they are: the prompting LLM is frozen, reads no text and draws nothing."""
        is_frozen = not any(p.requires_grad for p in self.prompter.parameters())
        is_drawn = self.training and self.prompter.has_dropout
        return is_frozen and not is_drawn and self.config.conditioning == "instruction"

    @torch.no_grad()
    def _kept(self, ids: list[list[int]], *, side_by_side: bool = False) -> SoftPrompts:
        """What is written once: each prompt by itself, which no other changes, or all that are missing together."""

        def write(missing: list[tuple[int, ...]]) -> Iterator[SoftPrompts]:
            for part in [missing] if side_by_side else [[row] for row in missing]:
                written: SoftPrompts = self.prompter(part)
                yield from map(SoftPrompts, written.tokens.split(1), written.hidden.split(1))

        prompts = self._frozen.get(list(map(tuple, ids)), [self.prompter], write)
        return SoftPrompts(torch.cat([p.tokens for p in prompts]), torch.cat([p.hidden for p in prompts]))

    @in_turn
    def start(self, instructions: Sequence[Instruction]) -> None:
        """See `PromptedEmbedder.start`; what a frozen prompting LLM writes for them is written here, side by side."""
        if self._writes_once:
            heads = [self.prompter_text(item) for item in instructions]
            self._kept(self.prompter_ids([(head, head) for head in heads]), side_by_side=True)
        super().start(instructions)

    # Saving and loading.

    def save_pretrained(self, path: str | Path, *, include_backbone: bool = False, card: str = "") -> None:
        """Write the embedder to a folder: whole or not at all.

        The backbone, and the base of a prompting LLM with adapters, are stored by name and revision; their weights only
        with `include_backbone`, or where they are in the folder that is written anew. An earlier saved embedder in
        `path` is replaced with all that stands in its folder, files of yours too; a link is replaced, what it leads to
        stays as it is. Until the new one is whole the earlier one stays. On Linux they change places at once; elsewhere
        a process that is killed between two moves leaves the earlier one in `NAME.saving-*/former`.

        README.md says what `card` does. Without one it and recipe.yaml are those of the folder that the embedder was
        loaded from, as long as the weights are the same; else it says no more than what it is.

        Raises:
            FileExistsError: the folder holds something other than a saved PromptEmbedder.
        """
        write(self._parts(), Path(path), self._telling(card), include_backbone=include_backbone)

    def _parts(self) -> Parts:
        learned = self.prompter, self.alignment, self.backbone, self.skip
        return Parts(self.config, *learned, self.instructions, self.lens, self.training_sets)

    def _telling(self, card: str) -> Told:
        """What is told of the weights as they are now."""
        weights = self._digest()
        if not card and self._told.weights == weights:
            return self._told
        return Told(weights, {CARD: card or with_data(card_data(), "A PromptEmbedder.\n")})

    def push_to_hub(self, repo_id: str, *, include_backbone: bool | None = None, card: str = "", **options: Any) -> str:
        """Upload the embedder to a repository of the hub, which is made where there is none; the commit's address.

        Args:
            repo_id: `user/name`, by which the code of the card loads it.
            include_backbone: with the frozen weights too; None: where they are those of a folder or a file, which
                others do not have.
            card: as in `save_pretrained`.
            options: of `huggingface_hub.ModelHubMixin.push_to_hub`, such as `private`, `token`, `branch`, `create_pr`.
        """
        if include_backbone is None:
            frozen = [self.backbone.model, *([] if self.config.prompter.trainable == "full" else [self.prompter.model])]
            include_backbone = any(commit_of(model) is None for model in frozen)
        told = self._telling(card)
        told = told._replace(files={**told.files, CARD: loading(told.files[CARD], repo_id)})
        save = functools.partial(write, self._parts(), told=told, include_backbone=include_backbone)
        return Upload(save).push_to_hub(repo_id, **options)

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
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
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
            token, cache_dir, local_files_only: of the hub, as `huggingface_hub.snapshot_download` has them.

        Raises:
            FileNotFoundError: no saved PromptEmbedder there, a file of it is missing, or its backbone is not found.
            ValueError: another format, a damaged file, an unknown dtype, a backbone or base whose content has changed,
                or a `prompter` for a prompting LLM that needs none.
        """
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = find(Path(path), revision, **hub)
        parts = read(folder, backbone=backbone, prompter=prompter, dtype=dtype, device=torch.device(device))
        model = cls(*parts).eval()
        model.name = Path(path).name
        model._told = read_told(folder)
        return model
