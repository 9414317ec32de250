"""FLOPs that a training step needs: matrix products of the method, without recomputation and elementwise work.

A product of `[m, k]` and `[k, n]` is 2mkn. Frozen weights cost one product forward and one backward (the gradient of
their input), trained weights two backward. Causal attention counts the half that is not masked.

Legend: B texts, L tokens of a text, K soft tokens, N weights of the decoder's linear layers, A of its adapters.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from bench.cases import Embedder
from pe.baselines.lora import LoraEmbedder
from pe.model import PromptEmbedder, Requests


class Decoder:
    """Sizes of a decoder that its products depend on.

    Attributes:
        frozen, adapters: weights of its linear layers, without embeddings, and of its LoRA adapters.
        layers: their number.
        attention: products a pair of query and key costs in one layer, forward.
        not_keys: weights of one layer other than those of keys and values.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        linear = {
            name: module.weight.numel()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        self.adapters = sum(count for name, count in linear.items() if "lora_" in name)
        self.frozen = sum(linear.values()) - self.adapters
        self.layers = int(config.num_hidden_layers)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.attention = 4 * config.num_attention_heads * size
        self.not_keys = self.frozen // self.layers - 2 * config.hidden_size * config.num_key_value_heads * size

    def products(self, tokens: float, *, backward: bool, share: float = 1.0) -> float:
        """Of `tokens` tokens in the linear layers: forward, and the gradients of inputs and adapters.

        Where they run a share of the layers, adapters stand there alone.
        """
        if not backward:
            return 2 * tokens * self.frozen
        return tokens * (4 * share * self.frozen + 6 * self.adapters)

    def attend(self, pairs: float, *, backward: float) -> float:
        """Of `pairs` pairs of query and key in every layer; `backward` in units of the forward pass."""
        return (1 + backward) * pairs * self.attention * self.layers


def causal(lengths: Sequence[int]) -> float:
    return sum(length**2 for length in lengths) / 2


def step_flops(model: Embedder, requests: Requests) -> float:
    """FLOPs of one training step on these requests."""
    lengths = [len(row) for row in model.tokenize(requests)]
    decoder = Decoder(model.backbone.model)
    if isinstance(model, LoraEmbedder):
        return decoder.products(sum(lengths), backward=True) + decoder.attend(causal(lengths), backward=2)
    written = _prompter_flops(model, requests)
    k = model.config.prompter.soft_tokens
    if model.config.layout == "suffix":
        soft = len(lengths) * k
        trimmed = 2 * sum(lengths) * decoder.not_keys
        text = 2 * sum(lengths) * decoder.frozen - trimmed
        text += decoder.attend(causal(lengths), backward=0) * (decoder.layers - 1) / decoder.layers
        if model.backbone.text_store is not None:  # which has all of them
            text = 0
        pairs = k * sum(lengths) + len(lengths) * k**2 / 2
        mapped = 4 * len(lengths) * model.dimensions**2 + 8 * sum(lengths) * model.dimensions
        skip = mapped if model.skip is not None else 0
        share = 1 - model.backbone.entry_layer / decoder.layers
        behind = decoder.products(soft, backward=True, share=share) + share * decoder.attend(pairs, backward=1)
        return written + text + skip + behind
    distinct = sorted(set(requests.index))
    heads = model.backbone.text_tokenizer([model.prefix_text(requests.instructions[n]) for n in distinct])
    before = {n: len(head) + k for n, head in zip(distinct, heads, strict=True)}
    prefixes = [before[n] for n in requests.index] if _reads_text(model) else list(before.values())
    pairs = causal(lengths) + sum(len_ * before[n] for len_, n in zip(lengths, requests.index, strict=True))
    pairs += causal(prefixes)
    return written + decoder.products(sum(lengths) + sum(prefixes), backward=True) + decoder.attend(pairs, backward=2)


def _reads_text(model: PromptEmbedder) -> bool:
    return model.config.conditioning == "instruction_and_text"


def _prompter_flops(model: PromptEmbedder, requests: Requests) -> float:
    """Of writing every distinct prompt, all weights trained, and of aligning it; a frozen LLM's are written before."""
    if model.config.prompter.trainable == "none":
        return 0.0
    readings = set()
    for i, text in enumerate(requests.texts):
        instruction = requests.instruction(i)
        read_too = text if _reads_text(model) else None
        readings.add((model.prompter_text(instruction), model.prompter_text(instruction, read_too)))
    prompter, k = model.prompter, model.config.prompter.soft_tokens
    decoder = Decoder(prompter.model)
    read = [len(row) + k - 1 for row in model.prompter_ids(sorted(readings))]
    vocabulary, width = prompter.embedding.shape
    mixtures = 8 * len(readings) * k * vocabulary * width
    aligned = 6 * len(readings) * k * width * model.dimensions
    products = 6 * sum(read) * decoder.frozen if decoder.adapters == 0 else decoder.products(sum(read), backward=True)
    return products + decoder.attend(causal(read), backward=2) + mixtures + aligned
