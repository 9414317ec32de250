"""Contrastive loss of a batch, and its gradient with as little memory as asked for.

Legend: B queries, N documents, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from pe.config import LossConfig
from pe.data.batches import Batch, BatchPlan
from pe.kernels.info_nce import info_nce
from pe.method.packing import to_device
from pe.method.requests import Instruction, Requests

Embed = Callable[[Requests], Tensor]
"""Requests -> embeddings `[B + N, D]`."""


def batch_requests(batch: Batch) -> Requests:
    """The queries and then the documents of a batch, each side under its instruction."""
    instructions = [Instruction(text, "query") for text in batch.instructions]
    texts = [*batch.queries, *batch.documents]
    index = batch.asked + [len(instructions)] * len(batch.documents)
    return Requests(texts, [*instructions, Instruction(batch.document_instruction, "document")], index)


def instructions_of(plan: BatchPlan) -> list[Instruction]:
    """Every instruction that a batch of the plan may have, each once."""
    found: dict[Instruction, None] = {}
    for dataset in plan.datasets:
        found |= dict.fromkeys(Instruction(text, "query") for text in dataset.wordings)
        found[Instruction(dataset.document_instruction, "document")] = None
    return list(found)


def contrastive_loss(embeddings: Tensor, batch: Batch, config: LossConfig, accelerator: Accelerator) -> Tensor:
    """Mean InfoNCE over embedding sizes, scalar.

    Args:
        embeddings: `[B + N, D]` of `batch_requests(batch)`.
        batch: this process's rows; the documents of all processes are negatives of every query.
        config: temperature, masks, Matryoshka sizes.
        accelerator: knows the other processes.

    Raises:
        ValueError: a Matryoshka size above D.
    """
    size = embeddings.shape[-1]
    if too_large := [m for m in config.matryoshka if m > size]:
        raise ValueError(f"loss.matryoshka: expected sizes up to {size}, the backbone's width, got {too_large}")
    count, device = len(batch.queries), embeddings.device
    query_ids, labels, sides = (
        to_device(torch.from_numpy(x), device) for x in (batch.query_ids, batch.labels, batch.sides)
    )
    ids, document_labels = (
        to_device(torch.from_numpy(x), device) for x in (batch.document_ids, batch.document_labels.T)
    )
    labels = torch.where(labels < 0, query_ids, labels)  # another positive of a query is none of its negatives
    document_labels = document_labels.index_put((torch.arange(count, device=device), sides), labels)
    queries, documents, first = embeddings[:count], embeddings[count:], 0
    if accelerator.num_processes > 1:
        documents, first = gather_rows(documents, accelerator)
        ids, _ = gather_rows(ids, accelerator)
        document_labels, _ = gather_rows(document_labels, accelerator)
    masked = config.mask_false_negatives
    positive = torch.arange(first, first + count, device=device)
    losses = []
    for side, labels_of_side in enumerate(document_labels.unbind(1)):
        own = to_device(torch.from_numpy(np.flatnonzero(batch.sides == side)), device)
        losses += [
            info_nce(
                cut(queries[own], width),
                cut(documents, width),
                positive[own],
                temperature=config.temperature,
                query_ids=query_ids[own] if masked else None,
                doc_ids=ids if masked else None,
                query_labels=labels[own] if masked else None,
                doc_labels=labels_of_side.contiguous() if masked else None,
            )
            for width in (size, *config.matryoshka)
        ]
    return torch.stack(losses).mean()


def counterpart_loss(embeddings: Tensor, batch: Batch, temperature: float) -> Tensor:
    """How much a query prefers what is right under the contradicting instruction; scalar, 0 where nothing contradicts.

    -log softmax over two documents alone, the query's positive and its counterpart: among all documents of a batch the
    subject decides, and what an instruction changes is hardly learned.

    Args:
        embeddings: `[B + N, D]` of `batch_requests(batch)`.
        batch: whose `counterparts` are not -1 where there is one.
        temperature: what cosine similarities are divided by.
    """
    places = np.flatnonzero(batch.counterparts >= 0)
    if not len(places):
        return embeddings.new_zeros(())
    count, device = len(batch.queries), embeddings.device
    queries, right, wrong = (
        embeddings[to_device(torch.from_numpy(rows), device)]
        for rows in (places, count + places, count + batch.counterparts[places])
    )
    return F.softplus((queries * (wrong - right)).sum(-1) / temperature).mean()


def cut(embeddings: Tensor, width: int) -> Tensor:
    """The first `width` values of unit vectors `[B, D]`, of unit length again."""
    if width == embeddings.shape[-1]:
        return embeddings.contiguous()
    return F.normalize(embeddings[:, :width], dim=-1)


def gather_rows(rows: Tensor, accelerator: Accelerator) -> tuple[Tensor, int]:
    """The rows of all processes in their order, with gradient, and the place of this process's first.

    Processes may hold different numbers of rows.
    """
    counts = accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    filled = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, max(counts) - len(rows))).contiguous()
    parts = _Gather.apply(filled)
    together = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return together, sum(counts[: accelerator.process_index])


def weight_of(queries: int, accelerator: Accelerator) -> float:
    """What the loss of a process with so many queries counts for in the mean over processes: 1 where all have as many.

    Of every side a process has as many queries as of another, so one weight is right for each side's mean.
    """
    if accelerator.num_processes == 1:
        return 1.0
    counts = accelerator.gather(torch.tensor([queries], device=accelerator.device))
    return queries * len(counts) / int(counts.sum())


class _Gather(torch.autograd.Function):
    """Equal shards of all processes, `[P, ...]`; a shard's gradient is the sum over the processes that used it."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor) -> Tensor:
        parts = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, shard)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient[torch.distributed.get_rank()]


def backward(
    embed: Embed,
    batch: Batch,
    config: LossConfig,
    accelerator: Accelerator,
    micro_batch_size: int | None = None,
    requests: Requests | None = None,
) -> Tensor:
    """Loss of a batch, with its gradient added to the parameters; the processes' mean is that of all their queries.

    With a micro batch size the representations are cached (see `cached_backward`), so that memory holds one micro
    batch's activations while the negatives stay those of the whole batch.

    Args:
        embed: requests to embeddings.
        batch: this process's rows.
        config: see `contrastive_loss`.
        accelerator: precision and processes.
        micro_batch_size: queries of a micro batch; None: the whole batch at once.
        requests: `batch_requests(batch)` where they are tokenised already.
    """
    requests = batch_requests(batch) if requests is None else requests

    def loss_of(embeddings: Tensor) -> Tensor:
        loss = contrastive_loss(embeddings, batch, config, accelerator)
        if config.counterpart:
            loss = loss + config.counterpart * counterpart_loss(embeddings, batch, config.temperature)
        return loss * weight_of(len(batch.queries), accelerator)

    if micro_batch_size is None or micro_batch_size >= len(batch.queries):
        with accelerator.autocast():
            loss = loss_of(embed(requests))
        accelerator.backward(loss)
        return loss.detach()
    size = micro_batch_size * len(requests.texts) // len(batch.queries)
    return cached_backward(embed, requests, size, loss_of, accelerator.autocast, accelerator.backward)


def cached_backward(
    embed: Embed,
    requests: Requests,
    size: int,
    loss_of: Callable[[Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
    backward: Callable[[Tensor], None],
) -> Tensor:
    """Loss of all requests, its gradient added with `size` texts in memory at a time (GradCache, arXiv 2101.06983).

    1. embed every part without gradient, remembering the random state,
    2. loss of all embeddings, and its gradient with respect to them,
    3. embed every part again, with gradient and the same random state, and hand that gradient on.

    Args:
        embed: requests to embeddings, a row a text.
        requests: the texts.
        size: texts of a part.
        loss_of: scalar loss of the embeddings of all requests.
        autocast: a new context of the step's precision.
        backward: what takes the place of `Tensor.backward`.
    """
    parts = list(chunks(len(requests.texts), size))
    states, cached = [], []
    for part in parts:  # 1
        states.append(random_state())
        with torch.no_grad(), autocast():
            cached.append(embed(requests.part(part)))
    embeddings = torch.cat(cached).requires_grad_()
    with autocast():  # 2
        loss = loss_of(embeddings)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    after = random_state()
    for part, state in zip(parts, states, strict=True):  # 3
        set_random_state(state)
        with autocast():
            again = embed(requests.part(part))
        backward((again * gradient[part.start : part.stop]).sum())
    set_random_state(after)
    return loss.detach()


def chunks(count: int, size: int) -> Iterator[range]:
    for first in range(0, count, size):
        yield range(first, min(first + size, count))


def random_state() -> list[Tensor]:
    """The states of torch's random generators: the CPU's, then every GPU's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


def set_random_state(states: Sequence[Tensor]) -> None:
    """Put back what `random_state` gave, as far as there are GPUs here."""
    cpu, *gpus = (state.cpu() for state in states)
    torch.set_rng_state(cpu)
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(gpus[: torch.cuda.device_count()])
