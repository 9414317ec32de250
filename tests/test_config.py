"""Recipes: every mistake is one clear error, and what is right survives a round trip."""

from __future__ import annotations

import ast
import inspect
import itertools
from pathlib import Path

import pytest
import yaml

from pe import config
from pe.config import (
    AlignmentConfig,
    DatasetConfig,
    LossConfig,
    ModelConfig,
    PrompterConfig,
    RecipeError,
    SideTemplates,
    TemplatesConfig,
    TrainConfig,
    nearest,
    to_dict,
)
from pe.runs.recipes import load_recipe, model_config_from_dict, write_yaml
from tests.tiny import PLAIN

RECIPES = Path(__file__).parent.parent / "recipes"

GOOD = """\
output: runs/x
model:
  layout: prefix
  pooling: last
  reader: none
  skip: none
  prompter: {soft_tokens: 3, temperature: 0.5}
  templates:
    query: {prefix: "Task: {instruction}\\nQuery:"}
data:
  - path: a.jsonl
    instruction: find it
    weight: 2
loss: {matryoshka: [16, 8]}
train:
  lr: 1e-4
  micro_batch_size: null
evaluate:
  tasks: [one, two]
  instructions: {one: do it}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    return file


def error_of(file: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    return str(caught.value)


def test_values_arrive_with_their_types(recipe: Path) -> None:
    got = load_recipe(recipe)
    assert got.output == "runs/x"
    assert got.model.prompter == PrompterConfig(soft_tokens=3, temperature=0.5)
    assert got.model.templates.query.prefix == "Task: {instruction}\nQuery:"
    assert got.model.templates.document == SideTemplates()
    assert got.data == [DatasetConfig(path="a.jsonl", instruction="find it", weight=2.0)]
    assert got.loss.matryoshka == (16, 8)
    assert got.train.lr == 1e-4
    assert isinstance(got.train.lr, float)
    assert got.evaluate.tasks == ("one", "two")
    assert got.evaluate.instructions == {"one": "do it"}


def test_overrides_win(recipe: Path) -> None:
    got = load_recipe(recipe, ["--train.steps=7", "--model.pooling=mean_text", "--loss.matryoshka=[4]"])
    assert (got.train.steps, got.model.pooling, got.loss.matryoshka) == (7, "mean_text", (4,))
    assert got.model.prompter.soft_tokens == 3


def test_yaml_round_trip(recipe: Path, tmp_path: Path) -> None:
    first = load_recipe(recipe)
    write_yaml(first, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == first


def test_model_config_round_trip_is_plain_yaml() -> None:
    config = ModelConfig(
        prompter=PrompterConfig(temperature=0.25, trainable="lora"),
        alignment=AlignmentConfig(kind="vocabulary"),
        reader="activated_lora",
        templates=TemplatesConfig(document=SideTemplates(text="passage: {text}")),
    )
    values = yaml.safe_load(yaml.safe_dump(to_dict(config)))
    assert model_config_from_dict(values, "here") == config


def test_defaults_are_those_of_the_default_recipe() -> None:
    recipe = load_recipe(RECIPES / "tiny.yaml")
    assert recipe.model == ModelConfig(max_length=128)
    assert recipe.loss == LossConfig()
    assert recipe.train == TrainConfig(steps=TrainConfig().total_steps)


def test_recipes_say_what_they_rely_on() -> None:
    paper = load_recipe(RECIPES / "tiny-paper.yaml")
    assert (paper.model.reader, paper.model.skip) == ("none", "none")
    assert (paper.loss.temperature, paper.train.lr) == (0.05, 3e-3)
    for name in ("qwen3-0.6b-to-mistral-7b", "qwen3-0.6b-to-qwen3-8b"):
        large = load_recipe(RECIPES / f"{name}.yaml")
        assert (large.model.reader, large.model.skip) == ("activated_lora", "weighted")
        assert (large.loss.temperature, large.train.lr) == (0.02, 1e-5)


def test_a_saved_config_keeps_its_meaning() -> None:
    weak = ModelConfig(reader="none", skip="none")
    assert model_config_from_dict(to_dict(weak), "here") == weak
    before_the_options = {key: value for key, value in to_dict(weak).items() if key not in ("reader", "skip")}
    assert model_config_from_dict(before_the_options, "here") == weak


def test_saved_config_with_an_unknown_key_names_its_place() -> None:
    with pytest.raises(RecipeError, match=r"saved/config\.json: .*layuot"):
        model_config_from_dict({"layuot": "suffix"}, "saved/config.json")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("train:\n  stps: 5\n", 2, "unknown key 'stps' in train; did you mean 'steps'? Known keys: steps, epochs"),
        ("modl: {}\n", 1, "unknown key 'modl' in the recipe; did you mean 'model'? Known keys: output, license, model"),
        ("output: x\nzzzz: 1\n", 2, "unknown key 'zzzz' in the recipe. Known keys: output"),
        ("data:\n  - path: a\n    instruction: b\n  - path: a\n    wieght: 1\n", 5, "unknown key 'wieght' in data[1];"),
        (
            "model:\n  templates:\n    query:\n      prefx: a\n",
            4,
            "unknown key 'prefx' in model.templates.query; did you mean 'prefix'?",
        ),
        ("model:\n  prompter:\n    lora: {rnak: 4}\n", 3, "in model.prompter.lora; did you mean 'rank'?"),
        ("train: {steps: 3}\n? [a, b]\n: 5\n", 2, "expected a key in the recipe, got a list or mapping"),
        ("train:\n  steps: 3\n  steps: 4\n", 3, "key 'steps' stands twice in train"),
        (
            "- 1\n- 2\n",
            1,
            "the recipe: expected a mapping of output, license, model, data, loss, train, evaluate, got a list",
        ),
        (
            "hello\n",
            1,
            "the recipe: expected a mapping of output, license, model, data, loss, train, evaluate, got 'hello'",
        ),
        ("# nothing\n", 1, "expected a mapping of output, license, model, data, loss, train, evaluate, got nothing"),
        ("output: x\ntrain: 5\n", 2, "train: expected a mapping of steps, epochs"),
        ("train:\n  steps: many\n", 2, "train.steps: expected int or null, got 'many'"),
        ("train:\n  lr: yes\n", 2, "train.lr: expected float, got 'True'"),
        ("output: x\nmodel:\n  layout: sufix\n", 3, "expected 'suffix' or 'prefix', got 'sufix'"),
        ("data: {path: a, instruction: b}\n", 1, "data: expected list, got"),
        ("train:\n  batch_size: 0\n", 2, "train.batch_size: expected at least 1, got 0"),
        ("model:\n  prompter:\n    temperature: 0\n", 3, "prompter.temperature: expected a positive number, got 0.0"),
        ("loss:\n  matryoshka: [0, 8]\n", 2, "loss.matryoshka: expected sizes of 1 or more, got (0, 8)"),
        ("train:\n  lr: .nan\n", 2, "train.lr: expected a positive number, got nan"),
        ("train:\n  alignment_lr: -1.0\n", 2, "train.alignment_lr: expected a non-negative number, or null, got -1.0"),
        ("train:\n  reader_lr: -1.0\n", 2, "train.reader_lr: expected a non-negative number, or null, got -1.0"),
        ("train:\n  skip_lr: .inf\n", 2, "train.skip_lr: expected a non-negative number, or null, got inf"),
        ("train:\n  weight_decay: -0.1\n", 2, "train.weight_decay: expected a non-negative number, got -0.1"),
        ("train:\n  clip_norm: 0\n", 2, "train.clip_norm: expected a positive number, got 0.0"),
        ("train:\n  clip_norm: -1\n", 2, "train.clip_norm: expected a positive number, got -1.0"),
        ("train:\n  eval_every: -1\n", 2, "train.eval_every: expected 0 or more, got -1"),
        ("train:\n  seed: -1\n", 2, "train.seed: expected 0 or more, got -1"),
        ("train:\n  seed: 4294967296\n", 2, "train.seed: expected less than 2^32, got 4294967296"),
        ("evaluate:\n  batch_tokens: 0\n", 2, "evaluate.batch_tokens: expected at least 1, got 0"),
        ("model:\n  prompter:\n    lora:\n      alpha: 0\n", 1, "alpha: expected at least 1, got 0"),
        (
            "model:\n  layout: suffix\n  pooling: mean_text\n",
            3,
            "pooling: expected one of ('mean_prompt', 'last') in the suffix layout, got 'mean_text'",
        ),
    ],
)
def test_error_in_the_file(tmp_path: Path, text: str, line: int, said: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    message = error_of(file)
    assert message.startswith(f"{file}:{line}: ")
    assert said in message


def test_broken_yaml_tells_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("output: x\ntrain:\n  steps: [1, 2\n  lr: 3\n")
    assert error_of(file).startswith(f"{file}:4: not valid YAML: ")


@pytest.mark.parametrize("place", ["absent.yaml", "."])
def test_unreadable_file(tmp_path: Path, place: str) -> None:
    assert error_of(tmp_path / place).startswith(f"{tmp_path / place}: the recipe cannot be read")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in error_of(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--train.stps=7", "unknown option --train.stps; did you mean '--train.steps'?"),
        ("--trane.steps=7", "unknown option --trane.steps; did you mean '--train.steps'?"),
        ("--model.prompter.softtokens=7", "did you mean '--model.prompter.soft_tokens'?"),
        ("--train.steps=abc", "--train.steps=abc: "),
        ("--train.batch_size=0", "--train.batch_size=0: train.batch_size: expected at least 1, got 0"),
        ("--model.max_length=0", "--model.max_length=0: max_length: expected at least 1, got 0"),
        ("--train.steps", "--train.steps: "),
        ("train.steps=7", "unexpected 'train.steps=7'; expected the recipe first, then --option=value"),
    ],
)
def test_error_in_an_override(recipe: Path, override: str, said: str) -> None:
    assert said in error_of(recipe, override)


def test_unknown_override_with_a_separate_value(recipe: Path) -> None:
    assert "did you mean '--train.steps'?" in error_of(recipe, "--train.stps", "7")


def test_nearest_is_silent_about_strangers() -> None:
    assert nearest("qqqq", ["steps", "lr"]) == ""


def test_every_key_says_what_it_means() -> None:
    classes = [node for node in ast.parse(inspect.getsource(config)).body if isinstance(node, ast.ClassDef)]
    silent = []
    for kind in (node for node in classes if node.name != "RecipeError"):
        for field, after in itertools.pairwise([*kind.body, ast.Pass()]):
            is_leaf = isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith("Config")
            if is_leaf and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                silent.append(f"{kind.name}: {ast.unparse(field)}")
    assert not [name for name in silent if "SideTemplates =" not in name]


@pytest.mark.parametrize(
    ("layout", "pooling", "allowed"),
    [
        ("suffix", "mean_prompt", True),
        ("suffix", "last", True),
        ("suffix", "mean_text", False),
        ("prefix", "mean_text", True),
        ("prefix", "last", True),
        ("prefix", "mean_prompt", False),
    ],
)
def test_layout_and_pooling(layout: str, pooling: str, allowed: bool) -> None:
    if allowed:
        assert ModelConfig(layout=layout, pooling=pooling, **PLAIN).pooling == pooling  # type: ignore[arg-type]
    else:
        with pytest.raises(RecipeError, match=f"in the {layout} layout, got '{pooling}'"):
            ModelConfig(layout=layout, pooling=pooling, **PLAIN)  # type: ignore[arg-type]


def test_a_reader_needs_the_suffix_layout() -> None:
    with pytest.raises(RecipeError, match="reader: expected 'none' in the prefix layout, got 'activated_lora'"):
        ModelConfig(layout="prefix", pooling="last", reader="activated_lora")


def test_a_skip_needs_the_suffix_layout() -> None:
    with pytest.raises(RecipeError, match="skip: expected 'none' in the prefix layout, got 'weighted'"):
        ModelConfig(layout="prefix", pooling="last", reader="none", skip="weighted")


def test_a_skip_is_one_of_those_there_are() -> None:
    with pytest.raises(RecipeError, match="skip: expected one of none, weighted, got 'linear'"):
        ModelConfig(skip="linear")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("loss:\n  symmetric: true\n", "loss.symmetric is no longer there; leave it out"),
        ("model:\n  skip: linear\n", "model.skip: linear is no longer there; train with weighted"),
        (
            "model:\n  alignment: {init: identity}\n",
            "model.alignment.init: identity is no longer there; write least_squares",
        ),
    ],
)
def test_a_removed_option_says_what_to_do_instead(section: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"output: x\n{section}")
    assert error_of(file) == f"{file}:3: {said}"


@pytest.mark.parametrize("override", ["--loss.symmetric=true", "--model.skip=linear"])
def test_a_removed_option_among_overrides(recipe: Path, override: str) -> None:
    said = "is no longer there; (leave it out|train with weighted)$"
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe, [override])
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe, override.split("="))


def test_a_recipe_of_an_earlier_run_is_read(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("loss: {temperature: 1e-2, symmetric: false, stepwise: false}\ntrain: {steps: 3}\n")
    found = load_recipe(file)
    assert (found.loss, found.train.steps) == (LossConfig(temperature=0.01), 3)


def test_a_saved_config_with_a_removed_option() -> None:
    """Where the alignment started matters no more; a skip without weights was another model."""
    start = to_dict(ModelConfig()) | {"alignment": {"kind": "linear", "init": "identity"}}
    assert model_config_from_dict(start, "here") == ModelConfig()
    with pytest.raises(RecipeError, match=r"^saved/config\.json: model\.skip: linear is no longer there; train with"):
        model_config_from_dict(to_dict(ModelConfig()) | {"skip": "linear"}, "saved/config.json")


@pytest.mark.parametrize("changes", [{}, {"pooling": "last"}, {"pooling": "last", "reader": "none"}])
def test_a_prefix_says_at_once_all_that_it_takes(changes: dict[str, str], tmp_path: Path) -> None:
    said = "; in the prefix layout give pooling: mean_text or last, reader: none and skip: none"
    with pytest.raises(RecipeError, match=f"in the prefix layout, got '.*'{said}$"):
        ModelConfig(layout="prefix", **changes)  # type: ignore[arg-type]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"output": "x", "model": {"layout": "prefix", **changes}}, sort_keys=False))
    assert error_of(file).startswith(f"{file}:2: ")
    assert said in error_of(file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": "no place"}, "templates.text: expected a template with {text}"),
        ({"text": "{instruction} {text}"}, "templates.text: expected no {instruction}"),
        ({"prefix": "{text}"}, "templates.prefix: expected no {text}"),
        ({"prompter": "{text}"}, "templates.prompter: expected a template with {instruction}"),
        ({"prompter": "{text} {instruction}"}, "templates.prompter: expected {instruction} before {text}"),
    ],
)
def test_templates_name_their_fields(changes: dict[str, str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        SideTemplates(**changes)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"instruction": " "}, "a.jsonl: instruction: expected a sentence"),
        ({"weight": 0.0}, "a.jsonl: weight: expected a positive number"),
        ({"weight": float("inf")}, "a.jsonl: weight: expected a positive number"),
        ({"query_template": "q"}, "a.jsonl: query_template: expected {text} in it"),
    ],
)
def test_a_data_set_names_itself(changes: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        DatasetConfig(**({"path": "a.jsonl", "instruction": "i"} | changes))  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_a_set_without_an_instruction_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data:\n  - path: a.jsonl\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: a\.jsonl: instruction: expected a sentence, got ''"):
        load_recipe(tmp_path / "recipe.yaml")
