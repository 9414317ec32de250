"""The frozen embedding LLM: any decoder of transformers, run on packed rows.

Legend: T tokens of a packed row, B texts, D hidden size, K soft tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pe.config import BackboneConfig, LoraSettings, Quantize
from pe.kernels.pool_normalize import Mode, pool_normalize
from pe.kernels.prompt_rows import prompt_rows
from pe.method import attention, probes
from pe.method.adapters import drops, load_saved, lora_config, prepare_adapters
from pe.method.attention import AttentionPlan, KeyValues, LastLayerReached
from pe.method.final_norm import NormOptions, find_final_norm
from pe.method.layers import entering, keep_first_layers, let_pass_below, stacked_layers
from pe.method.loading import (
    TextTokenizer,
    content_of,
    dtype_on,
    embedding_scale,
    load_pretrained,
    warn_of_slow_products,
)
from pe.method.packing import CPU_TOKENS, Segments, neighbours, pack, to_device
from pe.method.quantized import EightBitLinears, usable
from pe.method.rms_norm import fuse_norms, stock_norms
from pe.method.sharded import shard
from pe.method.text_store import TextStore
from pe.method.turns import Turns

READER = "reader"
EXACT_TOKENS = 256
"""Tokens of a pass on a CPU from which on a text's neighbours change no bit of it: products of fewer rows add up in
another order. Seen with MKL in float32: up to 15 rows on one thread; on two up to 192 for sums of 1,536 terms, and 512
for 4,096."""
Pool = Callable[[Tensor, Segments], Tensor]
"""States `[T, D]` of texts -> what is kept of them, such as a row `[B, D]` for each text."""

attention.register()


def position_limit(config: PreTrainedConfig) -> int | None:
    """Tokens up to which a position means the same in every batch; None: any number.

    Learned positions end there; `dynamic` and `longrope` frequencies change there with the longest text of the batch.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return getattr(config, "max_position_embeddings", None)
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    changing = [kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope")]
    return min((kind.get("original_max_position_embeddings") or config.max_position_embeddings for kind in changing),
               default=None)  # fmt: skip


class Backbone(nn.Module):
    """A frozen decoder over packed rows.

    Attributes:
        model: the decoder without its language-model head, in eval mode, `requires_grad_(False)`.
        text_tokenizer: its tokenizer.
        name, revision: what a saved PromptEmbedder refers to.
        entry_layer: the layer that rows behind texts enter at; those below it read texts alone.
        eight_bits: the linear layers that read texts in 8 bits, or None.
        is_sharded: whether each process holds a part of its layers, and all run each at the same time.
        turns: what threads that share it wait for; whoever runs it holds it (see `pe/method/turns.py`).
        text_store: where texts that were read are kept, and looked for first; None: nowhere.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None = None,
        quantize: Quantize = "none",
        mesh: DeviceMesh | None = None,
        entry_layer: int = 0,
    ) -> None:
        """Take over `model`: freeze it, fuse its norms, switch it to packed attention, check that this changes nothing.

        With a mesh of processes each keeps its part of the layers (see `pe/method/sharded.py`).

        Raises:
            UnsupportedBackbone: the architecture keeps state outside attention, the parity probe found a difference, or
                the layers cannot be sharded.
            ValueError: no such `entry_layer`; see `TextTokenizer` and `EightBitLinears`.
        """
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.text_tokenizer = TextTokenizer(tokenizer, len(self.embedding))
        self.name, self.revision, self.turns = name, revision, Turns()
        self.text_store: TextStore | None = None
        self.num_layers: int = model.config.get_text_config().num_hidden_layers
        options = model.config.get_text_config()
        # transformers 5.17's SDPA drops a soft cap in silence
        is_capped = getattr(options, "attn_logit_softcapping", None) is not None
        self.stock_attention: str = "eager" if is_capped else model.config._attn_implementation
        self.position_limit = position_limit(options)
        fuse_norms(self.model)
        self.final_norm = find_final_norm(self.model)
        self.entry_layer = entry_layer
        if entry_layer:
            let_pass_below(self.model, entry_layer, name)
        self.eight_bits = None if quantize == "none" else EightBitLinears(self.model, quantize)
        self.is_sharded = mesh is not None
        if mesh is not None:
            with probes.refused(probes.UnsupportedBackbone, f"{name}: it cannot be sharded", "; train it whole"):
                shard(self.model, self.layers(), mesh)
        self.check_parity()

    @classmethod
    def from_pretrained(cls, config: BackboneConfig, device: torch.device, mesh: DeviceMesh | None = None) -> Backbone:
        """Load by folder or hub name; `trust_remote_code` stays off.

        With a mesh (see `__init__`) each process loads the whole on the CPU, and its part goes to the device.

        Raises:
            FileNotFoundError: neither a folder nor a name that the hub or its cache has.
            UnsupportedBackbone, ValueError: see `__init__` and `load_pretrained`.
        """
        dtype = dtype_on(device, config.dtype)
        if dtype is not None:
            warn_of_slow_products("backbone.dtype", dtype, device)
        model, tokenizer = load_pretrained(AutoModel, config.model, config.revision, dtype or "auto")
        revision = content_of(model, config.model, config.revision)
        if config.layers is not None:
            keep_first_layers(model, config.layers, config.model)
        quantize = usable(config.quantize, device)
        if mesh is None:
            model.to(device)  # type: ignore[arg-type]
        return cls(model, tokenizer, config.model, revision, quantize, mesh, config.entry_layer)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def quantize(self) -> Quantize:
        """What texts are read in, which is not what was asked for where the device has no instructions for it."""
        return "none" if self.eight_bits is None else self.eight_bits.kind

    @property
    def hidden_size(self) -> int:
        return int(self.embedding.shape[1])

    @property
    def embedding(self) -> Tensor:
        """Token embedding `[V, D]`, before `embedding_scale`."""
        return self.model.get_input_embeddings().weight

    @property
    def embedding_scale(self) -> float:
        return embedding_scale(self.model)

    def train(self, mode: bool = True) -> Backbone:
        """The decoder stays in eval mode; only the reader's dropout follows `mode`."""
        super().train(False)
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    def forward(
        self,
        rows: Tensor,
        segments: Segments,
        *,
        context: KeyValues | None = None,
        context_index: Sequence[int] | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, KeyValues | None]:
        """Run a packed row of input embeddings.

        Args:
            rows: `[T, D]`, in the space of the model's `inputs_embeds`.
            segments: the texts of the row.
            context: keys and values that stand before the texts; they see it whole, from the layer where it begins on.
            context_index: segment of `context` for each text; None: text b sees segment b.
            keep: return this pass's own keys and values.

        Returns:
            hidden states `[T, D]` for `pool`, which applies the final norm, and the kept keys and values.
        """
        plan = AttentionPlan(segments, context, keep=keep)
        offsets = context.lengths if context else (0,) * len(segments)
        if context and context_index is not None:
            plan.context_index = to_device(context_index, rows.device)
            offsets = tuple(offsets[i] for i in context_index)
        return self._run(rows, plan, offsets), self._kept(plan)

    def pool(
        self,
        hidden: Tensor,
        segments: Segments,
        mode: Mode = "mean",
        *,
        token_weights: Tensor | None = None,
        normalize: bool = True,
    ) -> Tensor:
        """Final norm, pooling of each text and L2 normalisation of `forward`'s states `[T, D]`: `[B, D]` float32."""
        norm = self.final_norm.options if self.final_norm else NormOptions()
        return pool_normalize(
            hidden,
            segments.cu_seqlens,
            mode=mode,
            token_weights=token_weights,
            normalize=normalize,
            **norm._asdict(),
        )

    @property
    def fingerprint(self) -> str:
        """All that decides, beside its token ids, what the text pass gives for a text: content, types, layers."""
        kind = self.device.type
        computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        above = f", from layer {self.entry_layer}" if self.entry_layer else ""
        return f"{self.revision}, weights {self.dtype} {self._weights}, products {computed}, {self.quantize}{above}"

    @functools.cached_property
    def _weights(self) -> str:
        """A hash of every frozen weight; `revision` reads the ends of large files alone."""
        known = dict(self.model.named_parameters())
        frozen = {name.replace(".base_layer.", "."): p for name, p in known.items() if f".{READER}." not in name}
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = torch.stack([p.contiguous().view(words[p.itemsize]).sum(dtype=torch.int64) for p in frozen.values()])
        return hashlib.blake2b(repr((list(frozen), sums.tolist())).encode(), digest_size=8).hexdigest()

    def read(self, texts: Sequence[Sequence[int]], pool: Pool | None = None, *, exact: bool = False) -> KeyValues:
        """The frozen text pass: each text's keys and values from `entry_layer` on, without gradient and reader.

        The last layer, unless it is sharded, stops at its keys and values: nothing behind them can reach a later token.
        The states that enter it go through `pool`, which may have weights that train; `check_states` says whether they
        can be had. With `exact`, and always with a text store, a small pass on a CPU is filled up to `EXACT_TOKENS`.
        """
        is_cut = self.device.type == "cpu" and not self.is_sharded
        parts = neighbours(texts, CPU_TOKENS) if is_cut else [texts]
        return attention.joined([self._read(part, pool, exact) for part in parts])

    def _read(self, texts: Sequence[Sequence[int]], pool: Pool | None, exact: bool) -> KeyValues:
        if self.text_store is None:
            kept = self.text_pass(texts, pool is not None, exact)
        else:
            text_pass = functools.partial(self.text_pass, with_states=True, exact=True)
            found = self.text_store.through(texts, self.fingerprint, text_pass, self.device)
            kept = dataclasses.replace(found, first=self.entry_layer)
        if pool is None:
            return dataclasses.replace(kept, pooled=None)
        assert kept.pooled is not None
        assert isinstance(kept.segments, Segments)
        return dataclasses.replace(kept, pooled=pool(kept.pooled, kept.segments))

    @contextlib.contextmanager
    def reading_from(self, store: TextStore) -> Iterator[None]:
        """Inside it `read` keeps what it computes in the store and looks there first; `check_states` says if it can."""
        with self.turns.taken():
            store.prepare(self.fingerprint, functools.partial(self.text_pass, with_states=True, exact=False))
            before, self.text_store = self.text_store, store
        try:
            yield
        finally:
            self.text_store = before

    def text_pass(self, texts: Sequence[Sequence[int]], with_states: bool = False, exact: bool = False) -> KeyValues:
        """Keys and values of a packed row and, as `pooled`, the states `[T, D]` that enter the last layer; no store."""
        total = sum(map(len, texts))
        filler = max(0, EXACT_TOKENS - total) if exact and self.device.type == "cpu" else 0
        ids, segments = pack([*texts, *[[0]] * filler], self.device)
        last = None if self.is_sharded else self.num_layers - 1  # a sharded layer lets its weights go when it returns
        plan = AttentionPlan(segments, keep=True, first=self.entry_layer, filler=filler, stop_after=last)
        with torch.no_grad(), self.as_texts_are_read(), self.entering_last_layer(with_states) as states:
            with contextlib.suppress(LastLayerReached):
                self._run(self.token_rows(ids), plan, (0,) * len(segments))
            kept = self._kept(plan)
        assert kept is not None
        own = Segments(segments.lengths[: len(texts)], self.device) if filler else segments
        pooled = attention.compact(states[0][0][:total]) if with_states else None
        return dataclasses.replace(kept, segments=own, pooled=pooled)

    @contextlib.contextmanager
    def entering_last_layer(self, wanted: bool = True) -> Iterator[list[Tensor]]:
        """The states `[1, T, D]` that enter the last layer, in a list that is filled when it is called, if `wanted`."""
        states: list[Tensor] = []
        if not wanted:
            yield states
            return

        def note(_: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
            states.append(entering(arguments, options))

        handle = self.layers()[-1].register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield states
        finally:
            handle.remove()

    def layers(self) -> nn.ModuleList:
        """The decoder's layers, first to last.

        Raises:
            ValueError: they do not stand in one list.
        """
        layers = stacked_layers(self.model)
        if layers is None:
            raise ValueError(f"no list of {self.num_layers} layers")
        return layers

    def token_rows(self, ids: Tensor) -> Tensor:
        """Input embeddings `[T, D]` of token ids `[T]`."""
        return torch.nn.functional.embedding(ids, self.embedding) * self.embedding_scale

    def prompt_rows(self, ids: Tensor, prompts: Tensor, weight: Tensor | None) -> Tensor:
        """Token rows and aligned soft-prompt rows as one packed input (see `kernels/prompt_rows.py`)."""
        return prompt_rows(ids, self.embedding, prompts, weight, scale=self.embedding_scale)

    def check_length(self, tokens: int) -> None:
        """Refuse sequences whose positions the model does not have.

        Raises:
            ValueError: `tokens` of text and prompt are too many.
        """
        if self.position_limit is not None and tokens > self.position_limit:
            raise ValueError(
                f"{self.name}: text and prompt take {tokens} tokens, but its positions are fixed for the first"
                f" {self.position_limit} only (beyond them they are missing, or depend on the longest text of a batch);"
                " lower max_length"
            )

    def _run(self, rows: Tensor, plan: AttentionPlan, offsets: Sequence[int]) -> Tensor:
        return self.decode(rows, self.positions(plan.segments, offsets), plan)

    def positions(self, segments: Segments, offsets: Sequence[int]) -> Tensor:
        """Position `[T] int64` of each token, where `offsets` tokens stand before each text."""
        self.check_length(max(map(sum, zip(offsets, segments.lengths, strict=True)), default=0))
        before = to_device(offsets, self.device).repeat_interleave(
            to_device(segments.lengths, self.device), output_size=segments.total
        )
        return segments.positions + before

    def decode(self, rows: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """States `[T, D]` of a packed row under a plan; nothing in it waits for the device."""
        if self.model.config._attn_implementation != attention.NAME:  # setting it walks through all modules
            self.model.set_attn_implementation(attention.NAME)
        with self.final_norm.left_out() if self.final_norm else contextlib.nullcontext():
            output = self.model(inputs_embeds=rows[None], position_ids=positions[None], use_cache=False, plan=plan)
        return output.last_hidden_state[0]

    def _kept(self, plan: AttentionPlan) -> KeyValues | None:
        return attention.keep_all(plan, self.num_layers) if plan.keep else None

    # The reader: adapters that act in the K-token pass alone.

    def add_reader(self, settings: LoraSettings) -> None:
        """Put LoRA adapters, float32, on every linear layer that rows behind texts run.

        They start as the identity and alone are trainable.
        """
        below = self.layers()[: self.entry_layer] if self.entry_layer else ()
        modules = {module for layer in below for module in layer.modules()}
        passed = [name for name, module in self.model.named_modules() if module in modules]
        self.model.add_adapter(lora_config(settings, exclude=passed), READER)
        prepare_adapters(self.model, READER)
        self.train(self.training)

    def load_reader(self, folder: Path) -> None:
        """Load adapters that `save_pretrained` of the model wrote; they go on training."""
        load_saved(self.model, folder, READER)
        prepare_adapters(self.model, READER)
        self.train(self.training)

    @property
    def has_reader(self) -> bool:
        return READER in getattr(self.model, "peft_config", {})

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random numbers: in the reader, since the decoder stays in eval mode."""
        return any("lora_dropout" in name and drops(module) for name, module in self.model.named_modules())

    def reader_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if f".{READER}." in name]

    @contextlib.contextmanager
    def reader_off(self) -> Iterator[None]:
        """Switch the adapters off; afterwards each is as it was, `requires_grad` of its weights too."""
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, was_off in zip(layers, before, strict=True):
                layer._disable_adapters = was_off

    @contextlib.contextmanager
    def as_texts_are_read(self) -> Iterator[None]:
        """Inside it the decoder is what the frozen text pass runs: no reader, 8 bits if it has them, no gradient."""
        with self.reader_off(), self.eight_bits.acting(self.model) if self.eight_bits else contextlib.nullcontext():
            yield

    # Against the stock model.

    def check_parity(self) -> None:
        """Compare the packed passes with the stock model's (see `pe/method/probes.py`)."""
        probes.check_parity(self)

    def check_states(self) -> None:
        """Compare the states before the last layer with the stock model's (see `pe/method/probes.py`)."""
        probes.check_states(self)

    @torch.no_grad()
    def stock_forward(self, ids: Sequence[int], read: int = 0) -> Tensor:
        """The unchanged model on one sequence `[L, D]`, its first `read` tokens a text, if any.

        A text is read in 8 bits where texts are, and what follows it enters at `entry_layer`.
        """
        self.model.set_attn_implementation(self.stock_attention)
        eight_bits = self.eight_bits.acting(self.model, read) if self.eight_bits and read else contextlib.nullcontext()
        entry = self._entering_behind(read) if self.entry_layer and read else contextlib.nullcontext()
        with stock_norms(self.model), eight_bits, entry:
            return self.model(torch.tensor([list(ids)], device=self.device), use_cache=False).last_hidden_state[0]

    @contextlib.contextmanager
    def _entering_behind(self, read: int) -> Iterator[None]:
        """Inside it the rows behind `read` tokens that enter the first layer enter `entry_layer` once more."""
        rows: list[Tensor] = []

        def note(_: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
            rows.append(entering(arguments, options)[:, read:])

        def put(_: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Tensor]) -> tuple[Any, Any]:
            mixed = torch.cat([entering(arguments, options)[:, :read], rows.pop()], dim=1)
            return ((mixed, *arguments[1:]), options) if arguments else ((), options | {"hidden_states": mixed})

        layers = self.layers()
        handles = [
            layers[place].register_forward_pre_hook(hook, with_kwargs=True)
            for place, hook in ((0, note), (self.entry_layer, put))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
