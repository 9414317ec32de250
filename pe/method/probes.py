"""Probes of a model that is loaded: what it must do on a few tokens before anything relies on it.

A backbone's packed passes are the stock forward, and its states before the last layer can be read; a prompting LLM's
logits are a linear map of its last hidden state, and its padded, cached generation is the plain forward. A model that
fails on the way, other than for memory, is refused as one that differs.

Legend: L tokens of a sequence, T tokens of a packed row, D hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pe.method import attention
from pe.method.flash import PACKAGES, flash_name
from pe.method.packing import Segments, pack
from pe.method.rms_norm import stock_norms
from pe.method.skip import mean_states
from pe.method.token_weights import standardize

if TYPE_CHECKING:
    from pe.method.backbone import Backbone
    from pe.method.prompting import PromptingLLM

PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative difference that a backbone of each type is allowed."""
EIGHT_BITS_TOLERANCE = 1e-2
"""The same where texts are read in 8 bits: of two sums that differ by rounding, one may be rounded to the next of 255
steps.
"""
TOLERANCE = 1e-4
"""The same of a prompting LLM, in float32."""
FAILURES = (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError)
"""What a model raises that does not run as it is asked to."""


class UnsupportedBackbone(ValueError):
    """An architecture whose packed pass is not the stock model's forward."""


class UnsupportedPrompter(ValueError):
    """A language model whose logits are not a linear map of its last hidden state."""


def described(name: str | None, model: PreTrainedModel) -> str:
    return f"{name or 'model'} ({model.config.model_type})"


@contextlib.contextmanager
def refused(kind: type[ValueError], fault: str, cure: str) -> Iterator[None]:
    """Turn a failure of the model, other than a lack of memory, into `kind`: what is wrong, why, and what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise kind(f"{fault} ({type(error).__name__}: {error}){cure}") from error


# Backbones.


def allowed(backbone: Backbone) -> float:
    """Relative difference from the stock model that is rounding."""
    return max(PROBE_TOLERANCE[backbone.dtype], EIGHT_BITS_TOLERANCE if backbone.eight_bits else 0.0)


@torch.no_grad()
def check_parity(backbone: Backbone) -> None:
    """Run two short sequences through the packed passes and through the stock model.

    Raises:
        UnsupportedBackbone: the two differ, or a layer's state does not pass through attention.
    """
    model, device = backbone.model, backbone.device
    architecture = described(backbone.name, model)
    flash = flash_name(device)
    is_package = flash in PACKAGES and backbone.dtype != torch.float32
    by = f" by {flash}, an optional package that may be uninstalled," if is_package else ""
    if getattr(model, "_is_stateful", False):
        raise UnsupportedBackbone(
            f"{architecture}: a recurrent or hybrid decoder keeps state outside attention, which packed texts"
            " would share; use a pure attention decoder (Llama, Qwen3, Mistral, Gemma, ...)"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedBackbone(f"{architecture}: an encoder-decoder; use a decoder (Llama, Qwen3, Mistral, ...)")
    generator = torch.Generator().manual_seed(0)
    vocabulary = backbone.embedding.shape[0]
    texts = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (5, 9)]
    soft = [torch.randint(vocabulary, (3,), generator=generator).tolist() for _ in texts]
    tolerance = allowed(backbone)
    interface = "on rows of embeddings through transformers' attention interface"
    with refused(UnsupportedBackbone, f"{architecture}: it does not run{by} {interface}", "; choose another backbone"):
        whole = [(text + tail, len(text)) for text, tail in zip(texts, soft, strict=True)]
        stock = torch.cat([backbone.stock_forward(ids, read)[-3:] for ids, read in whole])
        ids, segments = pack(soft, device)
        rows, context = backbone.token_rows(ids), backbone.read(texts)
        packed, _ = backbone(rows, segments, context=context)
        packed = backbone.pool(packed, Segments((1,) * segments.total, device), normalize=False)
        backbone(rows.roll(1, 0) + rows, segments, context=context)  # soft tokens are rows of no token
        masks = mask_rules(model, rows[:2])
    if not stock.isfinite().all():
        raise UnsupportedBackbone(
            f"{architecture}: its states on a few tokens are not finite; are its weights? copy or download them again"
        )
    difference = ((packed - stock).float().norm() / stock.float().norm()).item()
    if not difference <= tolerance:
        raise UnsupportedBackbone(
            f"{architecture}: the packed pass{by} differs from the stock forward by {difference:.1e} (allowed"
            f" {tolerance:.0e}); this architecture is not supported"
        )
    for layer, (rule, window) in masks.items():
        if callable(rule) and not attention.is_causal_window(rule, window):
            raise UnsupportedBackbone(
                f"{architecture}: layer {layer} masks more than its attention is told of (window {window}), so long"
                " texts would differ from the stock forward; this architecture is not supported"
            )


def mask_rules(model: PreTrainedModel, rows: Tensor) -> dict[int, tuple[object, int | None]]:
    """Each layer's mask rule in the stock model on rows `[T, D]`, and the window that its attention is told of."""
    seen: dict[int, tuple[object, int | None]] = {}
    model.set_attn_implementation(attention.PROBE)
    model(inputs_embeds=rows[None], use_cache=False, seen=seen)
    return seen


@torch.no_grad()
def check_states(backbone: Backbone) -> None:
    """Compare the mean of a text's states with that of the stock model's states before its last layer.

    Raises:
        UnsupportedBackbone: the two differ, or the states cannot be read.
    """
    ids = list(range(5))
    fault = f"{described(backbone.name, backbone.model)}: its states before the last layer cannot be read"
    cure = ", which a skip needs; use skip: none"
    with refused(UnsupportedBackbone, fault, cure):
        means = backbone.read([ids], mean_states).pooled
        with backbone.reader_off():
            states = _stock_states(backbone, ids).float()
        expected = F.normalize(standardize(states).mean(0, keepdim=True), dim=-1)
        agree = (
            means is not None and means.shape == expected.shape and bool((means - expected).norm() <= allowed(backbone))
        )
    if not agree:
        raise UnsupportedBackbone(f"{fault} (they differ from the stock model's){cure}")


def _stock_states(backbone: Backbone, ids: Sequence[int]) -> Tensor:
    """What enters the stock model's last layer, `[L, D]`, as transformers says it or, of layers that are sharded and
    cannot be copied, as it does.
    """
    if backbone.is_sharded:
        with backbone.entering_last_layer() as states:
            backbone.stock_forward(ids)
        return states[0][0]
    stock = sharing_weights(backbone.model)  # transformers leaves hooks in what it has asked for states
    stock.set_attn_implementation(backbone.stock_attention)
    tokens = torch.tensor([list(ids)], device=backbone.device)
    with backbone.eight_bits.acting(stock) if backbone.eight_bits else contextlib.nullcontext():
        found: Tensor = stock(tokens, use_cache=False, output_hidden_states=True).hidden_states[-2][0]
    return found


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model, hooks and all, that holds the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


# Prompting LLMs.


@contextlib.contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode, its failures refused."""
    was_training = model.training
    model.eval()
    fault = f"{described(model.name_or_path, model)}: it does not generate from rows of embeddings with a cache"
    with refused(UnsupportedPrompter, fault, "; choose another prompting LLM"):
        yield
    model.train(was_training)


@torch.no_grad()
def logit_scale(model: PreTrainedModel) -> float:
    """The constant c of logits = c · h E_outᵀ, found by running a few tokens.

    Raises:
        UnsupportedPrompter: there is no such constant (a soft cap, a bias, no output embedding).
    """
    name = described(model.name_or_path, model)
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        raise UnsupportedPrompter(f"{name}: a recurrent or encoder-decoder model; use a pure attention decoder")
    head = model.get_output_embeddings()
    if head is None or head.weight.shape != model.get_input_embeddings().weight.shape:
        raise UnsupportedPrompter(
            f"{name}: no output embedding of the input embedding's shape; use a causal language model with both"
        )
    ids = torch.arange(4, device=model.device)[None]
    with _generating(model):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        logits, plain = model(ids, use_cache=False).logits.float(), (hidden @ head.weight.T).float()
    scale = ((logits * plain).sum() / (plain * plain).sum()).item()
    error = ((logits - scale * plain).norm() / logits.norm()).item()
    if not math.isfinite(error):
        raise UnsupportedPrompter(f"{name}: its logits are not finite; are its weights those of a diverged training?")
    if not error < TOLERANCE or scale <= 0:
        raise UnsupportedPrompter(
            f"{name}: its logits differ from a linear map of the hidden state by {error:.1e}; a soft cap or a bias on"
            " the logits is not supported in the prompting LLM, choose another one"
        )
    return scale


@torch.no_grad()
def check_generation(prompter: PromptingLLM) -> None:
    """Compare two soft tokens for two requests, padded and cached, with the plain forward of each under the model's own
    norms.

    Raises:
        UnsupportedPrompter: they differ, or the model does not run this way.
    """
    model, requests = prompter.model, [[1, 2, 3, 4, 5], [6, 7, 8]]
    with _generating(model):
        written = prompter.generate(requests, 2)
        with stock_norms(model):
            plain = [_plain_hidden(model, ids, soft[:1]) for ids, soft in zip(requests, written.tokens, strict=True)]
    expected = torch.stack(plain)
    difference = ((written.hidden - expected).norm() / expected.norm()).item()
    if not difference < TOLERANCE:
        raise UnsupportedPrompter(
            f"{described(model.name_or_path, model)}: its padded, cached generation differs from the plain forward by"
            f" {difference:.1e} (allowed {TOLERANCE:.0e}); choose another prompting LLM"
        )


def _plain_hidden(model: PreTrainedModel, ids: Sequence[int], soft: Tensor) -> Tensor:
    """Last hidden states `[2, D]` behind the token ids alone, and behind them and one soft token `[1, D]`."""
    tokens = torch.tensor([list(ids)], device=model.device)
    rows = torch.cat([model.get_input_embeddings()(tokens)[0], soft])
    decoder = model.base_model
    alone = decoder(tokens, use_cache=False).last_hidden_state[0, -1]
    return torch.stack([alone, decoder(inputs_embeds=rows[None], use_cache=False).last_hidden_state[0, -1]])
