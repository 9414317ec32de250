"""`python -m pe.export`: stock libraries give what `encode` gives, or the target is refused."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from pe import export
from pe.config import BackboneConfig, ModelConfig, PrompterConfig, SideTemplates, TemplatesConfig
from pe.integrations import vllm_client
from pe.model import Instruction, PromptEmbedder
from pe.runs.recipes import load_recipe

SCRIPT = str(Path(__file__).parent.parent / "scripts" / "check_vllm.py")
CHECK = runpy.run_path(SCRIPT)
TEXTS = ["the river", "a longer text about bread and honey by the other bank", "<|end|> is text", ""]
TASK = "Find the same thing"
VLLM = {"pooling": "last", "reader": "none", "skip": "none"}
TEMPLATES = TemplatesConfig(document=SideTemplates(prompter="{instruction}: {text}", text="passage: {text}"))
PREFIX = {"layout": "prefix", "pooling": "mean_text", "reader": "none", "skip": "none"}


Save = Callable[..., tuple[PromptEmbedder, Path]]


@pytest.fixture(scope="module")
def save(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Save:
    """What gives an untrained embedder of some options and its folder, each made once."""
    made: dict[str, tuple[PromptEmbedder, Path]] = {}

    def saved(backbone: str = "two", **options: Any) -> tuple[PromptEmbedder, Path]:
        key = repr((backbone, options))
        if key not in made:
            torch.manual_seed(0)
            config = ModelConfig(
                prompter=PrompterConfig(model=str(tiny_models / "prompter"), soft_tokens=3),
                backbone=BackboneConfig(model=str(tiny_models / backbone)),
                **({"max_length": 24, "templates": TEMPLATES} | options),
            )
            model, folder = PromptEmbedder.from_config(config).eval(), tmp_path_factory.mktemp("saved") / "model"
            model.instructions = {"query": TASK, "other": "Find the opposite"}
            model.save_pretrained(folder)
            made[key] = model, folder
        return made[key]

    return saved


def run(model: Path, output: Path, to: str, *arguments: str) -> Path:
    export.main([str(model), str(output), "--to", to, *arguments])
    return output


def close(got: Tensor, expected: Any) -> bool:
    return bool(np.abs(F.normalize(got, dim=-1).numpy() - expected).max() < 2e-6)


@pytest.mark.parametrize(("backbone", "options"), [("one", VLLM), ("two", VLLM), ("one", PREFIX | {"pooling": "last"})])
def test_vllm_rows_in_one_pass_of_transformers(
    backbone: str, options: dict[str, str], save: Save, tmp_path: Path
) -> None:
    model, saved = save(backbone, **options)
    folder = run(saved, tmp_path / "vllm", "vllm", "--side=document", "--instruction=any thing")
    client = runpy.run_path(str(folder / "client.py"))
    prompt = client["load_prompt"](folder / "prompt.safetensors")
    tokenizer, stock = client["stock"](prompt.about)
    rows = client["prompt_embeds"](TEXTS, prompt, tokenizer, stock.get_input_embeddings())
    got = CHECK["one_pass"](stock, rows)
    assert close(got, model.encode(TEXTS, instruction="any thing", side="document"))
    assert not close(got, model.encode(TEXTS, instruction=TASK, side="document"))


@pytest.mark.parametrize(("pooling", "code"), [("LAST", 0), ("MEAN", 1)])
def test_the_check_of_vllm_sees_another_pooling(
    pooling: str, code: int, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what stands for vLLM here: a stock model that takes the rows as vLLM does."""
    _, saved = save("one", **VLLM)
    folder = run(saved, tmp_path / "vllm", "vllm")

    class LLM:
        def __init__(self, *, model: str, pooler_config: Any, dtype: str, **options: Any) -> None:
            assert options == {"revision": None, "runner": "pooling", "enable_prompt_embeds": True}
            assert pooler_config.pooling_type == "LAST"
            self.model = AutoModel.from_pretrained(model, dtype=dtype)

        def embed(self, prompts: list[dict[str, Tensor]]) -> list[Any]:
            rows = [prompt["prompt_embeds"] for prompt in prompts]
            states = [self.model(inputs_embeds=item[None]).last_hidden_state[0] for item in rows]
            found = [state[-1] if pooling == "LAST" else state.mean(0) for state in states]
            return [SimpleNamespace(outputs=SimpleNamespace(embedding=row.tolist())) for row in found]

    config = SimpleNamespace(PoolerConfig=lambda pooling_type: SimpleNamespace(pooling_type=pooling_type))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM))
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    assert CHECK["main"]([str(folder), *TEXTS]) == code


@pytest.mark.parametrize("file", [vllm_client.__file__, SCRIPT], ids=["client", "check"])
def test_what_runs_beside_vllm_needs_nothing_of_this_library(file: str) -> None:
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {item.name for node in ast.walk(tree) if isinstance(node, ast.Import) for item in node.names}
    assert "torch" in modules
    assert not [name for name in modules if name.split(".")[0] == "pe"]


@pytest.mark.parametrize("pooling", ["mean_text", "last"])
def test_peft_adapter_in_stock_peft(pooling: str, save: Save, tmp_path: Path) -> None:
    model, saved = save(**PREFIX | {"pooling": pooling})
    folder = run(saved, tmp_path / "adapter", "peft", f"--instruction={TASK}")
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = TEXTS[:3]
    read = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, padding=True, return_tensors="pt")
    cut = {name: read[name][:, :24] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = adapted(**cut).last_hidden_state[:, -cut["input_ids"].shape[1] :]
    mask = cut["attention_mask"]
    last = states[torch.arange(len(texts)), mask.sum(1) - 1]
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert close(last if pooling == "last" else mean, model.encode(texts, instruction=TASK))


def test_sentence_transformers_takes_the_one_prompt(save: Save, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, saved = save()
    for side in ("query", "document"):
        folder = run(saved, tmp_path / side, "sentence-transformers", "--instruction=any thing", f"--side={side}")
        loaded = sentence_transformers.SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
        got = getattr(loaded, f"encode_{side}")(TEXTS)
        expected = model.encode(TEXTS, instruction="any thing", side=side)  # type: ignore[arg-type]
        assert np.allclose(got, expected, atol=1e-6)
        assert set(filter(None, loaded.prompts.values())) == {"any thing"}


def test_rows_and_their_metadata(save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, saved = save(lens_rank=2)
    file = run(saved, tmp_path / "task.safetensors", "safetensors")
    assert f"no --instruction, so the prompt is that of query texts: '{TASK}'" in capsys.readouterr().err
    with safe_open(str(file), "pt") as opened:
        shown, rows, names = opened.metadata(), opened.get_tensor("prompt"), set(opened.keys())
    assert torch.equal(rows, model.prompt_bank([Instruction(TASK)])[0])
    assert names == {"prompt", "gates"}
    expected = {
        "instruction": TASK,
        "side": "query",
        "backbone": model.backbone.name,
        "backbone_content": model.backbone.revision,
        "soft_tokens": "3",
        "width": "40",
        "layout": "suffix",
        "pooling": "mean_prompt",
        "normalisation": "l2",
        "skip": "weighted",
        "lens_rank": "2",
    }
    assert expected.items() <= shown.items()
    assert {name: json.loads(shown["about"])[name] for name in ("soft_tokens", "lead")} == {
        "soft_tokens": 3,
        "lead": [1],
    }


@pytest.mark.parametrize(
    ("to", "options", "said"),
    [
        ("vllm", {}, "pooling: expected 'last', got 'mean_prompt'"),
        ("vllm", {}, "reader: expected 'none', got 'activated_lora' (its adapters would act on the text, too"),
        ("vllm", {}, "skip: expected 'none', got 'weighted' (it is added behind the last pass"),
        ("vllm", {}, "train the embedder with what is expected, as recipes/servable.yaml does"),
        ("vllm", VLLM | {"lens_rank": 2}, "--to vllm: lens_rank: expected 0, got 2 (it scales"),
        ("vllm", VLLM | {"conditioning": "instruction_and_text"}, "--to vllm: conditioning: expected 'instruction'"),
        ("peft", VLLM, "--to peft: layout: expected 'prefix', got 'suffix'"),
        ("peft", VLLM, "as recipes/tiny-paper.yaml does"),
        ("safetensors", {"conditioning": "instruction_and_text"}, "--to safetensors: conditioning: expected"),
        (
            "vllm",
            VLLM | {"templates": TemplatesConfig(query=SideTemplates(text="{text}<|end|>"))},
            "templates.query.text: expected one without special tokens",
        ),
    ],
)
def test_what_a_target_cannot_serve_is_refused_by_name(
    to: str, options: Any, said: str, save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, saved = save(**options)
    output = tmp_path / ("new.safetensors" if to == "safetensors" else "new")
    with pytest.raises(SystemExit) as stopped:
        run(saved, output, to, "--instruction=a")
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "to", "arguments", "said"),
    [
        (".", "sentence-transformers", [], "exists already; give another name"),
        ("task", "safetensors", [], "expected a name ending in .safetensors"),
        ("task.safetensors", "sentence-transformers", [], "expected the name of a folder"),
        ("new", "sentence-transformers", ["--instruction= "], "expected a sentence"),
    ],
)
def test_bad_arguments_write_nothing(
    output: str,
    to: str,
    arguments: list[str],
    said: str,
    save: Save,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, saved = save()
    with pytest.raises(SystemExit):
        run(saved, tmp_path / output, to, *arguments)
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_recipe_trains_what_vllm_serves() -> None:
    config = load_recipe(Path(__file__).parent.parent / "recipes" / "servable.yaml").model
    found = vars(config) | vars(config.backbone)
    assert all(found[name] in allowed for name, allowed in export.SERVED["vllm"].items())
    assert (config.layout, config.backbone.quantize) == ("suffix", "none")
