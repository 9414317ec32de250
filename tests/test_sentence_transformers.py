"""A saved embedder through sentence-transformers, as its users call and train it."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from pe.config import BackboneConfig, LossConfig, ModelConfig, PrompterConfig, SideTemplates, TemplatesConfig
from pe.data.batches import Batch
from pe.losses import backward
from pe.model import Instruction, PromptEmbedder, Requests
from tests.embedders import relative_error
from tests.training import accelerator

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

from pe.integrations.sentence_transformers import PromptModule, pop_dtype

TEXTS = ["the river", "moon", "a much longer text about bread and honey", ""]
TASK = "Find the same thing"


@pytest.fixture(scope="module")
def embedder(tiny_models: Path) -> PromptEmbedder:
    torch.manual_seed(0)
    return PromptEmbedder.from_config(
        ModelConfig(
            prompter=PrompterConfig(model=str(tiny_models / "prompter"), soft_tokens=3),
            backbone=BackboneConfig(model=str(tiny_models / "one")),
            templates=TemplatesConfig(document=SideTemplates(prompter="{instruction}: a document")),
            reader="activated_lora",
            skip="weighted",
            max_length=40,
        )
    ).eval()


@pytest.fixture(scope="module")
def saved(embedder: PromptEmbedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    embedder.save_pretrained(folder)
    return folder


def load(folder: Path, **options: object) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", trust_remote_code=True, **options)  # type: ignore[arg-type]


def test_a_saved_embedder_encodes_both_sides(saved: Path, embedder: PromptEmbedder) -> None:
    model = load(saved)
    for encode, side in ((model.encode, "query"), (model.encode_query, "query"), (model.encode_document, "document")):
        expected = embedder.encode(TEXTS, instruction=TASK, side=side)  # type: ignore[arg-type]
        got = encode(TEXTS, prompt=TASK, batch_size=3)
        assert np.allclose(got, expected, atol=1e-6), encode
    assert np.allclose(model.encode(TEXTS[0], prompt=TASK), embedder.encode(TEXTS[:1], instruction=TASK)[0], atol=1e-6)
    assert not np.allclose(model.encode_query(TEXTS, prompt=TASK), model.encode_document(TEXTS, prompt=TASK), atol=1e-3)
    assert model.get_embedding_dimension() == embedder.dimensions
    assert model.similarity_fn_name == "cosine"
    assert "'skip': 'weighted'" in repr(model)
    assert model.encode([], prompt=TASK).size == 0
    inner = model[0].embedder
    assert np.allclose(inner.encode(TEXTS, instruction=TASK), embedder.encode(TEXTS, instruction=TASK), atol=1e-6)


def test_instructions_by_name(saved: Path, embedder: PromptEmbedder) -> None:
    model = load(saved, prompts={"query": TASK, "other": "Another task"}, default_prompt_name="query")
    assert np.allclose(model.encode(TEXTS), embedder.encode(TEXTS, instruction=TASK), atol=1e-6)
    other = embedder.encode(TEXTS, instruction="Another task")
    assert np.allclose(model.encode(TEXTS, prompt_name="other"), other, atol=1e-6)
    assert model.encode(TEXTS, truncate_dim=8).shape == (4, 8)


def test_what_is_no_text_or_has_no_instruction_is_refused(saved: Path) -> None:
    model = load(saved)
    with pytest.raises(ValueError, match="prompt: expected the instruction"):
        model.encode(TEXTS)
    with pytest.raises(ValueError, match=r"inputs: expected texts, or pairs \(prompt, text\), got tuple"):
        model.encode([("one", "two", "three")], prompt=TASK)
    with pytest.raises(ValueError, match="prompt: expected the instruction to embed under, got none"):
        model.encode([("", "two")])
    with pytest.raises(ValueError, match=r"prompt: expected one sentence for all inputs, got \[.*encode pairs"):
        model.encode(TEXTS, prompt=[TASK] * len(TEXTS))
    with pytest.raises(ValueError, match="inputs: expected a sequence of strings, got a single string"):
        model[0].preprocess("the river", prompt=TASK)
    with pytest.raises(ValueError, match="inputs: expected a sequence of strings, got dict"):
        model[0].preprocess({"a": "b"}, prompt=TASK)
    assert model[0].preprocess(map(str, TEXTS), prompt=TASK)["asked"] == [(TASK, text) for text in TEXTS]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_prompt_for_each_text(saved: Path, embedder: PromptEmbedder, batch_size: int) -> None:
    prompts = [TASK, "Another task", TASK, "A third"]
    found = load(saved).encode(list(zip(prompts, TEXTS, strict=True)), batch_size=batch_size)
    expected = [embedder.encode([text], instruction=prompt)[0] for prompt, text in zip(prompts, TEXTS, strict=True)]
    assert np.allclose(found, expected, atol=1e-6)


def test_texts_are_cut_where_the_user_says(saved: Path, embedder: PromptEmbedder) -> None:
    model, text = load(saved), "the river and the moon " * 3
    assert model.max_seq_length == 40
    whole = model.encode(text, prompt=TASK)
    model.max_seq_length = 5
    cut = model.encode(text, prompt=TASK)
    assert not np.allclose(cut, whole, atol=1e-3)
    prefix = embedder.backbone.text_tokenizer.tokenizer.decode(embedder.backbone.text_tokenizer([text])[0][:5])
    assert np.allclose(cut, embedder.encode([prefix], instruction=TASK)[0], atol=1e-6)
    with pytest.raises(ValueError, match=r"max_seq_length: .* from 1 to 125 .* got 0"):
        model.max_seq_length = 0


def test_saved_again_and_moved(saved: Path, tiny_models: Path, tmp_path: Path) -> None:
    model = load(saved)
    expected = model.encode(TEXTS, prompt=TASK)
    for _ in range(2):
        model.save_pretrained(str(tmp_path / "again"))
    assert np.allclose(load(tmp_path / "again").encode(TEXTS, prompt=TASK), expected, atol=1e-6)
    part = PromptEmbedder.from_pretrained(tmp_path / "again" / "0_PromptModule")
    assert np.allclose(part.encode(TEXTS, instruction=TASK), expected, atol=1e-6)
    copied = load(saved, model_kwargs={"backbone": str(tiny_models / "one")})
    assert np.allclose(copied.encode(TEXTS, prompt=TASK), expected, atol=1e-6)
    with pytest.raises(ValueError, match="content"):
        load(saved, model_kwargs={"backbone": str(tiny_models / "two")})
    with pytest.raises(ValueError, match="prompter: expected none, since"):
        load(saved, model_kwargs={"prompter": str(tiny_models / "prompter")})
    half = load(saved, model_kwargs={"dtype": "bfloat16"})
    assert half[0].embedder.backbone.dtype == torch.bfloat16
    assert np.allclose(half.encode(TEXTS, prompt=TASK), expected, atol=0.05)
    with pytest.raises(
        ValueError, match=r"expected no key but 'backbone', 'prompter' and 'dtype' .*, got 'torch_type'"
    ):
        load(saved, model_kwargs={"torch_type": "bfloat16"})


def test_other_processes_get_a_copy(saved: Path) -> None:
    """A pool of sentence-transformers sends the model to its workers."""
    model = load(saved)
    expected = model.encode(TEXTS, prompt=TASK)
    assert np.allclose(pickle.loads(pickle.dumps(model)).encode(TEXTS, prompt=TASK), expected, atol=1e-6)


def test_an_evaluator_of_sentence_transformers(saved: Path) -> None:
    model = load(saved, prompts={"query": TASK}, default_prompt_name="query")
    texts = [f"{word} {n}" for n, word in enumerate(("river", "moon", "bread", "glass"))]
    scores = [float(a @ b) for a, b in zip(model.encode(texts), model.encode(texts[::-1]), strict=True)]
    evaluator = EmbeddingSimilarityEvaluator(texts, texts[::-1], scores, show_progress_bar=False)
    assert evaluator(model)["spearman_cosine"] == pytest.approx(1.0)


# Without a prompt: what callers that know no prompts do.


INSTRUCTIONS = {"query": TASK, "document": "Be found", "kinds": "Find the kind"}


@pytest.fixture(scope="module")
def trained(embedder: PromptEmbedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that says what it was trained under."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    embedder.instructions = dict(INSTRUCTIONS)
    embedder.save_pretrained(folder)
    embedder.instructions = {}
    return folder


def test_every_default_path_takes_the_instructions_of_training(trained: Path, embedder: PromptEmbedder) -> None:
    """`encode` without a prompt is what LangChain's `embed_documents` and `embed_query` call."""
    model = load(trained)
    assert model.prompts == INSTRUCTIONS
    assert model.default_prompt_name == "query"
    queries = embedder.encode(TEXTS, instruction=TASK)
    documents = embedder.encode(TEXTS, instruction="Be found", side="document")
    assert np.allclose(model.encode(TEXTS), queries, atol=1e-6)
    assert np.allclose(model.encode(TEXTS, show_progress_bar=False, normalize_embeddings=True), queries, atol=1e-6)
    assert np.allclose(model.encode_query(TEXTS), queries, atol=1e-6)
    assert np.allclose(model.encode_document(TEXTS), documents, atol=1e-6)
    scores = model.similarity(model.encode_query(TEXTS), model.encode_document(TEXTS))
    assert np.allclose(scores, queries @ documents.T, atol=1e-5)
    kinds = embedder.encode(TEXTS, instruction="Find the kind")
    assert np.allclose(model.encode(TEXTS, prompt_name="kinds"), kinds, atol=1e-6)


def test_prompts_given_at_load_come_first(trained: Path, embedder: PromptEmbedder) -> None:
    mine = load(trained, prompts={"query": "Mine"})
    assert np.allclose(mine.encode(TEXTS), embedder.encode(TEXTS, instruction="Mine"), atol=1e-6)
    assert mine.prompts == INSTRUCTIONS | {"query": "Mine"}
    kinds = load(trained, default_prompt_name="kinds")
    assert np.allclose(kinds.encode(TEXTS), embedder.encode(TEXTS, instruction="Find the kind"), atol=1e-6)
    with pytest.raises(ValueError, match="prompt: expected the instruction to embed under, got none"):
        load(trained, prompts={"query": "", "document": ""}).encode_document(TEXTS)


def test_what_has_no_prompts_of_its_own_takes_the_embedders(
    trained: Path, embedder: PromptEmbedder, tmp_path: Path
) -> None:
    """Modules put together by hand, and a folder whose instructions are in the recipe beside it alone."""
    documents = embedder.encode(TEXTS, instruction="Be found", side="document")
    made = SentenceTransformer(modules=[PromptModule(PromptEmbedder.from_pretrained(trained))], device="cpu")
    assert (made.prompts, made.default_prompt_name) == (INSTRUCTIONS, "query")
    assert np.allclose(made.encode_document(TEXTS), documents, atol=1e-6)
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    config = json.loads((old / "config.json").read_text(encoding="utf-8"))
    del config["instructions"]
    (old / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sentence_transformers = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    (old / "config_sentence_transformers.json").write_text(json.dumps(sentence_transformers), encoding="utf-8")
    recipe = {"data": [{"path": "x.jsonl", "instruction": TASK, "document_instruction": "Be found"}]}
    (old / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert np.allclose(load(old).encode_document(TEXTS), documents, atol=1e-6)
    mine = load(old, prompts={"query": "Mine"})
    assert mine.prompts == {"query": "Mine", "document": ""}


def test_prompts_go_with_what_sentence_transformers_saves(trained: Path, tmp_path: Path) -> None:
    load(trained).save_pretrained(str(tmp_path / "again"))
    assert load(tmp_path / "again").prompts == INSTRUCTIONS
    assert PromptEmbedder.from_pretrained(tmp_path / "again" / "0_PromptModule").instructions == INSTRUCTIONS


def test_an_evaluator_without_a_prompt(trained: Path, embedder: PromptEmbedder) -> None:
    texts = [f"{word} {n}" for n, word in enumerate(("river", "moon", "bread", "glass"))]
    rows, others = (embedder.encode(side, instruction=TASK) for side in (texts, texts[::-1]))
    evaluator = EmbeddingSimilarityEvaluator(texts, texts[::-1], (rows * others).sum(1), show_progress_bar=False)
    assert evaluator(load(trained))["pearson_cosine"] == pytest.approx(1.0)


@pytest.mark.filterwarnings("ignore:Task name kinds is not valid", "ignore:Some prompts are not in the expected format")
def test_mteb_over_sentence_transformers(trained: Path, embedder: PromptEmbedder) -> None:
    """Symmetric tasks give no prompt at all; retrieval gives those of the sides."""
    mteb = pytest.importorskip("mteb")
    from mteb.mocks.mock_tasks import MockRetrievalTask, MockSTSTask
    from mteb.models import SentenceTransformerEncoderWrapper

    asked: list[Instruction] = []
    model = load(trained)
    encode = model[0].embedder.encode_each

    def noting(requests: Requests) -> np.ndarray:
        asked.extend(requests.instructions)
        return encode(requests)

    model[0].embedder.encode_each = noting  # type: ignore[method-assign]
    tasks = [MockSTSTask(), MockRetrievalTask()]
    done = mteb.evaluate(SentenceTransformerEncoderWrapper(model), tasks, cache=None, show_progress_bar=False)
    assert len(done.task_results) == 2
    assert not done.exceptions
    assert set(asked) == {Instruction(TASK), Instruction("Be found", "document")}


# What sentence-transformers lets through.


@pytest.mark.filterwarnings("ignore:.*has no instructions for bfloat16")
@pytest.mark.parametrize("given", [{"torch_dtype": "bfloat16"}, {"dtype": torch.bfloat16}])
def test_a_type_is_given_as_users_write_it(saved: Path, given: dict[str, object]) -> None:
    assert load(saved, model_kwargs=given)[0].embedder.backbone.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"torch_dtype": torch.float16}, "float16"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": torch.bfloat16, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "auto"}, "auto"),
        ({"dtype": None}, None),
        ({}, None),
    ],
)
def test_names_of_types(given: dict[str, object], expected: str | None) -> None:
    options = {"backbone": "there"} | given
    assert pop_dtype(options) == expected
    assert options == {"backbone": "there"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model_kwargs": {"dtype": "float16", "torch_dtype": torch.bfloat16}},
            "got dtype=float16, torch_dtype=",
        ),
        (
            {"model_kwargs": {"dtype": torch.float64}},
            "dtype: expected one of auto, fastest, float32, .*, got",
        ),
        ({"model_kwargs": {"dtype": 16}}, "dtype: expected one of auto, fastest, float32, bfloat16, float16, got '16'"),
        ({"model_kwargs": {"attn_implementation": "eager"}}, "model_kwargs: expected no key but .* 'attn_implem"),
        ({"model_kwargs": {"device_map": "auto"}}, "model_kwargs: expected no key but .* got 'device_map'"),
        ({"backend": "onnx"}, "backend: expected 'torch', got 'onnx'"),
        ({"backend": "openvino"}, "backend: expected 'torch', got 'openvino'"),
        ({"config_kwargs": {"attn_dropout": 0.1}}, "config_kwargs: expected none, got {'attn_dropout': 0.1}"),
        ({"processor_kwargs": {"padding_side": "left"}}, "processor_kwargs: expected none, got {'padding_side'"),
        ({"tokenizer_kwargs": {"padding_side": "left"}}, "processor_kwargs: expected none, got {'padding_side'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tokenizer_kwargs")
def test_options_that_would_change_nothing_are_refused(saved: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(saved, **options)


def test_empty_options_are_none(saved: Path) -> None:
    model = load(saved, model_kwargs={}, config_kwargs={}, processor_kwargs={}, backend="torch", truncate_dim=8)
    assert model.encode(TEXTS, prompt=TASK).shape == (4, 8)


def test_options_of_encode_that_would_change_nothing(saved: Path) -> None:
    model = load(saved)
    for options, message in (
        ({"output_value": "token_embeddings"}, "output_value: expected 'sentence_embedding', got 'token_embeddings'"),
        ({"processing_kwargs": {"text": {"max_length": 2}}}, "processing_kwargs: expected none, got {'text'"),
        ({"task": "passage"}, "task: expected 'query' or 'document', got 'passage'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(TEXTS, prompt=TASK, **options)  # type: ignore[call-overload]


def test_all_outputs_of_a_text(saved: Path, embedder: PromptEmbedder) -> None:
    rows = load(saved).encode(TEXTS, prompt=TASK, output_value=None)
    got = np.stack([row["sentence_embedding"] for row in rows])
    assert np.allclose(got, embedder.encode(TEXTS, instruction=TASK), atol=1e-6)


def test_a_length_beyond_the_positions_is_refused(saved: Path) -> None:
    """The backbone has 128 positions, of which the prompt takes three."""
    model = load(saved)
    model.max_seq_length = np.int64(125)
    for tokens in (126, 10**6, None, "5", 2.5):
        with pytest.raises(ValueError, match=rf"max_seq_length: .* from 1 to 125 .* got {tokens!r}"):
            model.max_seq_length = tokens
    assert repr(model.max_seq_length) == "125"


# Its trainer.

COLUMNS = {
    "anchor": ["river 1", "which moon is the larger one of two?", "bread", "glass 4"],
    "positive": ["the river", "the moon", "a loaf of bread with honey on it", "glass"],
    "negative": ["a bank", "the sun", "a stone", "a train of thought, or of carriages"],
}
LOSSES = {
    "cached": lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    "plain": MultipleNegativesRankingLoss,
    "matryoshka": lambda model: MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [32, 8]),
}
PROMPTS = {"anchor": "Another task", "positive": "A kind", "negative": "A kind"}
SIDES = {"router_mapping": {"anchor": "query", "positive": "document", "negative": "document"}}


def trainer(model: SentenceTransformer, loss: str, folder: Path, **options: object) -> SentenceTransformerTrainer:
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,  # type: ignore[arg-type]
    )
    data = Dataset.from_dict(COLUMNS)
    return SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=LOSSES[loss](model))


@pytest.mark.parametrize("loss", ["cached", "plain"])
def test_its_trainer_trains_and_what_it_saves_loads(trained: Path, loss: str, tmp_path: Path) -> None:
    model = load(trained)
    before = model.encode(TEXTS)
    training = trainer(model, loss, tmp_path / "out", **SIDES)
    training.train()
    after = model.encode(TEXTS)
    assert np.isfinite(after).all()
    assert not np.allclose(after, before, atol=1e-3)
    model.save_pretrained(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "out" / "checkpoint-2"):
        assert np.allclose(load(folder).encode(TEXTS), after, atol=1e-6)
    part = PromptEmbedder.from_pretrained(tmp_path / "saved" / "0_PromptModule")
    assert np.allclose(part.encode(TEXTS), after, atol=1e-6)
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "'backbone': 'one'" in card
    assert "tokens</li>" in card


@pytest.mark.parametrize(("loss", "prompts"), [("cached", {}), ("plain", PROMPTS), ("matryoshka", {})])
def test_the_gradients_of_its_losses_are_ours(
    trained: Path, loss: str, prompts: dict[str, str], tmp_path: Path
) -> None:
    """A column's instruction is the trainer's, else that of training for its side."""
    model, own = load(trained), PromptEmbedder.from_pretrained(trained)
    training = trainer(model, loss, tmp_path, **SIDES, prompts=prompts)
    features, labels = training.collect_features(next(iter(training.get_train_dataloader())))
    training.loss(features, labels).backward()
    anchors, positives, negatives = ([text for _, text in column["asked"]] for column in features)
    batch = Batch.unlabelled(
        [prompts.get("anchor", TASK)],
        anchors,
        [*positives, *negatives],
        document_instruction=prompts.get("positive", "Be found"),
    )
    sizes = (8,) if loss == "matryoshka" else ()  # theirs is the sum over the sizes, ours the mean
    backward(own, batch, LossConfig(temperature=0.05, matryoshka=sizes), accelerator())
    got = {name: p.grad for name, p in model[0].embedder.named_parameters() if p.grad is not None}
    expected = {name: p.grad * (1 + len(sizes)) for name, p in own.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for part in ("prompter.", "alignment.", "skip.", "backbone."):
        ours, theirs = (torch.cat([g[name].flatten() for name in g if name.startswith(part)]) for g in (expected, got))
        assert ours.norm() > 1e-6, part
        assert relative_error(theirs, ours) < 1e-5, part
