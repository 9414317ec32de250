"""What a run is made of, as frozen dataclasses that check their values where they are built."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args


class RecipeError(ValueError):
    """A recipe that cannot be used; the message says where, what was expected, what came."""


def _require(condition: bool, name: str, expected: str, got: object, cure: str = "") -> None:
    if not condition:
        raise RecipeError(f"{name}: expected {expected}, got {got!r}{cure}")


def _require_positive(name: str, value: float) -> None:
    _require(0 < value < math.inf, name, "a positive number", value)


Dtype = Literal["auto", "fastest", "float32", "bfloat16", "float16"]
Quantize = Literal["none", "int8", "float8"]
Skip = Literal["none", "weighted"]
StoreDtype = Literal["same", "int8"]
DEFAULT_STEPS = 200
PREFIX_CURE = "; in the prefix layout give pooling: mean_text or last, reader: none and skip: none"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """LoRA adapters on all linear layers: x goes through A and B of rank r, scaled by alpha / r."""

    rank: int = 16
    """r, the inner width of an adapter."""
    alpha: int = 64
    """Numerator of the scale."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are set to zero in training."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "rank", "at least 1", self.rank)
        _require(self.alpha >= 1, "alpha", "at least 1", self.alpha)
        _require(0 <= self.dropout < 1, "dropout", "a value in [0, 1)", self.dropout)


@dataclass(frozen=True, kw_only=True)
class PrompterConfig:
    """The prompting LLM and its continuous relaxation."""

    model: str = "models/tiny-prompter"
    """Folder or hub name of a causal language model, or a GGUF file of one."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null: the main branch."""
    soft_tokens: int = 5
    """K, the soft tokens of a prompt."""
    temperature: float = 1.0
    """T of softmax(logits / T)."""
    trainable: Literal["full", "lora", "none"] = "full"
    """What trains: all weights, LoRA adapters, or nothing; the vocabulary embedding is frozen in all. With nothing,
    each prompt is written once, and the model is saved by its name."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapters of `trainable: lora`."""

    def __post_init__(self) -> None:
        _require(self.soft_tokens >= 1, "prompter.soft_tokens", "at least 1", self.soft_tokens)
        _require_positive("prompter.temperature", self.temperature)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The frozen embedding LLM."""

    model: str = "models/tiny-qwen3"
    """Folder or hub name of a causal decoder, or a GGUF file of one."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null: the main branch."""
    dtype: Dtype = "auto"
    """Type of the frozen weights; auto: the checkpoint's on a GPU, float32 on a CPU. fastest: bfloat16 on a device that
    multiplies matrices of it by instructions of its own (a GPU, a processor with AMX or AVX-512 BF16), else float32."""
    quantize: Quantize = "none"
    """Type of the products in the text pass, which takes no gradient (suffix layout, see `pe/method/quantized.py`); the
    soft tokens behind it run in `dtype`. A device without instructions for it reads unquantised, with a warning."""
    layers: int | None = None
    """N: its first N layers alone, behind them its final norm; null: all."""
    entry_layer: int = 0
    """N: soft tokens enter before layer N, counted from 0, and run it and those above alone (suffix)."""

    def __post_init__(self) -> None:
        _require(self.layers is None or self.layers >= 1, "backbone.layers", "at least 1, or null", self.layers)
        _require(self.entry_layer >= 0, "backbone.entry_layer", "at least 0", self.entry_layer)
        _require(self.dtype in get_args(Dtype), "backbone.dtype", f"one of {', '.join(get_args(Dtype))}", self.dtype)
        kinds = get_args(Quantize)
        _require(self.quantize in kinds, "backbone.quantize", f"one of {', '.join(kinds)}", self.quantize)


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """How soft tokens reach the backbone's input space."""

    kind: Literal["linear", "vocabulary"] = "linear"
    """linear: a d_p x d_e matrix (the paper). vocabulary: no matrix, a mixture of the backbone's own rows."""
    init: Literal["least_squares", "orthogonal"] = "least_squares"
    """Where the matrix starts. least_squares: carries the prompting LLM's rows of the shared tokens to the backbone's.
    orthogonal: random, with the backbone's mean row norm."""
    ridge: float = 1e-3
    """Ridge weight of the least-squares start, relative to the mean eigenvalue of the Gram matrix."""

    def __post_init__(self) -> None:
        _require(0 <= self.ridge < math.inf, "alignment.ridge", "a non-negative number", self.ridge)


@dataclass(frozen=True, kw_only=True)
class SideTemplates:
    """What is read for one side (query or document). `{instruction}` and `{text}` are filled in.

    A special token's name, such as `<|endoftext|>`, is the token in a template, and text in what is filled in.
    """

    prompter: str = "Instruct: {instruction}\nQuery: {text}"
    """Read by the prompting LLM; it ends before `{text}` where it is conditioned on the instruction alone."""
    prefix: str = "Instruct: {instruction}\nQuery:"
    """Read by the backbone before the soft prompt in the prefix layout."""
    text: str = "{text}"
    """Read by the backbone as the text."""

    def __post_init__(self) -> None:
        _require("{text}" in self.text, "templates.text", "a template with {text}", self.text)
        _require("{instruction}" not in self.text, "templates.text", "no {instruction} (texts are shared)", self.text)
        _require("{text}" not in self.prefix, "templates.prefix", "no {text} (it follows the prompt)", self.prefix)
        _require("{instruction}" in self.prompter, "templates.prompter", "a template with {instruction}", self.prompter)
        head = self.prompter.partition("{text}")[0]
        _require("{instruction}" in head, "templates.prompter", "{instruction} before {text}", self.prompter)


@dataclass(frozen=True, kw_only=True)
class TemplatesConfig:
    """What is read for queries, and for documents."""

    query: SideTemplates = field(default_factory=SideTemplates)
    document: SideTemplates = field(default_factory=SideTemplates)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A PromptEmbedder: its parts, and how they work together."""

    prompter: PrompterConfig = field(default_factory=PrompterConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    layout: Literal["suffix", "prefix"] = "suffix"
    """Where the soft prompt stands: after the text (fast), or between instruction and text (the paper), which takes
    `reader: none`, `skip: none` and a pooling of its own."""
    conditioning: Literal["instruction", "instruction_and_text"] = "instruction"
    """What the prompting LLM reads."""
    pooling: Literal["mean_prompt", "last", "mean_text"] = "mean_prompt"
    """mean_prompt: over the K soft-token states (suffix); last: the last token; mean_text: over the text (prefix)."""
    reader: Literal["none", "activated_lora"] = "activated_lora"
    """activated_lora: adapters on the backbone that act in the K-token pass alone (suffix)."""
    reader_lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapters of `reader: activated_lora`."""
    skip: Skip = "weighted"
    """weighted: the mean of the frozen text states, in which each token has a learned weight, goes around the soft
    prompt, through a trained D x D matrix, into the embedding (suffix)."""
    lens_rank: int = 0
    """R, the rank of the matrix by which the hidden state that began a prompt scales the dimensions of its embeddings
    (suffix, see `pe/method/lens.py`); 0: none."""
    max_length: int = 256
    """Tokens of a text, for the backbone and for a prompting LLM that reads it; longer texts are truncated, counted and
    reported. Instructions are always read whole."""
    templates: TemplatesConfig = field(default_factory=TemplatesConfig)

    def __post_init__(self) -> None:
        allowed = ("mean_prompt", "last") if self.layout == "suffix" else ("mean_text", "last")
        cure = PREFIX_CURE if self.layout == "prefix" else ""
        poolings = f"one of {allowed} in the {self.layout} layout"
        _require(self.pooling in allowed, "pooling", poolings, self.pooling, cure)
        if self.layout == "prefix":
            _require(self.reader == "none", "reader", "'none' in the prefix layout", self.reader, cure)
            _require(self.skip == "none", "skip", "'none' in the prefix layout", self.skip, cure)
            _require(self.lens_rank == 0, "lens_rank", "0 in the prefix layout", self.lens_rank)
            quantize, why = self.backbone.quantize, "; there texts stand behind the prompt, and are read with gradient"
            _require(quantize == "none", "backbone.quantize", "'none' in the prefix layout", quantize, why)
            entry, why = self.backbone.entry_layer, "; there texts stand behind the prompt, and see it in every layer"
            _require(entry == 0, "backbone.entry_layer", "0 in the prefix layout", entry, why)
        _require(self.skip in get_args(Skip), "skip", f"one of {', '.join(get_args(Skip))}", self.skip)
        _require(self.lens_rank >= 0, "lens_rank", "0 or more", self.lens_rank)
        _require(self.max_length >= 1, "max_length", "at least 1", self.max_length)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One training set: where it is, and how its rows are read."""

    path: str
    """JSON Lines, JSON, csv or tsv (each also `.xz`, `.gz`), parquet, a folder of `save_to_disk`, or
    `hf://owner/name[:config][@split]`."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """What columns are whose names no layout knows (see `pe/data/layouts.py`): name -> one of a layout, or null, which
    leaves the column out."""
    instruction: str = ""
    """Instruction of the queries whose row has none of its own."""
    document_instruction: str | None = None
    """Instruction of the documents; null: the same as the queries' `instruction`."""
    instruct: str | None = None
    """File of tasks that contradict each other, in place of `instruction`: rows then have both sides of a contradiction
    (see `pe/data/instruct.py`), and wordings are drawn from the file."""
    weight: float = 1.0
    """Share of the training batches, relative to the other sets."""
    query_template: str = "{text}"
    """What a query's text is put into, before the model's own template."""
    document_template: str = "{text}"
    """What a document's text is put into, before the model's own template."""
    positive_from: float | None = None
    """Scored pairs: a pair counts as positive from this score on; required for them."""
    max_rows: int | None = None
    """Use the first rows only."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A record that does not fit stops the run with file and line, or is left out, counted and reported."""

    def __post_init__(self) -> None:
        if self.instruct is None:
            documents = self.document_instruction
            if documents is None or self.instruction:
                cure = "; where every row has its own, give document_instruction alone"
                is_said = bool(self.instruction.strip())
                _require(is_said, f"{self.path}: instruction", "a sentence", self.instruction, cure)
            is_said = documents is None or bool(documents.strip())
            _require(is_said, f"{self.path}: document_instruction", "a sentence, or null for the queries'", documents)
        else:
            for name in ("instruction", "document_instruction", "positive_from", "columns"):
                given = getattr(self, name)
                _require(not given, f"{self.path}: {name}", "none beside `instruct`, whose file has its own", given)
            is_strict = self.on_bad_record == "error"
            _require(is_strict, f"{self.path}: on_bad_record", "'error' beside `instruct`", self.on_bad_record)
        _require_positive(f"{self.path}: weight", self.weight)
        for name in ("query_template", "document_template"):
            _require("{text}" in getattr(self, name), f"{self.path}: {name}", "{text} in it", getattr(self, name))

    @property
    def of_documents(self) -> str:
        """The instruction that documents stand under."""
        return self.instruction if self.document_instruction is None else self.document_instruction

    def query_text(self, text: str) -> str:
        """A query in its template."""
        return self.query_template.replace("{text}", text)

    def document_text(self, text: str) -> str:
        """A document in its template."""
        return self.document_template.replace("{text}", text)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """InfoNCE over in-batch and hard negatives."""

    temperature: float = 0.05
    """What cosine similarities are divided by."""
    hard_negatives: int = 1
    """Hard negatives of a query, at most."""
    counterpart: float = 4.0
    """Weight of each query's preference for its positive over what is right under the contradicting instruction, where
    a data set has one; 0: none."""
    mask_false_negatives: bool = True
    """Leave out in-batch documents with the query's label, its own text or its positive's, and its other positives."""
    matryoshka: tuple[int, ...] = ()
    """Further embedding sizes to train; each is cut, normalised and weighted equally."""

    def __post_init__(self) -> None:
        _require_positive("loss.temperature", self.temperature)
        _require(0 <= self.counterpart < math.inf, "loss.counterpart", "a non-negative number", self.counterpart)
        _require(self.hard_negatives >= 0, "loss.hard_negatives", "0 or more", self.hard_negatives)
        _require(all(d >= 1 for d in self.matryoshka), "loss.matryoshka", "sizes of 1 or more", self.matryoshka)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimiser, schedule, precision, logging."""

    steps: int | None = None
    """Steps of the optimiser; null: 200, or what `epochs` come to. 0, in `pe.transfer` alone: none."""
    epochs: int | None = None
    """In place of `steps`: the steps after which each row of every set has been in at least so many batches; a set with
    more weight than rows is seen more often."""
    batch_size: int = 64
    """Queries of a step (on each process); their positives and hard negatives come on top."""
    micro_batch_size: int | None = None
    """Queries at a time: representations are cached, so the negatives stay those of the whole batch. Each text is read
    twice; in the suffix layout, which keeps little besides keys and values, it pays only where these do not fit."""
    max_length: int | None = None
    """Tokens of a text in training, where they are fewer than `model.max_length`, to which the trained embedder reads;
    null: as many."""
    lr: float = 3e-3
    """Peak rate of the prompting LLM."""
    alignment_lr: float | None = None
    """Peak rate of the alignment matrix; null: lr."""
    reader_lr: float | None = None
    """Peak rate of the reader's adapters; null: lr."""
    skip_lr: float | None = None
    """Peak rate of the skip, its matrix and its tokens' weights; null: lr."""
    lens_lr: float | None = None
    """Peak rate of the lens; null: lr."""
    weight_decay: float = 0.01
    """AdamW's: times the rate, the share of each weight that a step takes away."""
    warmup: float = 0.1
    """Share of the steps in which the rates rise from zero to their peaks."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rates go on from their peaks: to zero in a line or a half cosine, or not at all."""
    clip_norm: float = 1.0
    """Norm of all gradients together above which they are scaled down to it; .inf: never."""
    norm_bound: float | None = 3.0
    """In the suffix layout: how many times as long as a text's tokens usually are, in each layer, the states of soft
    tokens may be made by training (see `pe/method/norm_bound.py`); null: without bound."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on a GPU that has it, else float32."""
    cuda_graphs: bool = True
    """On a GPU, in the suffix layout, without dropout: replay the soft tokens' pass and, for prompts of the instruction
    alone, the prompting LLM's, whose many small kernels a processor launches more slowly than a GPU runs them. Holds
    the gradients and a copy of the texts' keys and values."""
    read_ahead: bool = False
    """In the suffix layout: read the texts of the next batch while this one trains, on a GPU on a stream of its own.
    Takes the keys, values and states of up to two batches more, and a memory pool of its own for the text pass. Without
    effect in the prefix layout and with `micro_batch_size`."""
    shard_backbone: bool = False
    """Of several processes each holds a part of every weight in the frozen backbone's layers, and gathers a layer when
    it runs (FSDP2): for one that does not fit a GPU (see `docs/several-gpus.md`)."""
    text_store: str = "none"
    """Where what the frozen text pass gives for a text is kept, so that it is read once: none; memory, for this run; or
    a folder, for later runs, transfers and encoding too. In the suffix layout (see `docs/text-store.md`)."""
    text_store_gib: float = 8.0
    """Size of the store, in GiB; a full one keeps what it has."""
    text_store_dtype: StoreDtype = "same"
    """same: what is found is what was read. int8: keys and values are rounded, each head of a token with a scale of its
    own, so that a store takes about half of the bytes in bfloat16, a third in float32."""
    seed: int = 0
    """Of fresh weights, batches and dropout."""
    eval_every: int = 0
    """Steps between evaluations while training; 0: only at the end."""
    save_every: int = 100
    """Steps between checkpoints; the last step always makes one."""
    log_every: int = 10
    """Steps between records in the log, each the mean loss since the one before."""
    log_with: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ("tensorboard",)
    """Where records go, all but TensorBoard's of the extra `track`; none: nowhere."""
    keep_checkpoints: int = 2
    """The newest checkpoints that stay, older ones are removed."""
    patience: int | None = None
    """Evaluations without a better score, by `evaluate.best_by`, after which training stops; null: never."""

    def __post_init__(self) -> None:
        _require(self.steps is None or self.steps >= 0, "train.steps", "0 or more", self.steps)
        _require(self.epochs is None or self.epochs >= 1, "train.epochs", "at least 1, or null", self.epochs)
        _require(
            self.max_length is None or self.max_length >= 1, "train.max_length", "at least 1, or null", self.max_length
        )
        both = self.steps is not None and self.epochs is not None
        _require(not both, "train.steps", "null beside `epochs`, which say how many", self.steps)
        _require(self.patience is None or self.patience >= 1, "train.patience", "at least 1, or null", self.patience)
        for name in ("batch_size", "save_every", "log_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"train.{name}", "at least 1", getattr(self, name))
        _require(0 <= self.warmup <= 1, "train.warmup", "a share in [0, 1]", self.warmup)
        for name in ("eval_every", "seed"):
            _require(getattr(self, name) >= 0, f"train.{name}", "0 or more", getattr(self, name))
        _require(self.seed < 2**32, "train.seed", "less than 2^32", self.seed)
        _require(bool(self.text_store.strip()), "train.text_store", "none, memory or a folder", self.text_store)
        _require_positive("train.text_store_gib", self.text_store_gib)
        if self.shard_backbone:
            why = "with train.shard_backbone, whose processes run each layer at the same time"
            _require(self.text_store == "none", "train.text_store", f"'none' {why}", self.text_store)
            _require(self.micro_batch_size is None, "train.micro_batch_size", f"null {why}", self.micro_batch_size)
            _require(not self.read_ahead, "train.read_ahead", f"false {why}", self.read_ahead)
        kinds = get_args(StoreDtype)
        _require(
            self.text_store_dtype in kinds,
            "train.text_store_dtype",
            f"one of {', '.join(kinds)}",
            self.text_store_dtype,
        )
        _require_positive("train.lr", self.lr)
        for name in ("alignment_lr", "reader_lr", "skip_lr", "lens_lr"):
            own = getattr(self, name)
            _require(own is None or 0 <= own < math.inf, f"train.{name}", "a non-negative number, or null", own)
        decay = self.weight_decay
        _require(0 <= decay < math.inf, "train.weight_decay", "a non-negative number", decay)
        _require(self.clip_norm > 0, "train.clip_norm", "a positive number", self.clip_norm)
        bound = self.norm_bound
        _require(bound is None or 1 <= bound < math.inf, "train.norm_bound", "at least 1, or null", bound)
        micro = self.micro_batch_size
        _require(micro is None or micro >= 1, "train.micro_batch_size", "at least 1, or null", micro)

    @property
    def total_steps(self) -> int:
        """The steps, which `epochs` alone do not say: `pe.train` turns those into steps once it knows the data."""
        if self.epochs is not None:
            raise RecipeError(
                f"train.steps: expected a number of steps, got {self.epochs} epochs; only pe.train has these"
            )
        return DEFAULT_STEPS if self.steps is None else self.steps


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What a run is scored on."""

    tasks: tuple[str, ...] = ()
    """Names of `pe.data.tasks` or of MTEB, or paths of your own: a file of pairs or scored pairs, or a folder with
    corpus, queries and qrels (see `pe/data/own_tasks.py`); none: no scores."""
    best_by: str | None = None
    """A task, or `mean`: the weights with the best score are saved, of those every `train.eval_every` steps and the
    last ones; null: the last ones."""
    data: str = "data"
    """Folder of the offline tasks' files."""
    instructions: dict[str, str] = field(default_factory=dict)
    """Query-side instruction of a task, where it differs from the task's own; your own tasks need one. `NAME-document`:
    that of its documents."""
    batch_tokens: int = 16_384
    """Tokens that the backbone reads at once, at most; a longer text is read alone."""
    before: bool = True
    """In `pe.train`: score the frozen backbone and the untrained embedder, too."""

    def __post_init__(self) -> None:
        _require(self.batch_tokens >= 1, "evaluate.batch_tokens", "at least 1", self.batch_tokens)
        known = [*self.tasks, "mean"] if self.tasks else []
        among = f"one of {', '.join(known)}" if known else "null without evaluate.tasks"
        _require(self.best_by is None or self.best_by in known, "evaluate.best_by", among, self.best_by)
        for name, sentence in self.instructions.items():
            _require(bool(sentence.strip()), f"evaluate.instructions: {name}", "a sentence", sentence)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a training run is made of."""

    output: str = "runs/tiny"
    """Folder of the run: checkpoints, model, logs, resolved recipe."""
    license: str | None = None
    """What the card says of the trained embedder, an identifier of the hub such as `apache-2.0`; null: the licence of
    its models, where their own cards name one and the same."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: list[DatasetConfig] = field(default_factory=list)
    """The training sets; each step's batch is from one of them."""
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        best, train = self.evaluate.best_by, self.train
        _require(self.license is None or bool(self.license.strip()), "license", "an identifier, or null", self.license)
        _require(bool(self.output.strip()), "output", "the name of a folder", self.output)
        _require(best is None or train.eval_every > 0, "train.eval_every", "1 or more with evaluate.best_by", 0)
        is_used = train.patience is None or best is not None
        _require(is_used, "train.patience", "null without evaluate.best_by", train.patience)
        if train.max_length is not None:
            fits, most = train.max_length <= self.model.max_length, f"at most model.max_length, {self.model.max_length}"
            _require(fits, "train.max_length", f"{most}, or null", train.max_length)
            is_read, why = self.model.conditioning != "instruction", "; what the prompting LLM reads is not cut by it"
            expected = "null with conditioning: instruction_and_text"
            _require(not is_read, "train.max_length", expected, train.max_length, why)
        if train.shard_backbone:
            quantize, layout = self.model.backbone.quantize, self.model.layout
            _require(quantize == "none", "backbone.quantize", "'none' with train.shard_backbone", quantize)
            entry = self.model.backbone.entry_layer
            _require(entry == 0, "backbone.entry_layer", "0 with train.shard_backbone", entry)
            why = "; in the prefix layout gradients reach a layer's keys past its output, while it is not whole"
            _require(layout == "suffix", "layout", "'suffix' with train.shard_backbone", layout, why)

    @property
    def trained_length(self) -> int:
        """Tokens of a text in training."""
        return self.model.max_length if self.train.max_length is None else self.train.max_length


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no known name is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain YAML-ready values."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
