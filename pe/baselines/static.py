"""The control: one learned prompt for each instruction, without a prompting LLM.

What is done with a prompt is PromptEmbedder's; only who writes it differs. An instruction that has no prompt
of its own gets the mean of the learned ones, or the prompt of the instruction that is spelled most like it.

Legend: I instructions, K soft tokens, D the backbone's width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pe.baselines.common import content_hash, short_name
from pe.config import ModelConfig
from pe.method.alignment import AlignedPrompts
from pe.method.backbone import Backbone
from pe.method.loading import Filled
from pe.method.prompted import PromptedEmbedder
from pe.method.requests import Instruction, listed
from pe.method.turns import in_turn
from pe.runs.files import written_into

Start = Literal["vocabulary", "instruction"]


class StaticPrompts(nn.Module):
    """A prompt `[K, D]` for each known text, in the backbone's input space.

    Every prompt is a parameter of its own, so that the optimiser leaves alone those without a gradient.

    Attributes:
        unknown: what another text gets: the mean of all prompts, or that of the known text spelled most like it.
    """

    def __init__(self, texts: Sequence[str], prompts: Sequence[Tensor]) -> None:
        super().__init__()
        self.unknown: Literal["mean", "nearest"] = "mean"
        self.known = {text: place for place, text in enumerate(texts)}
        self.prompts = nn.ParameterList(nn.Parameter(prompt) for prompt in prompts)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Prompts `[len(texts), K, D]`."""
        places = [self.known.get(text) for text in texts]
        if self.unknown == "nearest":
            places = [self.known[text] if text in self.known else self._nearest(text) for text in texts]
        mean = torch.stack(list(self.prompts)).mean(0) if None in places else torch.empty(0)
        return torch.stack([mean if place is None else self.prompts[place] for place in places])

    def _nearest(self, text: str) -> int:
        """Place of the known text whose bag of character trigrams has the largest cosine with that of `text`."""
        own, bags = trigrams(text), {known: trigrams(known) for known in self.known}
        return self.known[max(bags, key=lambda known: overlap(bags[known], own))]


def trigrams(text: str) -> Counter[str]:
    """How often each run of three characters stands in a text, its ends included."""
    padded = f"  {text.casefold()}  "
    return Counter(padded[i : i + 3] for i in range(len(padded) - 2))


def overlap(a: Counter[str], b: Counter[str]) -> float:
    """Cosine of two bags."""
    size = (sum(n * n for n in a.values()) * sum(n * n for n in b.values())) ** 0.5
    return sum(count * b[part] for part, count in a.items()) / size


class StaticPromptEmbedder(PromptedEmbedder):
    """A frozen decoder that embeds texts under learned prompts; suffix layout, optional reader.

    Attributes:
        static: the learned prompts.
    """

    static: StaticPrompts

    def __init__(self, config: ModelConfig, prompts: StaticPrompts, backbone: Backbone) -> None:
        """Raises ValueError for a layout or conditioning that a static prompt does not have."""
        if config.layout != "suffix" or config.conditioning != "instruction":
            got = f"{config.layout!r} and {config.conditioning!r}"
            raise ValueError(f"layout, conditioning: a static prompt needs 'suffix' and 'instruction', got {got}")
        super().__init__(config, {"static": prompts}, backbone, hidden=backbone.hidden_size)
        self.name = f"static-{short_name(backbone.name)}"

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        device: torch.device | str = "cpu",
        *,
        instructions: Iterable[Instruction] = (),
        start: Start = "vocabulary",
        seed: int = 0,
    ) -> StaticPromptEmbedder:
        """Untrained prompts for these instructions on the backbone that `config` names; see `fresh`."""
        backbone = Backbone.from_pretrained(config.backbone, torch.device(device))
        return cls.fresh(config, backbone, instructions, start=start, seed=seed)

    @classmethod
    def fresh(
        cls,
        config: ModelConfig,
        backbone: Backbone,
        instructions: Iterable[Instruction],
        *,
        start: Start = "vocabulary",
        seed: int = 0,
    ) -> StaticPromptEmbedder:
        """Untrained prompts of `config.prompter.soft_tokens` tokens each.

        Args:
            config: the options; of `prompter` only K is used.
            backbone: the frozen decoder.
            instructions: what the training set asks for.
            start: rows of random vocabulary tokens, or of the instruction's own tokens (repeated, or its first K).
            seed: of the random tokens.
        """
        wanted = listed("instructions", instructions, "Instruction")
        if not wanted:
            raise ValueError("instructions: expected at least one, got none")
        embedder = cls(config, StaticPrompts([], []), backbone)
        generator = torch.Generator().manual_seed(seed)
        vocabulary, k = backbone.embedding.shape[0], config.prompter.soft_tokens
        prompts: dict[str, Tensor] = {}
        for item in wanted:
            if start == "instruction":
                own = backbone.text_tokenizer([item.text], lead=False)[0]
                ids = (own * k)[:k]
            else:
                ids = torch.randint(vocabulary, (k,), generator=generator).tolist()
            rows = backbone.token_rows(torch.tensor(ids, device=backbone.device))
            prompts.setdefault(str(embedder.prompter_text(item)), rows.detach().float().clone())
        return cls(config, StaticPrompts(list(prompts), list(prompts.values())), backbone)

    @property
    def revision(self) -> str:
        return content_hash(self.trainable_state(), self.backbone.revision, self.config, list(self.static.known))

    @in_turn
    def meet_unknown(self, way: Literal["mean", "nearest"]) -> None:
        """From now on give an unknown instruction the mean of all prompts, or that of what is spelled most like it."""
        self.static.unknown = way
        self._bank.clear()

    def _write(self, readings: Sequence[tuple[Filled, Filled]]) -> tuple[AlignedPrompts, Tensor]:
        """The learned prompts; a lens reads the mean of each one's rows, for no hidden state wrote it."""
        rows = self.static([str(whole) for _, whole in readings])
        return AlignedPrompts(rows, None), rows.mean(1)

    def save_pretrained(self, path: str | Path, *, include_backbone: bool = False, card: str = "") -> None:
        """Write what trains; the control is not meant to be loaded elsewhere.

        Raises:
            ValueError: `include_backbone`, which the control does not offer.
        """
        if include_backbone:
            raise ValueError("include_backbone: expected False for a static prompt, got True")
        state = {name: tensor.contiguous() for name, tensor in self.trainable_state().items()}
        with written_into(Path(path)) as folder:
            save_file(state, folder / "static.safetensors")
            (folder / "README.md").write_text(card or "Static prompts.\n", encoding="utf-8")
