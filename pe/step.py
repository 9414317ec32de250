"""One training step: from a batch's texts to changed weights.

`pe.train.fit` takes these steps, `pe.memory` weighs one (`pe/measure/footprint.py`), `bench.step` times them: what is
measured is what trains.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from pe.config import LossConfig, TrainConfig
from pe.data.batches import Batch
from pe.losses import backward, batch_requests, random_state, set_random_state
from pe.method.ahead import ReadAhead
from pe.method.backbone import Backbone
from pe.method.norm_bound import NormBound
from pe.method.prompted import PromptedEmbedder
from pe.method.requests import Requests, Truncation

Parts = Mapping[str, Sequence[nn.Parameter]]
"""Parameters that train, by the part of the model they are in."""


class TrainingError(RuntimeError):
    """Training that cannot go on: no gradient, unchanged outputs, no memory, or steps that are not finite."""


class Trainable(Protocol):
    """What trains: a PromptEmbedder or a baseline."""

    truncation: Truncation

    @property
    def backbone(self) -> Backbone: ...
    def __call__(self, requests: Requests) -> Tensor: ...
    def tokenized(self, requests: Requests, at_most: int | None = None) -> Requests: ...
    def train(self, mode: bool = True) -> nn.Module: ...
    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]: ...
    def trainable_state(self) -> dict[str, Tensor]: ...
    def load_trainable_state(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a step came to.

    Attributes:
        loss: mean over all processes.
        is_finite: whether loss and gradients are; else the step changed no weight.
        gradient_norm: of all gradients together, before they were clipped; scalar.
        texts, truncated: texts of this process, and how many of them were cut to the token limit.
        tokens, padded: their tokens, and the tokens of the same batch with padding.
    """

    loss: float
    is_finite: bool
    gradient_norm: Tensor
    texts: int
    truncated: int
    tokens: int
    padded: int


class StepTexts:
    """A step's batch and its texts of at most so many tokens, tokenised once: when they are first asked for."""

    def __init__(self, model: Trainable, batch: Batch, at_most: int | None = None) -> None:
        self.model, self.batch, self.at_most = model, batch, at_most
        self.truncated = 0

    @functools.cached_property
    def requests(self) -> Requests:
        """The batch's texts as the model reads them; `truncated` says from then on how many were cut."""
        before = self.model.truncation.cut
        requests = self.model.tokenized(batch_requests(self.batch), self.at_most)
        self.truncated = self.model.truncation.cut - before
        return requests


Model = TypeVar("Model", bound=Trainable)


class Step(Generic[Model]):
    """Takes training steps on a model.

    CUDA graphs, where the options have them, need the weights to stay where they are until `close`.

    Attributes:
        model, loss, options, accelerator: as given.
        parts, parameters: what trains, by part and all together.
        optimizer, scheduler: AdamW with a peak rate for each part, and the schedule of the rates.
        micro_batch_size: queries at a time; None: the whole batch. It halves where memory runs out.
        ahead: reads the next batch's texts beside a step, where the options ask for it and the layout allows it.
    """

    def __init__(
        self,
        model: Model,
        loss: LossConfig,
        options: TrainConfig,
        accelerator: Accelerator,
        *,
        is_tolerant: bool = False,
    ) -> None:
        """Set up the optimiser.

        Args:
            model: trains in place.
            loss: what is trained on.
            options: rates, schedule, clipping, micro batches, reading ahead, graphs.
            accelerator: precision and processes.
            is_tolerant: leave the weights as they are where a step is not finite, and halve the micro batch where the
                memory of the only process runs out; else both are errors.

        Raises:
            TrainingError: no parameter trains.
        """
        self.model, self.loss, self.options, self.accelerator = model, loss, options, accelerator
        self.parts = model.trainable_parameters()
        self.parameters = [parameter for part in self.parts.values() for parameter in part]
        if not self.parameters:
            raise TrainingError("nothing to train: no parameter requires a gradient")
        self.optimizer = adamw(self.parts, options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, functools.partial(rate, options=options))
        self.is_tolerant, self.micro_batch_size = is_tolerant, options.micro_batch_size
        self.ahead: ReadAhead | None = None
        self._following: StepTexts | None = None
        self._bound: NormBound | None = None
        if isinstance(model, PromptedEmbedder):
            if options.norm_bound is not None and model.config.layout == "suffix":
                self._bound = NormBound(model.backbone, options.norm_bound)
            if options.read_ahead and model.config.layout == "suffix" and options.micro_batch_size is None:
                self.ahead = ReadAhead(model, accelerator.autocast)
        self._use_graphs(options.cuda_graphs)

    def close(self) -> None:
        """Let the weights move again, and states grow."""
        self._use_graphs(False)
        if self._bound is not None:
            self._bound.close()

    def _use_graphs(self, wanted: bool) -> None:
        if isinstance(self.model, PromptedEmbedder):
            self.model.use_graphs(wanted)

    @property
    def done(self) -> int:
        """Steps that were taken, those before a checkpoint included."""
        return int(self.scheduler.last_epoch)

    def __call__(self, batch: Batch, following: Batch | None = None) -> Taken:
        """Take one step, and wait until this process's device has done it.

        Args:
            batch: this process's rows.
            following: the batch of the next step, whose texts are read in this one where texts are read ahead.

        Raises:
            TrainingError: the first change of the weights from a loss of 0, or without a gradient for a part; no memory
                for a query at a time; a step that is not finite, unless this is tolerated.
        """
        self.model.train()
        texts = self._texts_of(batch)
        self._following = self._new_texts(following) if self.ahead and following is not None else None
        loss = self.gradients(texts)
        norm, is_finite = self.update(loss)
        lengths = [len(row) for row in texts.requests.read or ()]
        return Taken(
            loss=loss.item(),
            is_finite=is_finite,
            gradient_norm=norm,
            texts=len(lengths),
            truncated=texts.truncated,
            tokens=sum(lengths),
            padded=len(lengths) * max(lengths),
        )

    def _texts_of(self, batch: Batch) -> StepTexts:
        """The batch's texts, tokenised already where the step before was told of this batch."""
        known = self._following
        return known if known is not None and known.batch is batch else self._new_texts(batch)

    def _new_texts(self, batch: Batch) -> StepTexts:
        return StepTexts(self.model, batch, self.options.max_length)

    def gradients(self, texts: StepTexts) -> Tensor:
        """The loss and, in each parameter's `grad`, its gradient; both the mean of all processes, and checked."""
        drawn = random_state()
        while (loss := self._gradients_that_fit(texts)) is None:
            clear_device_cache(garbage_collection=True)
            set_random_state(drawn)
        loss = average(loss, self.parameters, self.accelerator)
        if not self.optimizer.state:
            check(loss, self.parts, self.done)
        return loss

    def _gradients_that_fit(self, texts: StepTexts) -> Tensor | None:
        """The loss of this process; None where memory ran out and smaller micro batches are to be tried."""
        try:
            return backward(
                self._embed, texts.batch, self.loss, self.accelerator, self.micro_batch_size, texts.requests
            )
        except RuntimeError as error:  # a CPU's allocator has none of its own
            is_alone = self.accelerator.num_processes == 1  # the others would wait for what this one repeats
            if not (self.is_tolerant and is_alone and should_reduce_batch_size(error)):
                raise
            self._halve(len(texts.batch.queries), error)
        return None

    def _halve(self, queries: int, error: RuntimeError) -> None:
        """Take half as many queries at a time from now on.

        Raises:
            TrainingError: it is one query already.
        """
        size = min(self.micro_batch_size or queries, queries)
        if size == 1:
            reason = str(error).partition("\n")[0]
            raise TrainingError(
                f"step {self.done + 1}: out of memory with one query at a time ({reason}); give a smaller"
                " model.max_length, loss.hard_negatives or train.batch_size"
            ) from error
        self._save_memory(size // 2)

    def _save_memory(self, size: int) -> None:
        """Take so many queries at a time, without graphs and without texts read ahead, which hold memory."""
        self.micro_batch_size = size
        self.ahead = self._following = None
        self.optimizer.zero_grad(set_to_none=True)
        self._use_graphs(False)

    def _embed(self, requests: Requests) -> Tensor:
        """`[B, D]`; the next batch's texts are begun behind this one's passes, which a GPU has to do yet."""
        if self.ahead is None:
            return self.model(requests)
        embeddings: Tensor = self.ahead.model(self.ahead.take(requests))
        if self._following is not None:
            self.ahead.start(self._following.requests)
        return embeddings

    def update(self, loss: Tensor) -> tuple[Tensor, bool]:
        """Change the weights by their gradients, clipped, and the rates by the schedule.

        Returns:
            the norm before clipping, and whether it and the loss are finite; where not, the weights stay as they are.

        Raises:
            TrainingError: they are not, and this is not tolerated.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.options.clip_norm)
        is_finite = bool(torch.isfinite(loss + norm.to(loss.device)))
        if not is_finite:
            if not self.is_tolerant:
                raise TrainingError(f"step {self.done + 1}: {not_finite(loss.item(), norm)}")
            self.optimizer.zero_grad(set_to_none=True)  # AdamW passes over what has no gradient
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, is_finite

    def start_optimizer(self) -> None:
        """Make the optimiser's state as a first step would, from gradients of zero."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "step": self.done,
            "model": self.model.trainable_state(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "micro_batch_size": self.micro_batch_size,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave; the rates are those of this run's schedule, which may be longer than before."""
        self.model.load_trainable_state(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if (size := state.get("micro_batch_size", self.micro_batch_size)) != self.micro_batch_size:
            self._save_memory(size)
        share = rate(self.done, self.options)
        for group, peak in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = peak * share


def adamw(parts: Parts, options: TrainConfig) -> torch.optim.AdamW:
    """AdamW over one group a part, each with its own peak rate; in its fused form on a GPU.

    Parameters without data (`pe/measure/footprint.py`) are taken one after another: the fused form wants data, and
    needs as little besides the state.
    """
    rates = {name: getattr(options, f"{name}_lr") for name in ("alignment", "reader", "skip", "lens")}
    groups: list[dict[str, Any]] = [
        {"params": group, "lr": options.lr if (own := rates.get(name)) is None else own, "name": name}
        for name, group in parts.items()
    ]
    parameters = [parameter for group in parts.values() for parameter in group]
    has_data = not any(map(is_fake, parameters))
    fused = has_data and parameters[0].device.type == "cuda"
    return torch.optim.AdamW(
        groups, weight_decay=options.weight_decay, fused=fused, foreach=None if has_data else False
    )


def rate(step: int, options: TrainConfig) -> float:
    """Share of the peak rate at a step: linear warm-up, then the schedule down to zero."""
    warm = max(1, round(options.warmup * options.total_steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, options.total_steps - warm)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[options.schedule]


def average(loss: Tensor, parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> Tensor:
    """The loss as the mean of all processes, and in place each gradient."""
    if accelerator.num_processes == 1:
        return loss
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    mean: Tensor = accelerator.reduce(loss.detach(), "mean")
    return mean


def not_finite(loss: float, gradient_norm: Tensor) -> str:
    """What is wrong with a step, and what to do."""
    return (
        f"the loss is {loss:.4g} and the norm of the gradients {gradient_norm.item():.4g}, expected finite numbers;"
        " lower the rates (train.lr and its kin), or check the data"
    )


def check(loss: Tensor, parts: Parts, done: int) -> None:
    """Refuse to begin with a loss of 0, or a part that no gradient reaches.

    Raises:
        TrainingError: what is wrong, after `done` steps, none of which changed a weight.
    """
    if not loss:
        raise TrainingError(
            f"step {done + 1}: the loss is 0, no query has a negative; expected a batch of at least two documents that"
            " differ in text and label (train.batch_size, data)"
        )
    for name, part in parts.items():
        if not any(p.grad is not None and bool(p.grad.any()) for p in part):
            raise TrainingError(f"step {done + 1}: no parameter of the {name} got a gradient; it would not train")
