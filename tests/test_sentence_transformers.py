"""A saved embedder through sentence-transformers, as its users call it."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from pe.config import BackboneConfig, ModelConfig, PrompterConfig, SideTemplates, TemplatesConfig
from pe.model import PromptEmbedder

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

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
            skip="linear",
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
    assert "'skip': 'linear'" in repr(model)
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
    with pytest.raises(ValueError, match="inputs: expected texts, got tuple"):
        model.encode([("one", "two")], prompt=TASK)
    with pytest.raises(ValueError, match="inputs: expected a sequence of strings, got a single string"):
        model[0].preprocess("the river", prompt=TASK)
    with pytest.raises(ValueError, match="inputs: expected a sequence of strings, got dict"):
        model[0].preprocess({"a": "b"}, prompt=TASK)
    assert model[0].preprocess(map(str, TEXTS), prompt=TASK)["texts"] == TEXTS
    with pytest.raises(ValueError, match=r"only encodes; train with `python -m pe.train`"):
        model.train()(model.preprocess(TEXTS, prompt=TASK))


def test_texts_are_cut_where_the_user_says(saved: Path, embedder: PromptEmbedder) -> None:
    model, text = load(saved), "the river and the moon " * 3
    assert model.max_seq_length == 40
    whole = model.encode(text, prompt=TASK)
    model.max_seq_length = 5
    cut = model.encode(text, prompt=TASK)
    assert not np.allclose(cut, whole, atol=1e-3)
    prefix = embedder.backbone.text_tokenizer.tokenizer.decode(embedder.backbone.text_tokenizer([text])[0][:5])
    assert np.allclose(cut, embedder.encode([prefix], instruction=TASK)[0], atol=1e-6)
    with pytest.raises(ValueError, match="max_length"):
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
    half = load(saved, model_kwargs={"dtype": "bfloat16"})
    assert half[0].embedder.backbone.dtype == torch.bfloat16
    assert np.allclose(half.encode(TEXTS, prompt=TASK), expected, atol=0.05)
    with pytest.raises(ValueError, match="expected no key but 'backbone' and 'dtype', got 'torch_type'"):
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
