"""The prompting LLM: K soft tokens by continuous relaxation (arXiv 2605.28066, section 3).

Step i reads the last hidden state h, takes p = softmax(h E_outᵀ / T) over the vocabulary and writes the soft token
s = p E_in, which is the next input. Everything is differentiable, through the key/value cache too.

Legend: N prompts, K soft tokens, L tokens of the longest request, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pe.config import PrompterConfig
from pe.kernels.vocab_mixture import vocab_mixture
from pe.method.adapters import drops, load_saved, lora_config
from pe.method.loading import TextTokenizer, content_of, embedding_scale, load_pretrained
from pe.method.packing import budget_on, inverse, to_device, token_batches
from pe.method.probes import check_generation, logit_scale
from pe.method.rms_norm import fuse_norms

ADAPTER = "prompter"
TOKENS_AT_ONCE = 16_384
"""Tokens of the requests that are read side by side, with their padding; a CPU takes fewer."""


@dataclass(frozen=True)
class SoftPrompts:
    """Soft tokens `[N, K, D]` in the prompting LLM's input space, and the hidden states `[N, K, D]` that wrote them."""

    tokens: Tensor
    hidden: Tensor


class PromptingLLM(nn.Module):
    """A causal language model that writes soft prompts.

    Attributes:
        model: the language model; its vocabulary embedding is frozen.
        config: K, T and what trains.
        revision: content of the checkpoint, which a saved adapter refers to.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: PrompterConfig,
        revision: str | None = None,
    ) -> None:
        """Take over `model`, fuse its RMS norms and choose its trainable weights.

        Raises:
            UnsupportedPrompter: logits that are not h E_outᵀ times a constant, or a model that padding, a cache or rows
                of embeddings in place of token ids would change.
            ValueError: see `TextTokenizer`.
        """
        super().__init__()
        self.model, self.config, self.revision = model, config, revision
        self.text_tokenizer = TextTokenizer(tokenizer, len(self.embedding))
        self._cast: dict[torch.dtype, tuple[object, tuple[Tensor, Tensor]]] = {}
        self.logit_scale = logit_scale(model)
        fuse_norms(model)
        check_generation(self)
        if config.trainable != "full":
            model.requires_grad_(False)
        if config.trainable == "lora":
            model.add_adapter(lora_config(config.lora), ADAPTER)
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, config: PrompterConfig, device: torch.device) -> PromptingLLM:
        """Load by folder or hub name, in float32: these are the weights that train."""
        model, tokenizer = load_pretrained(AutoModelForCausalLM, config.model, config.revision, torch.float32)
        revision = content_of(model, config.model, config.revision)
        return cls(model.to(device), tokenizer, config, revision)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def embedding(self) -> Tensor:
        """Input embedding `[V, D]`, before its scale."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @property
    def output_embedding(self) -> Tensor:
        """Output embedding `[V, D]`."""
        return cast(Tensor, self.model.get_output_embeddings().weight)

    @property
    def hidden_size(self) -> int:
        return int(self.embedding.shape[1])

    @property
    def embedding_scale(self) -> float:
        return embedding_scale(self.model)

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random numbers: by a rate of the model's options, or in adapters."""
        options = self.model.config.to_dict()
        rates = [value for name, value in options.items() if "dropout" in name or name.endswith("pdrop")]
        return any(isinstance(rate, float) and rate > 0 for rate in rates) or any(map(drops, self.modules()))

    @property
    def mixture_temperature(self) -> float:
        """T, with the model's own logit scale folded in."""
        return self.config.temperature / self.logit_scale

    def load_adapter(self, folder: Path) -> None:
        """Replace the fresh adapter by a saved one."""
        self.model.delete_adapter(ADAPTER)
        load_saved(self.model, folder, ADAPTER)
        self.model.peft_config[ADAPTER].base_model_name_or_path = self.config.model  # PEFT looks it up when it saves

    def forward(self, requests: Sequence[Sequence[int]]) -> SoftPrompts:
        """Write one prompt for each request.

        Args:
            requests: token ids of what is read, one list a prompt; none may be empty.
        """
        return self.generate(requests, self.config.soft_tokens)

    def generate(self, requests: Sequence[Sequence[int]], count: int) -> SoftPrompts:
        """Write prompts of `count` soft tokens; requests of similar length stand side by side, so little is padded."""
        budget = budget_on(self.device, TOKENS_AT_ONCE)
        batches = token_batches([len(row) for row in requests], budget, padded=True)
        parts = [self._generate([requests[i] for i in batch], count) for batch in batches]
        back = inverse([i for batch in batches for i in batch], self.device)
        return SoftPrompts(*(torch.cat(rows)[back] for rows in zip(*parts, strict=True)))

    def _generate(self, requests: Sequence[Sequence[int]], count: int) -> tuple[Tensor, Tensor]:
        """Soft tokens and hidden states of one padded batch."""
        ids, pads, positions = left_padded(requests, self.device)
        is_padded = any(len(row) != ids.shape[1] for row in requests)
        return self.write(ids, self.mask(pads, ids.shape[1], count) if is_padded else None, positions, count)

    def write(self, ids: Tensor, mask: Tensor | None, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`count` soft tokens and hidden states, `[N, count, D]` each, behind ids `[N, L]` at their positions.

        With a ready-made mask nothing in it waits for the device.
        """
        decoder, scale = self.model.base_model, self.embedding_scale
        inputs = torch.nn.functional.embedding(ids, self.embedding) * scale
        cache = DynamicCache(config=self.model.config)
        tokens, hidden = [], []
        for _ in range(count):
            output = decoder(
                inputs_embeds=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            h = output.last_hidden_state[:, -1]
            token = self._mixture(h).to(self.embedding.dtype) * scale
            tokens.append(token)
            hidden.append(h)
            inputs, positions = token[:, None], positions[:, -1:] + 1
            if mask is not None:
                mask = torch.nn.functional.pad(mask[..., -1:, :] if mask.ndim == 4 else mask, (0, 1), value=1)
        return torch.stack(tokens, 1), torch.stack(hidden, 1)

    def _mixture(self, hidden: Tensor) -> Tensor:
        """The soft token of each last hidden state `[N, D]`; under autocast of a GPU in its type, as a product runs."""
        dtype = hidden.dtype
        if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
        return vocab_mixture(hidden.to(dtype), *self._embeddings(dtype), self.mixture_temperature)

    def _embeddings(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output and input embedding in a type; they are frozen, so a copy is made once."""
        own = self.output_embedding, self.embedding
        if own[0].dtype == dtype:
            return own
        places = tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in own)
        if dtype not in self._cast or self._cast[dtype][0] != places:
            output = own[0].detach().to(dtype)
            self._cast[dtype] = places, (output, output if own[1] is own[0] else own[1].detach().to(dtype))
        return self._cast[dtype][1]

    def mask(self, pads: Tensor, length: int, count: int) -> Tensor:
        """The attention mask behind `pads` `[N]` tokens of padding.

        Ready-made (`[N, 1, L, L]`, true where a query sees a key) where the model takes it so: transformers then has no
        need to look at the values of `[N, L]`, which would wait for a GPU. A padding token sees itself.
        """
        places = torch.arange(length, device=pads.device)
        is_token = places >= pads[:, None]
        config = self.model.config
        windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        is_whole = all(window is None or length + count <= window for window in windows)
        if config._attn_implementation != "sdpa" or not is_whole:
            return is_token.long()
        causal = places <= places[:, None]
        return ((causal & is_token[:, None]) | (places == places[:, None]))[:, None]


def left_padded(
    requests: Sequence[Sequence[int]], device: torch.device, multiple: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `[N, L]`, tokens of padding `[N]` and positions `[N, L]`; L is a multiple of `multiple`."""
    longest = -(-max(map(len, requests)) // multiple) * multiple
    pads = to_device([longest - len(row) for row in requests], device)
    ids = to_device([[0] * (longest - len(row)) + list(row) for row in requests], device)
    places = torch.arange(longest, device=device)
    return ids, pads, (places - pads[:, None]).clamp(min=0)
