"""What is compared: model pairs (cases) and ways to train them on one batch (variants).

Neither time nor memory of a step depends on the weights, so a model that is not in `models/` gets random ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pe.baselines.common import BARE, Templates
from pe.baselines.lora import Form, LoraBaselineConfig, LoraEmbedder
from pe.config import LoraSettings, ModelConfig, PrompterConfig, Quantize
from pe.method.alignment import AlignmentReport, LinearAlignment
from pe.method.backbone import Backbone
from pe.method.layers import keep_first_layers
from pe.method.loading import DTYPES
from pe.method.prompting import PromptingLLM
from pe.model import PromptEmbedder

ROOT = Path(__file__).parent.parent


class IdTokenizer:
    """Reads a text as the numbers in it: `"12 7"` is the tokens 12 and 7. Batches are made of token ids by it."""

    name_or_path = "numbers"
    eos_token_id = 0

    def __init__(self) -> None:
        self.added_tokens_decoder: dict[int, Any] = {}

    def get_vocab(self) -> dict[str, int]:
        """None that is known by name: every number is a token."""
        return {}

    def __call__(self, texts: str | Sequence[str], **_: object) -> dict[str, Any]:
        return {"input_ids": self._ids(texts) if isinstance(texts, str) else [self._ids(text) for text in texts]}

    def _ids(self, text: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", text)]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder: the checkpoint in `folder` where there is one, else random weights of these sizes."""

    kind: str
    sizes: Mapping[str, int]
    folder: str | None = None
    tied: bool = False
    """Whether input and output embedding are one; a checkpoint says so itself."""

    @property
    def vocabulary(self) -> int:
        return int(self.config().vocab_size)

    @property
    def path(self) -> Path | None:
        path = ROOT / self.folder if self.folder else None
        return path if path and (path / "config.json").exists() else None

    def config(self) -> Any:
        if self.path:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        return AutoConfig.for_model(self.kind, tie_word_embeddings=self.tied, **self.sizes)

    def load(self, auto: type, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model as `auto` (AutoModel, AutoModelForCausalLM) builds it."""
        with torch.device(device):
            if self.path and list(self.path.glob("*.safetensors")):
                return auto.from_pretrained(self.path, dtype=dtype, trust_remote_code=False)  # type: ignore[attr-defined]
            return auto.from_config(self.config(), dtype=dtype)  # type: ignore[attr-defined]


def sizes(vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, head: int) -> dict[str, int]:
    """The fields of a transformers configuration."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
    }


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pair of models and a batch.

    Attributes:
        prompter, backbone: the two language models.
        queries: queries of a batch; as many positives come on top.
        soft_tokens: K.
        rank: of LoRA and of the reader.
        writes_once: the prompting LLM is frozen; else all of it trains but its vocabulary embedding.
    """

    name: str
    prompter: Shape
    backbone: Shape
    queries: int
    soft_tokens: int = 5
    rank: int = 16
    writes_once: bool = False

    @property
    def vocabulary(self) -> int:
        """Token ids below this are in both vocabularies."""
        return min(self.prompter.vocabulary, self.backbone.vocabulary)


QWEN_06B = Shape(kind="qwen3", sizes=sizes(151_936, 1024, 3072, 28, 16, 8, 128), tied=True)
TINY_PROMPTER = Shape(kind="llama", sizes=sizes(4096, 192, 512, 4, 6, 3, 32), folder="models/tiny-prompter")
SMOLLM2 = Shape(kind="llama", sizes=sizes(49_152, 576, 1536, 30, 9, 3, 64), folder="models/smollm2-135m", tied=True)
CASES = {
    "smollm2": Case(name="smollm2", prompter=SMOLLM2, backbone=SMOLLM2, queries=64, soft_tokens=3, writes_once=True),
    "tiny": Case(
        name="tiny",
        prompter=TINY_PROMPTER,
        backbone=Shape(kind="qwen3", sizes=sizes(8192, 256, 640, 6, 8, 4, 32), folder="models/tiny-qwen3"),
        queries=64,
    ),
    "small": Case(
        name="small",
        prompter=TINY_PROMPTER,
        backbone=Shape(kind="qwen3", sizes=sizes(8192, 512, 1536, 8, 8, 4, 64)),
        queries=32,
    ),
    "1b": Case(
        name="1b",
        prompter=QWEN_06B,
        backbone=Shape(kind="llama", sizes=sizes(128_256, 2048, 8192, 16, 32, 8, 64)),
        queries=64,
    ),
    "4b": Case(
        name="4b",
        prompter=QWEN_06B,
        backbone=Shape(kind="qwen3", sizes=sizes(151_936, 2560, 9728, 36, 32, 8, 128)),
        queries=32,
    ),
    "8b": Case(
        name="8b",
        prompter=QWEN_06B,
        backbone=Shape(kind="qwen3", sizes=sizes(151_936, 4096, 12_288, 36, 32, 8, 128)),
        queries=16,
    ),
    "toy": Case(
        name="toy",
        prompter=Shape(kind="llama", sizes=sizes(64, 16, 24, 1, 2, 1, 8)),
        backbone=Shape(kind="qwen3", sizes=sizes(80, 24, 32, 2, 2, 1, 12)),
        queries=3,
        soft_tokens=2,
        rank=2,
    ),
}
CPU_CASES = ("tiny", "small")
GPU_CASES = ("1b", "4b", "8b")
"""Shapes of Llama-3.2-1B, Qwen3-4B and Qwen3-8B, with that of Qwen3-0.6B as prompting LLM; random weights.

Their batches are of a size that padded LoRA, too, trains on one GPU of 80 GB.
"""
MEASURED = ("smollm2", *CPU_CASES, *GPU_CASES)
"""Cases that are on the page; `toy` is for the tests. `smollm2` runs where it is asked for: padded LoRA takes more
memory on it than small machines have."""


def default_cases(device: str) -> tuple[str, ...]:
    return CPU_CASES if device == "cpu" else GPU_CASES


MAX_LENGTH = 512
"""Tokens of the longest texts of any distribution: none is cut."""
Embedder = PromptEmbedder | LoraEmbedder


@dataclass(frozen=True)
class Setting:
    """Where the models are, and the type of their frozen weights; below float32 a GPU's step runs under autocast."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, device: str | torch.device, dtype: str | None = None) -> Setting:
        """`dtype` None: bfloat16 on a GPU, float32 on a CPU."""
        device = torch.device(device)
        return cls(device, DTYPES[dtype or ("float32" if device.type == "cpu" else "bfloat16")])

    @property
    def accelerator(self) -> Accelerator:
        """What `pe.train` would train by here."""
        precision = "bf16" if self.dtype == torch.bfloat16 and self.device.type != "cpu" else "no"
        return Accelerator(cpu=self.device.type == "cpu", mixed_precision=precision)


Build = Callable[[Case, bool, Setting], Embedder]
ALONE = {"reader": "none", "skip": "none"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to train, under the name its records carry."""

    title: str
    build: Build
    parts: int = 1
    """More than 1: representations are cached, and the batch goes through the model in so many parts."""
    graphs: bool = True
    """Whether a GPU runs PromptEmbedder's small passes by CUDA graphs."""
    ahead: bool = False
    """Whether the next batch's texts are read beside a step, on a stream of their own."""
    stored: bool = False
    """Whether the texts were read before: the warm-up's passes fill a store in memory, and a step finds all of them."""
    compiled: bool = False
    """Whether torch.compile fuses the backbone's norms and MLPs; attention and linear layers outside them stay."""

    @property
    def is_for_cpus(self) -> bool:
        return self.graphs and not (self.ahead or self.compiled)


def load_backbone(
    case: Case, setting: Setting, quantize: Quantize = "none", *, half: bool = False, entered: bool = False
) -> Backbone:
    """The case's backbone, or with `half` the lower half of its layers; `entered`: soft tokens enter at a third."""
    tokenizer = cast(PreTrainedTokenizerBase, IdTokenizer())
    model = case.backbone.load(AutoModel, setting.dtype, setting.device)
    if half:
        keep_first_layers(model, model.config.num_hidden_layers // 2, case.name)
    entry_layer = model.config.num_hidden_layers // 3 if entered else 0
    return Backbone(model, tokenizer, case.name, quantize=quantize, entry_layer=entry_layer)


def prompt_embedder(quantize: Quantize = "none", *, half: bool = False, entered: bool = False, **options: Any) -> Build:
    """PromptEmbedder as its `from_config` builds it, with reader and skip only where the options name them."""

    def build(case: Case, instructed: bool, setting: Setting) -> Embedder:
        config = ModelConfig(
            prompter=PrompterConfig(soft_tokens=case.soft_tokens, trainable="none" if case.writes_once else "full"),
            reader_lora=LoraSettings(rank=case.rank),
            max_length=MAX_LENGTH,
            **ALONE | options,
        )
        tokenizer = cast(PreTrainedTokenizerBase, IdTokenizer())
        language_model = case.prompter.load(AutoModelForCausalLM, torch.float32, setting.device)
        prompter = PromptingLLM(language_model, tokenizer, config.prompter)
        backbone = load_backbone(case, setting, quantize, half=half, entered=entered)
        weight = (
            torch.randn(prompter.hidden_size, backbone.hidden_size, device=setting.device) / prompter.hidden_size**0.5
        )
        return PromptEmbedder(config, prompter, LinearAlignment(weight, AlignmentReport(0, None)), backbone)

    return build


def lora(form: Form, dropout: float = 0.0, quantize: Literal["none", "int8"] = "none", *, half: bool = False) -> Build:
    """The peer in one of its forms; it reads the instruction before queries where the batch is instructed."""

    def build(case: Case, instructed: bool, setting: Setting) -> Embedder:
        config = LoraBaselineConfig(
            lora=LoraSettings(rank=case.rank, alpha=64, dropout=dropout),
            form=form,
            quantize=quantize,
            templates=Templates() if instructed else Templates(query=BARE),
            max_length=MAX_LENGTH,
        )
        return LoraEmbedder(config, load_backbone(case, setting, half=half))

    return build


PUBLISHED_DROPOUT = 0.1
"""Of (a) and (b), the published recipe; the best LoRA we can build, and our reader, do without."""
BOTH = "instruction_and_text"
PREFIX: dict[str, Any] = {"layout": "prefix", "pooling": "mean_text", "lens_rank": 0}
WEIGHTED = prompt_embedder(reader="activated_lora", skip="weighted")
ENTERED = prompt_embedder(entered=True, reader="activated_lora", skip="weighted")
"""The recipes' default."""
VARIANTS = {
    "lora-padded": Variant(title="(a) LoRA, padded, SDPA", build=lora("padded", PUBLISHED_DROPOUT)),
    "lora-checkpointed": Variant(
        title="(b) LoRA, padded, activation checkpointing", build=lora("checkpointed", PUBLISHED_DROPOUT)
    ),
    "lora-packed": Variant(title="(c) LoRA, packed, no padding", build=lora("packed")),
    "lora-packed-compiled": Variant(title="(c) LoRA, packed, compiled", build=lora("packed"), compiled=True),
    "lora-packed-int8": Variant(
        title="(c) LoRA, packed, frozen weights in int8 forward", build=lora("packed", quantize="int8")
    ),
    "lora-packed-half": Variant(
        title="(c) LoRA, packed, the lower half of the layers", build=lora("packed", half=True)
    ),
    "lora-cached": Variant(title="(c) LoRA, packed, representations cached in 4 parts", build=lora("packed"), parts=4),
    "pe-suffix": Variant(title="PE, suffix", build=prompt_embedder()),
    "pe-suffix-reader": Variant(title="PE, suffix, reader", build=prompt_embedder(reader="activated_lora")),
    "pe-suffix-weighted": Variant(title="PE, suffix, reader, weighted skip", build=WEIGHTED),
    "pe-suffix-weighted-launched": Variant(
        title="PE, suffix, reader, weighted skip, without CUDA graphs", build=WEIGHTED, graphs=False
    ),
    "pe-suffix-weighted-compiled": Variant(
        title="PE, suffix, reader, weighted skip, compiled", build=WEIGHTED, compiled=True
    ),
    "pe-suffix-weighted-int8": Variant(
        title="PE, suffix, reader, weighted skip, texts read in int8",
        build=prompt_embedder(quantize="int8", reader="activated_lora", skip="weighted"),
    ),
    "pe-suffix-weighted-stored": Variant(
        title="PE, suffix, reader, weighted skip, texts read before (store)", build=WEIGHTED, stored=True
    ),
    "pe-suffix-weighted-entered": Variant(
        title="PE, suffix, reader, weighted skip, soft tokens enter at a third of the layers", build=ENTERED
    ),
    "pe-suffix-weighted-entered-stored": Variant(
        title="PE, suffix, reader, weighted skip, soft tokens enter at a third, texts read before",
        build=ENTERED,
        stored=True,
    ),
    "pe-suffix-weighted-half": Variant(
        title="PE, suffix, reader, weighted skip, the lower half of the layers",
        build=prompt_embedder(half=True, reader="activated_lora", skip="weighted"),
    ),
    "pe-suffix-text": Variant(title="PE, suffix, text read", build=prompt_embedder(conditioning=BOTH)),
    "pe-prefix": Variant(title="PE, prefix", build=prompt_embedder(**PREFIX)),
    "pe-prefix-text": Variant(title="PE, prefix, text read", build=prompt_embedder(**PREFIX, conditioning=BOTH)),
    "pe-suffix-weighted-ahead": Variant(
        title="PE, suffix, reader, weighted skip, texts read ahead", build=WEIGHTED, ahead=True
    ),
}
BASELINE = "lora-padded"
COMPILED_FORMS = 64
"""Compiled forms of one function, at most: a norm has one for each rank and size of its input, with gradient or not."""


def default_variants(device: str) -> tuple[str, ...]:
    """All of them; on a CPU without the compiled ones, slower there (`LOG.md`), and what only a GPU gains from."""
    return tuple(name for name, variant in VARIANTS.items() if device != "cpu" or variant.is_for_cpus)


def compile_parts(model: nn.Module) -> None:
    """Compile a decoder's norms and MLPs in place; they are the same code in every layer, so a few graphs serve all."""
    torch._dynamo.config.recompile_limit = COMPILED_FORMS
    for name, module in model.named_modules():
        if name.endswith(("mlp", "norm")):
            module.compile()
