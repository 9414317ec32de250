"""From the prompting LLM's soft tokens to the backbone's input space.

`linear` is the paper's matrix W; `vocabulary` needs none: the mixture is taken over the tokens that both vocabularies
share, with the backbone's own rows.

Legend: N prompts, B texts, K soft tokens, P and D the widths of prompting LLM and backbone, S shared tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pe.config import AlignmentConfig
from pe.kernels.vocab_mixture import vocab_mixture
from pe.method.backbone import Backbone
from pe.method.packing import to_device
from pe.method.prompting import PromptingLLM, SoftPrompts

METASPACE = "▁"


@dataclass(frozen=True)
class AlignedPrompts:
    """Prompts `[N, K, P]` with the matrix `[P, D]` that carries them over, or `[N, K, D]` with none.

    Attributes:
        gates: `[N, D]` what a lens makes of each (see `pe/method/lens.py`); None without one.
    """

    prompts: Tensor
    weight: Tensor | None
    gates: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def ids(self, index: Sequence[int]) -> Tensor:
        """Negative ids `[B K]` of the rows of prompt `index[b]` for each of B texts (see `kernels/prompt_rows.py`)."""
        k, device = self.prompts.shape[1], self.prompts.device
        return (-1 - (to_device(index, device)[:, None] * k + torch.arange(k, device=device))).flatten()

    def gates_of(self, index: Sequence[int]) -> Tensor | None:
        """`[B, D]` of prompt `index[b]` for each of B texts."""
        return None if self.gates is None else self.gates[to_device(index, self.prompts.device)]

    def part(self, places: slice) -> AlignedPrompts:
        """Some of the prompts, neighbours."""
        return AlignedPrompts(self.prompts[places], self.weight, None if self.gates is None else self.gates[places])


def together(written: Sequence[AlignedPrompts]) -> AlignedPrompts:
    """Prompts without a matrix, in one."""
    gates = [prompts.gates for prompts in written if prompts.gates is not None]
    rows = torch.cat([prompts.prompts for prompts in written])
    return AlignedPrompts(rows, None, torch.cat(gates) if gates else None)


@dataclass(frozen=True)
class AlignmentReport:
    """What the alignment starts from: shared tokens, and the relative residual of the fit (None: no fit)."""

    shared_tokens: int
    residual: float | None

    def __str__(self) -> str:
        fit = "" if self.residual is None else f", relative residual {self.residual:.3f}"
        return f"{self.shared_tokens:,} shared tokens{fit}"


class LinearAlignment(nn.Module):
    """s W, with W `[P, D]` trained in float32."""

    def __init__(self, weight: Tensor, report: AlignmentReport) -> None:
        super().__init__()
        self.weight, self.report = nn.Parameter(weight), report

    def forward(self, prompts: SoftPrompts) -> AlignedPrompts:
        return AlignedPrompts(prompts.tokens, self.weight)


class VocabularyAlignment(nn.Module):
    """softmax(h E_out[shared]ᵀ / T) E_backbone[shared]: no weights of its own."""

    def __init__(self, prompter: PromptingLLM, backbone: Backbone) -> None:
        super().__init__()
        ours, theirs = shared_tokens(prompter.text_tokenizer.tokenizer, backbone.text_tokenizer.tokenizer)
        if not len(ours):
            raise ValueError(
                f"alignment: the vocabularies of {prompter.config.model} and {backbone.name} share nothing"
            )
        device = backbone.device
        output = prompter.output_embedding.detach().to(device)[ours.to(device)]
        rows = backbone.embedding.detach()[theirs.to(device)].float() * backbone.embedding_scale
        self.temperature = prompter.mixture_temperature
        self.report = AlignmentReport(len(ours), None)
        self.register_buffer("output", output, persistent=False)
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, prompts: SoftPrompts) -> AlignedPrompts:
        mixed = vocab_mixture(
            prompts.hidden.flatten(0, 1), cast(Tensor, self.output), cast(Tensor, self.rows), self.temperature
        )
        return AlignedPrompts(mixed.unflatten(0, prompts.hidden.shape[:2]), None)


Alignment = LinearAlignment | VocabularyAlignment


def build_alignment(prompter: PromptingLLM, backbone: Backbone, config: AlignmentConfig) -> Alignment:
    """The alignment that `config` names, untrained, on the backbone's device."""
    if config.kind == "vocabulary":
        return VocabularyAlignment(prompter, backbone)
    weight, report = initial_weight(prompter, backbone, config)
    return LinearAlignment(weight.to(backbone.device), report)


@torch.no_grad()
def initial_weight(
    prompter: PromptingLLM, backbone: Backbone, config: AlignmentConfig
) -> tuple[Tensor, AlignmentReport]:
    """W `[P, D]` float32 and how it was found.

    least_squares: ridge regression of the backbone's rows on the prompting LLM's rows of the shared tokens, in float64.
    orthogonal: a random matrix with orthonormal rows or columns, scaled to the backbone's mean row norm.
    """
    ours, theirs = shared_tokens(prompter.text_tokenizer.tokenizer, backbone.text_tokenizer.tokenizer)
    size = (prompter.hidden_size, backbone.hidden_size)
    scale = prompter.embedding_scale
    if config.init == "orthogonal":
        weight = nn.init.orthogonal_(torch.empty(*size))
        theirs_norm = backbone.embedding.float().norm(dim=1).mean().item() * backbone.embedding_scale
        ours_norm = prompter.embedding.float().norm(dim=1).mean().item() * scale
        return weight * (theirs_norm / ours_norm), AlignmentReport(len(ours), None)
    if not len(ours):
        raise ValueError(
            f"alignment: least_squares needs shared tokens, but {prompter.config.model} and {backbone.name} share none;"
            " choose init orthogonal"
        )
    x = prompter.embedding.cpu()[ours].double() * scale
    y = backbone.embedding.cpu()[theirs].double() * backbone.embedding_scale
    gram = x.T @ x
    gram += config.ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    try:
        weight = torch.linalg.solve(gram, x.T @ y)
    except RuntimeError as error:
        raise ValueError(
            f"alignment.ridge: expected more than {config.ridge:g}: the rows of {len(ours)} shared tokens determine"
            f" no matrix of width {size[0]}"
        ) from error
    residual = ((x @ weight - y).norm() / y.norm()).item()
    return weight.float().contiguous(), AlignmentReport(len(ours), residual)


def shared_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Ids `[S]` and `[S]` of the tokens that stand for the same bytes in both vocabularies, in our order."""
    other = token_bytes(theirs)
    pairs = sorted((number, other[key]) for key, number in token_bytes(ours).items() if key in other)
    left, right = zip(*pairs, strict=True) if pairs else ((), ())
    return torch.tensor(left, dtype=torch.int64), torch.tensor(right, dtype=torch.int64)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    """The bytes each ordinary token stands for; a leading space is part of them, special tokens are left out.

    Byte-level BPE (`Ġword`) and SentencePiece (`▁word`, `<0x41>`) spellings of one word give the same key.
    """
    special = set(tokenizer.all_special_ids)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = backend is not None and "ByteLevel" in json.dumps(json.loads(backend.to_str())["decoder"])
    alphabet = byte_alphabet()
    found: dict[bytes, int] = {}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if number in special:
            continue
        if byte_level and all(char in alphabet for char in token):
            key, spelled_byte = bytes(alphabet[char] for char in token), False
        else:
            spelled_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            key = bytes([int(token[3:5], 16)]) if spelled_byte else token.replace(METASPACE, " ").encode()
        if not spelled_byte:
            found[key] = number
        else:
            found.setdefault(key, number)
    return found


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
