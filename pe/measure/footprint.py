"""One training step of a recipe, and the memory of its live tensors: measured, or predicted from configurations alone.

The prediction takes the same step on tensors that have a shape, a type and a device but no data (torch's fake tensors):
the models are built from their `config.json`, the batch is tokenised, and every operation of forward, backward and
optimiser allocates as it would, without computing. What a step needs follows from the architecture, the layout and the
batch by the code that trains, so there are no formulas to keep in step with it and no constants. It leaves out what
torch does not hold in tensors: buffers inside one operation, the allocator's rounding, the CUDA context.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast, get_args

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerBase

from pe.baselines.lora import Form, LoraBaselineConfig, LoraEmbedder
from pe.config import BackboneConfig, PrompterConfig, Recipe, RecipeError
from pe.data.batches import Batch
from pe.losses import batch_requests
from pe.measure.meters import FROZEN, KEY_VALUES, OPTIMISER, TRAINABLE, Footprint, LiveTensors, Phases
from pe.method.alignment import Alignment, AlignmentReport, LinearAlignment, VocabularyAlignment
from pe.method.backbone import Backbone
from pe.method.layers import keep_first_layers
from pe.method.loading import TextTokenizer, dtype_on, load_config, load_tokenizer
from pe.method.prompting import PromptingLLM
from pe.method.quantized import usable
from pe.method.skip import unpooled
from pe.method.text_store import columns_of
from pe.model import PromptEmbedder
from pe.step import Step, StepTexts, Taken
from pe.train import build_accelerator, build_plan

System = Literal["pe", "lora-padded", "lora-checkpointed", "lora-packed"]
SYSTEMS: tuple[System, ...] = get_args(System)
LOOK_AHEAD = 50
"""Steps of the plan among which the batch is looked for."""

Embedder = PromptEmbedder | LoraEmbedder


class _Accelerator(Accelerator):
    """Says when the backward pass begins and ends."""

    def __init__(self, phases: Phases, **options: Any) -> None:
        super().__init__(**options)
        self.phases = phases

    def backward(self, loss: Tensor, **options: Any) -> None:
        self.phases.enter("backward")
        super().backward(loss, **options)
        self.phases.enter("forward")


class MeteredStep(Step[Embedder]):
    """A step of `pe.train` that says what it does, phase by phase.

    Without CUDA graphs and without reading ahead, which hold memory beside the step's own.

    Attributes:
        phases: loaded, forward, backward, optimiser, done.
    """

    def __init__(self, model: Embedder, recipe: Recipe) -> None:
        self.phases = Phases()
        accelerator = _Accelerator(self.phases, mixed_precision=build_accelerator(recipe).mixed_precision)
        options = dataclasses.replace(recipe.train, cuda_graphs=False, read_ahead=False)
        super().__init__(model, recipe.loss, options, accelerator)

    def __call__(self, batch: Batch, following: Batch | None = None) -> Taken:
        taken = super().__call__(batch, following)
        self.phases.enter("done")
        return taken

    def gradients(self, texts: StepTexts) -> Tensor:
        self.phases.enter("forward")
        return super().gradients(texts)

    def update(self, loss: Tensor) -> tuple[Tensor, bool]:
        self.phases.enter("optimiser")
        return super().update(loss)

    def footprint(self, batch: Batch) -> Footprint:
        """Live tensors over one step; call it when the optimiser has its state, as in all steps but the first."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        known: dict[str, list[Tensor]] = {
            FROZEN: [p for p in tensors if not p.requires_grad],
            TRAINABLE: [*self.parameters],
            OPTIMISER: [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)],
        }
        with LiveTensors(known, self.parameters, self.phases) as live, noting_key_values(self.model, live):
            self(batch)
        return live.footprint()


@contextlib.contextmanager
def noting_key_values(model: nn.Module, live: LiveTensors) -> Iterator[None]:
    """Mark the keys and values that the backbone's passes keep (`pe.method.attention.AttentionPlan`)."""

    def note(module: nn.Module, _: object, options: dict[str, Any]) -> None:
        plan = options.get("plan")
        if plan is not None:
            layers = [*plan.stored.values(), *(plan.context.layers if plan.context else ())]
            live.mark(KEY_VALUES, [x for pair in layers for x in pair])

    layers = [module for module in model.modules() if hasattr(module, "layer_idx")]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# Systems and batches.


def lora_of(recipe: Recipe, system: System) -> LoraBaselineConfig:
    """The peer on the recipe's backbone, texts and limit: as published, or packed the best we can build, dropless.

    It reads texts with gradient, so not in 8 bits, and has no soft tokens to enter anywhere.
    """
    form = cast(Form, system.removeprefix("lora-"))
    backbone = dataclasses.replace(recipe.model.backbone, quantize="none", entry_layer=0)
    published = LoraBaselineConfig(backbone=backbone, form=form, max_length=recipe.model.max_length)
    if form != "packed":
        return published
    return dataclasses.replace(published, lora=dataclasses.replace(published.lora, dropout=0.0))


def load(recipe: Recipe, system: System, device: torch.device) -> Embedder:
    """The system with its weights.

    Raises:
        FileNotFoundError, UnsupportedBackbone, UnsupportedPrompter: as in training.
    """
    if system == "pe":
        return PromptEmbedder.from_config(recipe.model, device)
    return LoraEmbedder.from_config(lora_of(recipe, system), device)


def heaviest_batch(recipe: Recipe) -> Batch:
    """Of the recipe's first steps, the batch with the most tokens.

    Raises:
        DataError, FileNotFoundError: no data, or no tokenizer there.
    """
    plan, limit = build_plan(recipe, Console(quiet=True)), recipe.trained_length
    vocabulary = config_of(recipe.model.backbone).get_text_config().vocab_size
    tokenizer = TextTokenizer(tokenizer_of(recipe.model.backbone), vocabulary)

    def tokens(step: int) -> int:
        return sum(min(len(row), limit) for row in tokenizer(batch_requests(plan.batch(step)).texts))

    return plan.batch(max(range(min(LOOK_AHEAD, recipe.train.total_steps)), key=tokens))


def longest_batch(recipe: Recipe) -> Batch:
    """A batch in which every text is as long as training allows, hard negatives included: the most a recipe needs."""
    count, data = recipe.train.batch_size, recipe.data[0] if recipe.data else None
    # No two alike, for what is alike is no negative; at least two tokens a repetition, cut by the model
    texts = [
        f"{number} " + "a b " * recipe.trained_length for number in range(count * (2 + recipe.loss.hard_negatives))
    ]
    return Batch.unlabelled(
        [data.instruction if data else "Retrieve semantically similar text"],
        texts[:count],
        texts[count:],
        document_instruction=data.document_instruction if data else None,
    )


# Models without data.


class _UnprobedBackbone(Backbone):
    """A backbone whose weights have no values, so that no two of its passes can be compared."""

    def check_parity(self) -> None:
        pass

    def check_states(self) -> None:
        pass


class _UnknownNumbers(TorchDispatchMode):
    """Lets the prompting LLM's probes and a step's checks pass: a number read where there is no data is a tiny one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and (args[0].is_meta or isinstance(args[0], FakeTensor)):
            return 1e-9
        return func(*args, **(kwargs or {}))


def config_of(models: BackboneConfig | PrompterConfig) -> Any:
    """The model's `config.json`.

    Raises:
        FileNotFoundError, ValueError: see `load_config`.
    """
    return load_config(models.model, models.revision)


def tokenizer_of(models: BackboneConfig | PrompterConfig) -> PreTrainedTokenizerBase:
    config_of(models)
    return load_tokenizer(models.model, models.revision)


def without_data(recipe: Recipe, system: System, device: torch.device) -> Embedder:
    """The system as `load` builds it, of fake tensors on `device`: nothing is read but configurations and tokenizers.

    Raises:
        FileNotFoundError: no configuration or tokenizer.
    """
    options = recipe.model
    config, tokenizer = config_of(options.backbone), tokenizer_of(options.backbone)
    dtype = dtype_on(device, options.backbone.dtype) or config.get_text_config().dtype or torch.float32
    model: Embedder
    with torch.device("meta"):
        decoder = AutoModel.from_config(config, dtype=dtype)
    if options.backbone.layers is not None:
        keep_first_layers(decoder, options.backbone.layers, options.backbone.model)
    give_norms_values(decoder)
    quantize = usable(options.backbone.quantize, device) if system == "pe" else "none"
    entry_layer = options.backbone.entry_layer if system == "pe" else 0
    name = options.backbone.model
    backbone = _UnprobedBackbone(decoder, tokenizer, name, quantize=quantize, entry_layer=entry_layer)
    with torch.device("meta"), _UnknownNumbers():
        if system != "pe":
            model = LoraEmbedder(lora_of(recipe, system), backbone)
        else:
            language_model = AutoModelForCausalLM.from_config(config_of(options.prompter), dtype=torch.float32)
            prompter = PromptingLLM(language_model, tokenizer_of(options.prompter), options.prompter)
            alignment: Alignment
            if options.alignment.kind == "vocabulary":
                alignment = VocabularyAlignment(prompter, backbone)
            else:
                weight = torch.empty(prompter.hidden_size, backbone.hidden_size)
                alignment = LinearAlignment(weight, AlignmentReport(0, None))
            model = PromptEmbedder(options, prompter, alignment, backbone)
    give_fake_tensors(model, device)
    return model


def give_norms_values(decoder: nn.Module) -> None:
    """Random weights for the norms that stand at the decoder's top: the final one is recognised by what it computes."""
    for module in decoder.children():
        own = list(module.parameters())
        if own and all(parameter.ndim == 1 for parameter in own):
            module.to_empty(device="cpu")
            for parameter in own:
                nn.init.normal_(parameter)


def give_fake_tensors(model: nn.Module, device: torch.device) -> None:
    """Replace every parameter and buffer by a fake tensor of its shape and type on `device`; tied ones stay tied.

    Operations on them are fake; what is made of token ids alone (positions, masks, offsets) stays real, so that code
    which reads those values runs as ever.
    """
    mode, known = FakeTensorMode(allow_non_fake_inputs=True), dict[int, Tensor]()

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            made = torch.empty_like(tensor, device=device)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    for module in model.modules():
        tables: Sequence[dict[str, Any]] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    if id(tensor) not in known:
                        known[id(tensor)] = fake(tensor)
                    table[name] = known[id(tensor)]


def text_store_size(recipe: Recipe, device: torch.device) -> tuple[int, int, int]:
    """Distinct texts of a run, their tokens, and the bytes that a text store takes for each token.

    Raises:
        RecipeError, DataError, FileNotFoundError: no data, configuration or tokenizer; the prefix layout.
    """
    if recipe.model.layout != "suffix":
        raise RecipeError(f"train.text_store: expected the suffix layout, got {recipe.model.layout!r}")
    plan, model = build_plan(recipe, Console(quiet=True)), without_data(recipe, "pe", device)
    assert isinstance(model, PromptEmbedder)
    batches = (batch_requests(plan.batch(step)) for step in range(plan.steps))
    texts = {tuple(ids) for requests in batches for ids in model.readings(requests, recipe.train.max_length)}
    with _UnknownNumbers(), build_accelerator(recipe).autocast():
        entry = columns_of(model.backbone.read([[0]], unpooled), recipe.train.text_store_dtype)
    return len(texts), sum(map(len, texts)), sum(column.width for column in entry)


def estimate(recipe: Recipe, system: System, batch: Batch, device: torch.device) -> Footprint:
    """Live tensors over a step of the recipe, predicted before anything is loaded."""
    torch.manual_seed(recipe.train.seed)
    step = MeteredStep(without_data(recipe, system, device), recipe)
    step.start_optimizer()
    with _UnknownNumbers():
        return step.footprint(batch)
