"""Models and embedders from folders: what is refused, what is found where, and what a save leaves alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pe import encode, transfer
from pe.baselines.lora import LoraBaselineConfig, LoraEmbedder
from pe.config import BackboneConfig, LoraSettings, ModelConfig, PrompterConfig, Recipe
from pe.measure import footprint
from pe.method.backbone import Backbone
from pe.method.loading import Filled, TextTokenizer, load_pretrained
from pe.method.prompting import PromptingLLM
from pe.model import PromptEmbedder
from pe.runs import files
from pe.runs.folder import RunError, RunFolder
from pe.runs.recipes import write_yaml
from tests.tiny import VOCABULARY, byte_tokenizer

CPU = torch.device("cpu")
TEXTS = ["the cat sat", "", "naïve 日本語 🙂"]
TASK = "find the answer"
LORA = {"trainable": "lora", "lora": LoraSettings(rank=2)}
Change = Callable[[Path], object]


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def embedder(folder: Path, prompter: dict[str, Any] | None = None) -> PromptEmbedder:
    """Of the models in a folder, `one` and `prompter`."""
    torch.manual_seed(0)
    config = ModelConfig(
        prompter=PrompterConfig(model=str(folder / "prompter"), soft_tokens=2, **(prompter or {})),
        backbone=BackboneConfig(model=str(folder / "one")),
    )
    model = PromptEmbedder.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def embeddings(model: PromptEmbedder) -> np.ndarray:
    return model.encode(TEXTS, instruction=TASK)


def load(kind: str, folder: Path) -> Backbone | PromptingLLM:
    if kind == "backbone":
        return Backbone.from_pretrained(BackboneConfig(model=str(folder)), CPU)
    return PromptingLLM.from_pretrained(PrompterConfig(model=str(folder)), CPU)


@pytest.fixture
def models(tiny_models: Path, tmp_path: Path) -> Path:
    """Copies of `prompter`, `one` and `two` that a test may change or move."""
    return Path(shutil.copytree(tiny_models, tmp_path / "project" / "models"))


# What a tokenizer does.


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*.json"):
        file.unlink()


def without_rules(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def of_one_token(folder: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def of_another_model(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{n}" for n in range(60)])
    tokenizer.save_pretrained(folder)


BAD_TOKENIZERS: dict[str, tuple[Change, str]] = {
    "missing": (without_tokenizer, "reads every text as nothing; its files .* missing or damaged"),
    "damaged": (without_rules, r"missing or damaged tokenizer: tokenizer\.json"),
    "one token": (of_one_token, "reads every text as the same token"),
    "no rows": (of_another_model, "knows 23 tokens, 'new37' first, that the model has no row for .* has 300"),
}


@pytest.mark.parametrize("bad", BAD_TOKENIZERS)
@pytest.mark.parametrize("kind", ["backbone", "prompter"])
def test_a_tokenizer_that_cannot_be_right_is_refused(models: Path, kind: str, bad: str) -> None:
    change, message = BAD_TOKENIZERS[bad]
    folder = models / {"backbone": "one", "prompter": "prompter"}[kind]
    if bad == "missing":  # what transformers makes of Qwen without files; of Llama it makes an error
        folder = models / "one"
    change(folder)
    with pytest.raises(ValueError, match=f"{folder.name}: .*{message}"):
        load(kind, folder)


def test_a_command_refuses_a_backbone_without_its_tokenizer(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedder(models).save_pretrained(tmp_path / "saved")
    (tmp_path / "texts.txt").write_text("a\nb\n")
    without_tokenizer(models / "one")
    with pytest.raises(SystemExit) as stopped:
        encode.main([str(tmp_path / "saved"), str(tmp_path / "texts.txt"), str(tmp_path / "out.npy"),
                     f"--instruction={TASK}", f"--backbone={models / 'one'}"])  # fmt: skip
    assert stopped.value.code == 2
    assert "reads every text as nothing" in capsys.readouterr().err
    assert not (tmp_path / "out.npy").exists()


def test_a_special_token_without_a_row_is_refused_where_a_template_asks_for_it() -> None:
    """Texts never become one, so a tokenizer may know it: Gemma 3's does."""
    tokenizer = AutoTokenizer.from_pretrained("models/tiny-qwen3")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<query>"]})
    text_tokenizer = TextTokenizer(tokenizer, 8192)
    assert 8192 not in text_tokenizer(["<query>"])[0]
    with pytest.raises(ValueError, match=r"templates: .* got '<query>' in '<query>\{text\}': its embedding has 8192 r"):
        text_tokenizer([Filled("<query>{text}", text="a")])


@pytest.mark.parametrize("part", ["backbone", "prompter"])
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_another_tokenizer_is_another_model(models: Path, tmp_path: Path, part: str, trainable: str) -> None:
    saved = tmp_path / "saved"
    embedder(models, LORA if trainable == "lora" else None).save_pretrained(saved)
    base = saved / "prompter" if trainable == "full" else models / "prompter"
    byte_tokenizer(bos=True).save_pretrained(models / "one" if part == "backbone" else base)
    with pytest.raises(ValueError, match=r"saved: expected the tokenizer that it was trained with, got one in .* read"):
        PromptEmbedder.from_pretrained(saved)
    content = json.loads((saved / "config.json").read_text())
    del content[part]["tokenizer"]  # as versions before wrote it
    (saved / "config.json").write_text(json.dumps(content))
    PromptEmbedder.from_pretrained(saved)


def test_another_tokenizer_is_another_revision(models: Path) -> None:
    first = embedder(models)
    byte_tokenizer(bos=True).save_pretrained(models / "one")
    assert embedder(models).revision != first.revision
    assert embedder(models).backbone.revision == first.backbone.revision


# Text is text.


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-mistral"])
def test_special_tokens_in_texts_are_text_and_in_templates_tokens(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(f"models/{name}")
    read, special = TextTokenizer(tokenizer, len(tokenizer)), set(tokenizer.all_special_ids)
    end, number = tokenizer.eos_token, tokenizer.eos_token_id
    text = f"a {end} b{end}"
    ids = read([text], lead=False)[0]
    assert not special & set(ids)
    assert tokenizer.decode(ids) == text
    assert read([text])[0] == read.lead + ids
    assert read([Filled("{text}", text=text)], lead=False) == [ids]
    assert read([Filled(f"{{text}}{end}", text=text)], lead=False) == [[*ids, number]]
    assert read([Filled("{instruction}", instruction=text)], lead=False) == [ids]
    template = f"{end}one {{instruction}}{end} two {{text}}"
    filled = [Filled(template, "do it", "a text"), Filled("{text}", text="{instruction}"), Filled(template)]
    whole = tokenizer([str(one) for one in filled], add_special_tokens=False)["input_ids"]
    assert read(filled, lead=False) == whole
    assert set(whole[0]) & special == {number}


@pytest.mark.parametrize("layout", ["suffix", "prefix"])
def test_a_special_token_in_a_text_or_an_instruction_ends_nothing(tiny_models: Path, layout: str) -> None:
    prefix = {"layout": "prefix", "pooling": "mean_text", "reader": "none", "skip": "none"}
    options = {} if layout == "suffix" else prefix
    config = ModelConfig(
        prompter=PrompterConfig(model=str(tiny_models / "prompter"), soft_tokens=2),
        backbone=BackboneConfig(model=str(tiny_models / "one")),
        conditioning="instruction_and_text",
        **options,
    )
    model, read = PromptEmbedder.from_config(config), set[int]()

    def noting(known: TextTokenizer) -> Callable[..., list[list[int]]]:
        def tokenize(*given: Any, **more: Any) -> list[list[int]]:
            rows = known(*given, **more)
            read.update(*rows)
            return rows

        return tokenize

    for part in (model.backbone, model.prompter):
        part.text_tokenizer = noting(part.text_tokenizer)
    model.encode(["a <|end|> b"], instruction="find <|end|>")
    assert read
    assert 0 not in read  # <|end|>


def test_texts_without_special_tokens_are_read_as_ever() -> None:
    lines = Path("data/README.md").read_text(encoding="utf-8").splitlines()
    for name in ("tiny-qwen3", "tiny-mistral"):
        tokenizer = AutoTokenizer.from_pretrained(f"models/{name}")
        expected = tokenizer(lines, add_special_tokens=False)["input_ids"]
        got = TextTokenizer(tokenizer, len(tokenizer))(lines, lead=False)
        assert [row for row, line in zip(got, lines, strict=True) if line] == [row for row in expected if row]


# What a folder holds.


def with_own_code(folder: Path) -> None:
    (folder / "own.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    classes = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoModelForCausalLM": "own.M"}
    edit(folder / "config.json", model_type="of_its_own", auto_map=classes)


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def as_adapter(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def with_adapter(folder: Path) -> None:
    """Its own base stands in the same folder."""
    whole = shutil.copytree(folder, folder.parent / "whole")
    as_adapter(folder)
    shutil.copytree(whole, folder, dirs_exist_ok=True)


def quantised(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


NO_MODELS: dict[str, tuple[Change, str]] = {
    "code": (
        with_own_code,
        r".*brings code of its own \(auto_map in config\.json\), which is never run; choose another",
    ),
    "pickle": (as_pickle, r"expected weights in model\.safetensors, got pytorch_model\.bin, a pickle, .*never read"),
    "nothing": (without_weights, r"expected weights in model\.safetensors, or in the parts .*; copy or download"),
    "adapter": (as_adapter, r"expected a whole model, .* got an adapter .*merge_and_unload\(\), save that"),
    "adapter, base": (with_adapter, r"expected a whole model, .* got an adapter"),
    "quantised": (quantised, r".*got quantised ones \(quantization_config .* method bitsandbytes\); name the check"),
}


@pytest.mark.parametrize("bad", NO_MODELS)
@pytest.mark.parametrize("kind", ["backbone", "prompter"])
def test_what_is_no_whole_model_of_floats_is_named(
    models: Path, kind: str, bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(question: str) -> str:
        raise AssertionError(f"asked: {question}")

    monkeypatch.setattr("builtins.input", answer)
    change, message = NO_MODELS[bad]
    folder = models / {"backbone": "one", "prompter": "prompter"}[kind]
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{folder.name}: {message}"):
        load(kind, folder)
    assert not list(folder.rglob("ran"))
    if bad in ("code", "adapter", "quantised"):
        with pytest.raises(ValueError, match=message):
            footprint.config_of(BackboneConfig(model=str(folder)))


def adapted(models: Path, auto: Any, **changes: Any) -> PeftModel:
    """`one` with an adapter that acts, which is saved as `adapter`."""
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 8} | changes
    model = get_peft_model(auto.from_pretrained(models / "one"), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(models / "adapter")
    return cast(PeftModel, model.eval())


@pytest.mark.parametrize(
    ("auto", "changes"),
    [
        (AutoModelForCausalLM, {"task_type": "CAUSAL_LM", "use_dora": True}),
        (AutoModel, {"task_type": "FEATURE_EXTRACTION"}),
        (AutoModel, {"modules_to_save": ["norm"]}),
    ],
)
def test_an_adapter_is_merged_into_its_base(models: Path, auto: Any, changes: dict[str, Any]) -> None:
    ids = torch.tensor([[5, 9, 200, 31]])
    peft = adapted(models, auto, **changes).base_model.model
    inner = peft.model if auto is AutoModelForCausalLM else peft
    with torch.no_grad():
        base, expected = AutoModel.from_pretrained(models / "one")(ids)[0], inner(ids)[0]
        found, tokenizer = load_pretrained(AutoModel, str(models / "adapter"), None, torch.float32)
        assert torch.allclose(found(ids)[0], expected, atol=1e-5)
        assert not torch.allclose(expected, base, atol=1e-2)
        whole, _ = load_pretrained(AutoModelForCausalLM, str(models / "adapter"), None, torch.float32)
        assert torch.allclose(whole.model(ids)[0], expected, atol=1e-5)
    assert tokenizer("the cat")["input_ids"] == byte_tokenizer()("the cat")["input_ids"]
    assert footprint.config_of(BackboneConfig(model=str(models / "adapter"))).hidden_size == 32


def test_an_embedder_on_an_adapter(models: Path, tmp_path: Path) -> None:
    adapted(models, AutoModelForCausalLM)
    shutil.copytree(models / "adapter", tmp_path / "first")
    shutil.move(models / "one", models / "base")
    shutil.move(models / "adapter", models / "one")
    edit(models / "one" / "adapter_config.json", base_model_name_or_path=str(models / "base"))
    model = embedder(models)
    expected = embeddings(model)
    model.save_pretrained(tmp_path / "named")
    model.save_pretrained(tmp_path / "whole", include_backbone=True)
    shutil.move(models / "one", models / "elsewhere")
    for folder, options in (("named", {"backbone": str(models / "elsewhere")}), ("whole", {})):
        assert np.allclose(
            embeddings(PromptEmbedder.from_pretrained(tmp_path / folder, **options)), expected, atol=1e-6
        )
    edit(models / "elsewhere" / "adapter_config.json", lora_alpha=9)
    with pytest.raises(ValueError, match="has content"):
        PromptEmbedder.from_pretrained(tmp_path / "named", backbone=str(models / "elsewhere"))


def of_other_layers(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace("q_proj", "qq_proj"): x for name, x in weights.items()}, folder / "adapter_model.safetensors"
    )


def with_base_of_another_width(folder: Path) -> None:
    edit(folder / "adapter_config.json", base_model_name_or_path=str(folder.parent / "two"))


def configured(**values: object) -> Change:
    return lambda folder: edit(folder / "adapter_config.json", **values)


BAD_ADAPTERS: dict[str, tuple[Change, str]] = {
    "no base": (configured(base_model_name_or_path=None), "base_model_name_or_path: expected the model"),
    "base away": (lambda folder: shutil.rmtree(folder.parent / "one"), "the base of this adapter .*no model there"),
    "damaged": (lambda folder: (folder / "adapter_config.json").write_text("{"), "expected what PEFT writes of an"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "a weights file, found none"),
    "tokens": (configured(alora_invocation_tokens=[1]), "that can be merged into its base, such as LoRA, got LORA"),
    "layers": (of_other_layers, r"expected an adapter of .*one, .* got one of another model \(it has no .*qq_proj"),
    "width": (with_base_of_another_width, r"expected an adapter of .*two, .* got one of another model \(.*size mism"),
}


@pytest.mark.parametrize("bad", BAD_ADAPTERS)
def test_an_adapter_that_cannot_be_merged(models: Path, bad: str) -> None:
    change, message = BAD_ADAPTERS[bad]
    adapted(models, AutoModelForCausalLM)
    change(models / "adapter")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load("backbone", models / "adapter")


def test_a_tokenizer_with_code_of_its_own_is_read_without_it(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda question: "y")
    folder = models / "one"
    (folder / "own.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    edit(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.T", None]})
    assert load("backbone", folder).text_tokenizer(["the cat"]) == TextTokenizer(byte_tokenizer(), VOCABULARY)(
        ["the cat"]
    )
    assert not list(folder.rglob("ran"))


# Where models are.


@pytest.mark.parametrize("names", ["relative", "absolute"])
@pytest.mark.parametrize("prompter", [None, LORA])
def test_a_project_moves_as_a_whole(
    models: Path, tmp_path: Path, names: str, prompter: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models.parent)
    model = embedder(Path("models") if names == "relative" else models, prompter)
    model.save_pretrained("runs/tiny/model")
    expected = embeddings(model)
    models.parent.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    moved = PromptEmbedder.from_pretrained("elsewhere/runs/tiny/model")
    np.testing.assert_array_equal(embeddings(moved), expected)
    moved.save_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(embeddings(PromptEmbedder.from_pretrained(tmp_path / "again")), expected)


def test_the_model_with_the_right_content_is_taken(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the one of the same name that happens to be in the working directory."""
    monkeypatch.chdir(models.parent)
    embedder(Path("models")).save_pretrained("runs/model")
    (tmp_path / "models").mkdir()
    shutil.copytree(models / "two", tmp_path / "models" / "one")
    monkeypatch.chdir(tmp_path)
    loaded = PromptEmbedder.from_pretrained("project/runs/model")
    assert loaded.backbone.name == str(models / "one")
    shutil.rmtree(models)
    with pytest.raises(ValueError, match="trained on backbone models/one with content"):
        PromptEmbedder.from_pretrained("project/runs/model")


@pytest.mark.parametrize("part", ["backbone", "prompter"])
def test_what_is_not_found_is_named_with_its_cure(models: Path, tmp_path: Path, part: str) -> None:
    model = embedder(models, LORA)
    model.save_pretrained(tmp_path / "saved")
    name = {"backbone": "one", "prompter": "prompter"}[part]
    moved = (models / name).rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=f"cannot be had: .*no model there.* as {part}=, --{part}.*include_bac"):
        PromptEmbedder.from_pretrained(tmp_path / "saved")
    again = PromptEmbedder.from_pretrained(tmp_path / "saved", **{part: str(moved)})  # type: ignore[arg-type]
    np.testing.assert_array_equal(embeddings(again), embeddings(model))
    again.save_pretrained(tmp_path / "second")
    PromptEmbedder.from_pretrained(tmp_path / "second")
    with pytest.raises(ValueError, match="content"):
        PromptEmbedder.from_pretrained(tmp_path / "saved", **{part: str(models / "two")})  # type: ignore[arg-type]


def test_included_weights_need_no_other_folder(models: Path, tmp_path: Path) -> None:
    model = embedder(models, LORA)
    model.save_pretrained(tmp_path / "saved", include_backbone=True)
    shutil.rmtree(models)
    again = PromptEmbedder.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(embeddings(again), embeddings(model))
    again.save_pretrained(tmp_path / "saved")  # the base and the backbone are in the folder that is replaced
    third = PromptEmbedder.from_pretrained((tmp_path / "saved").rename(tmp_path / "moved"))
    np.testing.assert_array_equal(embeddings(third), embeddings(model))


def test_a_base_for_a_whole_prompting_llm_is_refused(models: Path, tmp_path: Path) -> None:
    embedder(models).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"prompter: expected none, since .* holds the whole prompting LLM"):
        PromptEmbedder.from_pretrained(tmp_path / "saved", prompter=str(models / "prompter"))


def test_commands_are_told_where_models_are(models: Path, tmp_path: Path) -> None:
    embedder(models, LORA).save_pretrained(tmp_path / "saved")
    base = (models / "prompter").rename(tmp_path / "base")
    (tmp_path / "texts.txt").write_text("a\nb\n")
    arguments = [str(tmp_path / "saved"), str(tmp_path / "texts.txt"), str(tmp_path / "out.npy")]
    encode.main([*arguments, f"--instruction={TASK}", f"--prompter={base}"])
    assert np.load(tmp_path / "out.npy").shape == (2, 32)
    options, rest = transfer.parse(["x", "--backbone=y", "--prompter=p", "--source-backbone=b"])
    assert (options.prompter, options.source_backbone, rest) == ("p", "b", [])


def test_what_sentence_transformers_has_saved(models: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Normalize

    model = embedder(models)
    model.save_pretrained(tmp_path / "saved")
    wrapped = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    wrapped.save(str(tmp_path / "again"))
    loaded = PromptEmbedder.from_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(embeddings(loaded), embeddings(model))
    assert loaded.name == "again"
    wrapped.append(Normalize())
    wrapped.save(str(tmp_path / "more"))
    with pytest.raises(ValueError, match=r"more: expected an embedder alone, got the modules pe\..*Normalize; load it"):
        PromptEmbedder.from_pretrained(tmp_path / "more")


# What a save leaves alone.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def link_files(source: Path, target: Path) -> None:
    """`target` as a copy of `source` in which every file is a link."""
    for path in source.rglob("*"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            copy.symlink_to(path)


@pytest.mark.parametrize("links", ["files", "folder"])
@pytest.mark.parametrize("at_once", [True, False])
def test_saving_over_links_leaves_what_they_lead_to(
    models: Path, tmp_path: Path, links: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr("pe.saving.exchange", lambda *_: False)
    old, new = embedder(models, LORA), embedder(models)
    old.save_pretrained(tmp_path / "old", include_backbone=True)
    before = contents(tmp_path / "old")
    if links == "files":
        link_files(tmp_path / "old", tmp_path / "linked")
    else:
        (tmp_path / "linked").symlink_to(tmp_path / "old")
    if links == "files":
        with pytest.raises(ValueError, match=r"got a link that leads out of it, to .*old"):
            PromptEmbedder.from_pretrained(tmp_path / "linked")
    first = PromptEmbedder.from_pretrained(tmp_path / ("old" if links == "files" else "linked"))
    for model in (first, new):
        model.save_pretrained(tmp_path / "linked")
        np.testing.assert_array_equal(
            embeddings(PromptEmbedder.from_pretrained(tmp_path / "linked")), embeddings(model)
        )
    assert not [path for path in (tmp_path / "linked").rglob("*") if path.is_symlink()]
    assert contents(tmp_path / "old") == before
    assert {path.name for path in tmp_path.iterdir()} == {"project", "old", "linked"}


def test_an_earlier_model_is_there_until_the_new_one_is(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rename, seen = embedder(models), os.rename, []
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(Path, "rename", lambda path, to: [seen.append(path.name), rename(path, to)][1])
    model.save_pretrained(tmp_path / "saved")
    assert seen == []  # the two changed places
    assert not files.exchange(tmp_path / "saved", tmp_path / "absent")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    with pytest.raises(FileExistsError, match="dangling: not empty and not a saved PromptEmbedder"):
        model.save_pretrained(tmp_path / "dangling")


def test_other_files_of_a_run_replace_links_too(tiny_models: Path, tmp_path: Path) -> None:
    recipe, other = Recipe(), tmp_path / "other.txt"
    folder = tmp_path / "run"
    folder.mkdir()
    names = ("recipe.yaml", "scores.json", "baseline.json", "adapter_model.safetensors")
    for name in names:
        (folder / name).symlink_to(other)
    other.write_text("of another run")
    write_yaml(recipe, folder / "recipe.yaml")
    files.write_text(folder / "scores.json", "{}")
    config = LoraBaselineConfig(backbone=BackboneConfig(model=str(tiny_models / "one")), lora=LoraSettings(rank=2))
    LoraEmbedder.from_config(config).save_pretrained(folder)
    assert other.read_text() == "of another run"
    assert not any((folder / name).is_symlink() for name in names)
    assert {path.name for path in folder.iterdir()} == {*names, "adapter_config.json"}
    assert (folder / "scores.json").stat().st_mode == other.stat().st_mode


def test_a_run_from_before_tokenizers_counted_goes_on(tmp_path: Path) -> None:
    recipe, run = Recipe(output=str(tmp_path / "run")), RunFolder(tmp_path / "run")
    run.start(recipe, resume=False, fresh=False, conditions={"processes": 1})
    run.save_checkpoint(1, {}, keep=1)
    now = {"processes": 1, "content of the backbone's tokenizer": "x"}
    assert run.start(recipe, resume=True, fresh=False, conditions=now) == []
    run.save_checkpoint(2, {}, keep=1)
    with pytest.raises(RunError, match="changed: content of the backbone's tokenizer"):
        run.start(recipe, resume=True, fresh=False, conditions=now | {"content of the backbone's tokenizer": "y"})
