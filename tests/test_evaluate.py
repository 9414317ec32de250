"""Evaluation through mteb, with encoders that cost nothing: hashed character trigrams, and ways to spoil them."""

from __future__ import annotations

import json
import lzma
import random
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pe.evaluate
from pe.data.benchmarks import instructions_of, known
from pe.data.records import DataError
from pe.data.tasks import MAIN_SCORES, PASSAGE, SIMILAR, TASKS, available, offline_task
from pe.evaluate import EvaluationError, Scores, comparison, find_tasks, main, score
from pe.runs.extras import MissingPackage
from tests.embedders import with_reader
from tests.tiny import VOCABULARY

mteb = pytest.importorskip("mteb")
from pe.integrations.mteb import MtebEncoder, Side  # noqa: E402

DATA = Path(__file__).parents[1] / "data"
SHIPPED = ["PE-STSb-dev", "PE-XQuAD", "PE-Banking77"]
SIZE = 512


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


class Trigrams:
    """Hashed character trigrams; it remembers what it was asked."""

    name = "trigrams"

    def __init__(self, revision: str = "1") -> None:
        self.revision = revision
        self.calls: list[tuple[Side, str]] = []
        self.texts: list[str] = []

    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str,
        side: Side = "query",
        batch_tokens: int = 16_384,
        progress: bool = False,
    ) -> np.ndarray:
        self.calls.append((side, instruction))
        self.texts += texts
        rows = np.zeros((len(texts), SIZE), np.float32)
        for row, text in zip(rows, texts, strict=True):
            padded = f" {text.lower()} "
            for i in range(len(padded) - 2):
                row[zlib.crc32(padded[i : i + 3].encode()) % SIZE] += 1
        return unit(np.log1p(rows))


class Shuffled(Trigrams):
    """The right embeddings, given to the wrong texts."""

    name = "shuffled"

    def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        return super().encode(texts, **options)[np.random.default_rng(0).permutation(len(texts))]


class Constant(Trigrams):
    def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        return np.full((len(texts), 4), 0.5, np.float32)


class OneShort(Trigrams):
    def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        return super().encode(texts, **options)[1:]


class NotFinite(Trigrams):
    def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        rows = super().encode(texts, **options)
        rows[0, 0] = np.nan
        return rows


def write(path: Path, rows: Sequence[object], packed: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if packed:
        path.with_name(f"{path.name}.xz").write_bytes(lzma.compress(content))
    else:
        path.write_bytes(content)


WORDS = ["apple", "bread", "chair", "drum", "eagle", "forest", "garden", "harbour", "island", "jungle", "lemon"]


def tiny_rows(file: str) -> list[dict[str, object]]:
    """Rows that trigrams solve: what belongs together shares a word."""
    pairs = [(word, other) for word in WORDS for other in WORDS[:4]]
    if file.endswith(("corpus.jsonl", "queries.jsonl")):
        return [{"_id": word, "title": "", "text": f"about the {word} {i}"} for i, word in enumerate(WORDS)]
    if "sts" in file or "sick" in file:
        return [{"sentence1": a, "sentence2": f"{b} it is", "score": 5.0 * (a == b)} for a, b in pairs]
    if file.startswith(("eval/qqp", "eval/mrpc")):
        return [{"sentence1": a, "sentence2": f"{b} it is", "label": int(a == b)} for a, b in pairs]
    if "wikiqa" in file:
        return [{"query": w, "positive": [f"a {w}"], "negative": [f"a {v}" for v in WORDS if v != w]} for w in WORDS]
    return [{"text": f"{word} number {i}", "label": word} for word in WORDS for i in range(8)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with every task of the table, half of its files compressed."""
    folder = tmp_path_factory.mktemp("data")
    for number, file in enumerate(sorted({file for entry in TASKS.values() for file in entry.files})):
        if file.endswith(".tsv"):
            lines = ["query-id\tcorpus-id\tscore", *(f"{word}\t{word}\t1" for word in WORDS)]
            (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            write(folder / file, tiny_rows(file), packed=number % 2 == 0)
    return folder


@pytest.fixture(scope="module")
def shipped() -> Scores:
    return score(Trigrams(), SHIPPED, data=DATA)


# Scores.


def test_trigrams_score_what_trigrams_are_worth(shipped: Scores) -> None:
    got = shipped.by_task
    assert list(got) == SHIPPED
    assert 60 < got["PE-STSb-dev"] < 80
    assert 70 < got["PE-XQuAD"] < 95
    assert 45 < got["PE-Banking77"] < 75


def test_shuffled_embeddings_score_nothing() -> None:
    got = score(Shuffled(), SHIPPED, data=DATA).by_task
    assert abs(got["PE-STSb-dev"]) < 10
    assert got["PE-XQuAD"] < 5
    assert got["PE-Banking77"] < 5


def test_means(shipped: Scores) -> None:
    sts, retrieval, classification = shipped.by_task.values()
    assert shipped.by_type == {"STS": sts, "Retrieval": retrieval, "Classification": classification}
    assert shipped.mean == pytest.approx((sts + retrieval + classification) / 3)


def test_every_task_of_the_table_runs(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert available(tiny) == list(TASKS)
    scores = score(Trigrams(), data=tiny)
    assert capfd.readouterr() == ("", "")
    assert list(scores.tasks) == list(TASKS)
    assert {task.type for task in scores.tasks.values()} == {entry.kind for entry in TASKS.values()}
    floor = {"STS": 40, "Clustering": 60}
    assert all(task.score > floor.get(task.type, 90) for task in scores.tasks.values()), scores.by_task


def test_two_runs_are_equal(tiny: Path) -> None:
    names = [next(name for name, entry in TASKS.items() if entry.kind == kind) for kind in MAIN_SCORES]
    assert score(Trigrams(), names, data=tiny).by_task == score(Trigrams(), names, data=tiny).by_task


def test_tasks_of_a_folder_are_those_whose_files_are_there(tmp_path: Path, tiny: Path) -> None:
    write(tmp_path / "eval/trec_test.jsonl", tiny_rows("trec"))
    assert available(tmp_path) == []
    write(tmp_path / "train/trec.jsonl", tiny_rows("trec"), packed=True)
    assert available(tmp_path) == ["PE-TREC"]


def test_the_revision_of_a_task_follows_its_files(tmp_path: Path) -> None:
    file = tmp_path / "eval/sts12.jsonl"
    write(file, tiny_rows("sts"))
    before = offline_task("PE-STS12", tmp_path).metadata.revision
    assert before == offline_task("PE-STS12", tmp_path).metadata.revision
    write(file, tiny_rows("sts")[1:])
    assert before != offline_task("PE-STS12", tmp_path).metadata.revision


def test_scoring_leaves_the_random_states_alone(tiny: Path) -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draws()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    score(Trigrams(), ["PE-STS12"], data=tiny)
    assert draws() == expected


def test_importing_mteb_while_scoring_leaves_the_random_states_alone(tiny: Path) -> None:
    program = f"""
import random, torch
from pathlib import Path
from pe.evaluate import score, EvaluationError
torch.manual_seed(5); expected = torch.rand(())
torch.manual_seed(5)
try:
    score(None, ["no such task"], data=Path({str(tiny)!r}))
except EvaluationError:
    pass
assert torch.rand(()) == expected
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=DATA.parent)


@pytest.mark.parametrize("name", ["PE-STSb-dev", "PE-XQuAD", "PE-Banking77"])
def test_a_distinct_text_is_encoded_once(name: str) -> None:
    encoder = Trigrams()
    score(encoder, [name], data=DATA)
    assert len(encoder.texts) == len(set(encoder.texts)) > 1000


# Instructions and sides.


def test_sides_of_a_retrieval_task(tiny: Path) -> None:
    encoder = Trigrams()
    scores = score(encoder, ["PE-XQuAD"], data=tiny)
    assert encoder.calls == [("query", TASKS["PE-XQuAD"].instruction), ("document", PASSAGE)]
    assert scores.tasks["PE-XQuAD"].document_instruction == PASSAGE


@pytest.mark.parametrize("name", ["PE-STS12", "PE-MRPC", "PE-TREC", "PE-TwentyNewsgroups"])
def test_a_symmetric_task_is_all_query(name: str, tiny: Path) -> None:
    encoder = Trigrams()
    scores = score(encoder, [name], data=tiny)
    assert set(encoder.calls) == {("query", TASKS[name].instruction)}
    assert scores.tasks[name].document_instruction is None


def test_instructions_of_the_caller_come_first(tiny: Path) -> None:
    encoder = Trigrams()
    given = {"PE-XQuAD": "Find it", "PE-XQuAD-document": "Be found"}
    scores = score(encoder, ["PE-XQuAD", "PE-STS12"], data=tiny, instructions=given)
    assert set(encoder.calls) == {("query", "Find it"), ("document", "Be found"), ("query", SIMILAR)}
    task = scores.tasks["PE-XQuAD"]
    assert (task.instruction, task.document_instruction) == ("Find it", "Be found")


def test_a_text_is_encoded_again_under_another_instruction(tiny: Path) -> None:
    encoder = Trigrams()
    score(encoder, ["PE-STS12", "PE-MRPC"], data=tiny)
    assert encoder.texts == [*dict.fromkeys(encoder.texts)] * 2
    assert set(encoder.calls) == {("query", SIMILAR), ("query", TASKS["PE-MRPC"].instruction)}


def test_instructions_of_mteb_tasks() -> None:
    model = MtebEncoder(Trigrams())
    asked = mteb.get_task("NFCorpus").metadata
    sentence = "Given a question, retrieve relevant documents that best answer the question"
    assert [model.instruction(asked, side) for side in ("query", "document")] == [sentence, sentence]
    assert model.instruction(mteb.get_task("STS12").metadata, "query") == "Retrieve semantically similar text."


# mteb itself.


def test_mock_tasks_of_mteb() -> None:
    """Every task of texts that mteb has a mock of, by an embedder of ours, which says what it is."""
    embedder = with_reader()
    embedder.training_sets = ("banking77", "owner/name")
    model = MtebEncoder(embedder)
    run = mteb.mock_run(model)
    assert run.all_passed
    assert sum(type(found).__name__ == "TaskResult" for _, found in run.items()) >= 25
    meta, parameters = model.mteb_model_meta, list(embedder.parameters())
    assert (meta.embed_dim, meta.max_tokens) == (32, 100)
    assert meta.n_parameters == sum(map(torch.numel, parameters))
    assert meta.n_embedding_parameters == VOCABULARY * (32 + 24)
    assert meta.memory_usage_mb == pytest.approx(4 * meta.n_parameters / 2**20)
    assert meta.training_datasets == {"Banking77Classification", "PE-Banking77", "owner/name"}


# Benchmarks of mteb.

ENGLISH = "MTEB(eng, v2)"


def test_the_table_of_a_benchmark_has_a_sentence_for_every_task() -> None:
    tasks = {task.metadata.name: task.metadata for task in mteb.get_benchmark(ENGLISH).tasks}
    table = instructions_of(ENGLISH)
    sided = {name for name, task in tasks.items() if task.type in ("Retrieval", "Reranking")}
    assert table.keys() == tasks.keys() | {f"{name}-document" for name in sided}
    assert all(sentence.strip() for sentence in table.values())


def test_tasks_of_a_benchmark_are_those_of_its_languages(tiny: Path) -> None:
    found = find_tasks(["STS17", "MassiveIntentClassification"], tiny, ENGLISH)
    assert {name: task.hf_subsets for name, task in found.items()} == {
        "STS17": ["en-en"],
        "MassiveIntentClassification": ["en"],
    }
    assert len(find_tasks([], tiny, ENGLISH)) == 41
    with pytest.raises(EvaluationError, match=r"unknown 'MTEB\(eng v2\)'; did you mean 'MTEB\(eng, v2\)'"):
        find_tasks([], tiny, "MTEB(eng v2)")
    with pytest.raises(EvaluationError, match=r"MTEB\(eng, v2\): no task 'STS171'; did you mean 'STS17'"):
        find_tasks(["STS171"], tiny, ENGLISH)


def test_a_benchmark_by_the_command(
    loaded: Trigrams, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tasks under the table's sentences, a caller's before them; scores stand in the file after every task."""
    from mteb.mocks.mock_tasks import MockRetrievalTask, MockSTSTask

    small = mteb.Benchmark(name=ENGLISH, tasks=[MockSTSTask(), MockRetrievalTask()])
    monkeypatch.setattr(mteb, "get_benchmark", {ENGLISH: small}.__getitem__)
    sentences = {"MockSTSTask": "Alike", "MockRetrievalTask": "Find", "MockRetrievalTask-document": "Be found"}
    monkeypatch.setitem(known()["instructions"], ENGLISH, sentences)
    output = tmp_path / "scores.json"
    written: list[list[str]] = []
    encode = loaded.encode

    def noting(texts: Sequence[str], **options: Any) -> np.ndarray:
        written.append(list(json.loads(output.read_text())["tasks"]) if output.exists() else [])
        return encode(texts, **options)

    monkeypatch.setattr(loaded, "encode", noting)
    options = ["model", "--benchmark", ENGLISH, "--data", str(tiny), "--output", str(output)]
    main([*options, "--instruction", "MockSTSTask=Mine"])
    assert set(loaded.calls) == {("query", "Mine"), ("query", "Find"), ("document", "Be found")}
    assert list(json.loads(output.read_text())["tasks"]) == ["MockSTSTask", "MockRetrievalTask"]
    assert (written[0], written[-1]) == ([], ["MockSTSTask"])
    assert "ndcg_at_10" in capsys.readouterr().out


def test_a_cache_keeps_revisions_and_instructions_apart(tiny: Path, tmp_path: Path) -> None:
    cache = mteb.ResultCache(tmp_path)

    def run(encoder: Trigrams, **instructions: str) -> float:
        model = MtebEncoder(encoder, instructions=instructions)
        result = mteb.evaluate(model, offline_task("PE-STS12", tiny), cache=cache, show_progress_bar=False)
        return result.task_results[0].get_score()

    first, again, other, instructed = Trigrams(), Trigrams(), Shuffled("2"), Trigrams()
    other.name = first.name
    value = run(first)
    assert run(again) == pytest.approx(value, abs=1e-5)
    assert first.calls
    assert not again.calls
    assert run(other) != pytest.approx(value, abs=0.01)
    run(instructed, **{"PE-STS12": "Another sentence"})
    assert instructed.calls


def test_an_encoder_that_changes_is_encoded_anew(tiny: Path) -> None:
    encoder = Trigrams()
    model = MtebEncoder(encoder)

    def run() -> int:
        mteb.evaluate(model, offline_task("PE-STS12", tiny), cache=None, show_progress_bar=False)
        return len(encoder.texts)

    once = run()
    assert run() == once > 0
    encoder.revision = "2"
    assert run() == 2 * once


def test_score_reads_no_cache(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path))
    for _ in range(2):
        encoder = Trigrams()
        score(encoder, ["PE-STS12"], data=tiny)
        assert encoder.calls
    assert not list(tmp_path.iterdir())


# Errors.


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["STSb-dev"], r"unknown task 'STSb-dev'; did you mean 'PE-STSb-dev'\?"),
        (["STS1x2"], r"unknown task 'STS1x2'; did you mean 'STS12'\?"),
        (["PE-SICK"], r"expected .*sick_test\.jsonl or .*sick_test\.jsonl\.xz, found none; tasks in .*: PE-STSb-dev"),
    ],
)
def test_task_names(names: list[str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        score(Trigrams(), names, data=DATA)


def test_offline_task_knows_its_table() -> None:
    with pytest.raises(EvaluationError, match=r"'PE-STSb-dew'; did you mean 'PE-STSb-dev'\?; known tasks: PE-STSb-"):
        offline_task("PE-STSb-dew", DATA)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="expected a folder of tasks, found none"):
        score(Trigrams(), data=tmp_path / "none")
    with pytest.raises(EvaluationError, match=r"expected the files of at least one task, such as eval/stsb_dev\.jsonl"):
        score(Trigrams(), data=tmp_path)


def test_files_with_suffixes_in_capitals(tmp_path: Path) -> None:
    for name in ("sts12.Jsonl.XZ", "STS14.jsonl", "medquad/corpus.JSONL", "medquad/queries.jsonl", "medquad/qrels.TSV"):
        (tmp_path / "eval" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "eval" / name).touch()
    assert available(tmp_path) == ["PE-STS12", "PE-MedQuAD"]


def test_a_damaged_file(tmp_path: Path) -> None:
    write(tmp_path / "eval/sts12.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 1.0}, {"sentence1": "a"}])
    with pytest.raises(DataError, match=r"sts12\.jsonl:2: expected the key 'sentence2'"):
        score(Trigrams(), ["PE-STS12"], data=tmp_path)


@pytest.mark.parametrize(
    ("task", "file", "row", "message"),
    [
        ("PE-STS12", "sts12", {"sentence1": "a", "sentence2": "b", "score": "high"}, "score: expected a finite number"),
        ("PE-STS12", "sts12", {"sentence1": "a", "sentence2": None, "score": 1}, "sentence2: expected a string"),
        ("PE-WikiQA", "wikiqa_test", {"query": "a", "positive": "b", "negative": []}, "positive: expected a list"),
    ],
)
def test_values_of_another_type(task: str, file: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / f"eval/{file}.jsonl", [row])
    with pytest.raises(DataError, match=rf"{file}\.jsonl:1: {message}"):
        score(Trigrams(), [task], data=tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"PE-XQuaD": "Find"}, r"no task 'PE-XQuaD' here; did you mean 'PE-XQuAD'\?"),
        ({"PE-XQuAD": " "}, "PE-XQuAD: expected a sentence, got ' '"),
    ],
)
def test_instructions_that_reach_no_task(given: dict[str, str], message: str, tiny: Path) -> None:
    with pytest.raises(EvaluationError, match=message):
        score(Trigrams(), ["PE-XQuAD"], data=tiny, instructions=given)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [(OneShort(), r"expected \[16, D\], got \[15, 512\]"), (NotFinite(), "1 of 16 embeddings are not finite")],
)
def test_embeddings_that_cannot_be(encoder: Trigrams, message: str, tmp_path: Path) -> None:
    pairs = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": float(i)} for i in range(16)]
    write(tmp_path / "eval/sts12.jsonl", pairs)
    with pytest.raises(ValueError, match=message):
        score(encoder, ["PE-STS12"], data=tmp_path)


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'mteb/sts12-sts' on the Hub")

    monkeypatch.setattr("mteb.abstasks.abstask.load_dataset", unreachable)
    with pytest.raises(EvaluationError, match=r"STS12: its data could not be loaded from the .* hub: Couldn't reach"):
        score(Trigrams(), ["STS12"], data=tiny)


def test_evaluation_without_mteb(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(MissingPackage, match=r"pip install 'promptembedder\[eval\]'"):
        score(Trigrams(), data=tiny)


# Output.


def test_json_of_scores(shipped: Scores, tmp_path: Path) -> None:
    shipped.write(tmp_path / "scores.json")
    read = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert (read["model"], read["revision"], read["mean"]) == ("trigrams", "1", shipped.mean)
    assert read["by_type"] == shipped.by_type
    assert {name: task["score"] for name, task in read["tasks"].items()} == shipped.by_task


def test_an_undefined_score_is_not_a_number(tiny: Path, tmp_path: Path) -> None:
    scores = score(Constant(), ["PE-STS12"], data=tiny)
    assert np.isnan(scores.by_task["PE-STS12"])
    scores.write(tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["mean"] is None


def test_scores_side_by_side(tiny: Path) -> None:
    from rich.console import Console

    before = score(Shuffled(), ["PE-STS12"], data=tiny)
    after = score(Trigrams(), ["PE-STS12", "PE-XQuAD"], data=tiny)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(comparison({"before": before, "after": after}, title="Run"))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in captured.get().splitlines()]
    rows = {row[0]: row[1:] for row in cells if row}
    assert rows["PE-STS12"] == ["cosine_spearman", *(f"{s.by_task['PE-STS12']:.2f}" for s in (before, after))]
    assert rows["PE-XQuAD"][1] == "-"
    assert rows["All tasks"] == ["mean", f"{before.mean:.2f}", f"{after.mean:.2f}"]


# The command.


def code_of(arguments: list[str]) -> object:
    """What a command ends with."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return stopped.value.code


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Trigrams:
    encoder = Trigrams()
    monkeypatch.setattr(pe.evaluate, "load_encoder", lambda *_, **__: encoder)
    return encoder


def test_the_command(loaded: Trigrams, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "scores.json"
    options = ["model", "--tasks", "PE-STS12,PE-XQuAD", "--data", str(tiny), "--output", str(output)]
    main([*options, "--instruction", "PE-XQuAD=Find a = b", "--instruction", "PE-STS12=Compare"])
    printed = capsys.readouterr().out
    assert "PE-STS12" in printed
    assert "ndcg_at_10" in printed
    assert set(loaded.calls) == {("query", "Find a = b"), ("document", PASSAGE), ("query", "Compare")}
    assert list(json.loads(output.read_text(encoding="utf-8"))["tasks"]) == ["PE-STS12", "PE-XQuAD"]


def test_scores_are_not_overwritten_unasked(
    loaded: Trigrams, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.json"
    output.write_text("precious")
    options = ["model", "--tasks", "PE-STS12", "--data", str(tiny), "--output", str(output)]
    assert code_of(options) == 2
    assert f"--output: {output} exists already; give --overwrite" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert not loaded.calls
    main([*options, "--overwrite"])
    assert "PE-STS12" in json.loads(output.read_text(encoding="utf-8"))["tasks"]


def test_an_interrupt_ends_with_a_line(
    loaded: Trigrams, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pe.evaluate, "score", interrupt)
    assert code_of(["model", "--data", str(tiny), "--tasks", "PE-STS12"]) == 130
    assert capsys.readouterr().err == "pe.evaluate: interrupted\n"


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used(
    device: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of([str(tmp_path), "--data", str(tiny), "--device", device]) == 2
    assert f"device: expected one that can be used here, such as cpu, got '{device}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "PE-XQAD"], "unknown task 'PE-XQAD'; did you mean 'PE-XQuAD'?"),
        (["--data", "no/such/folder"], "expected a folder of tasks, found none at no/such/folder"),
        (["--instruction", "PE-STS12"], "--instruction: expected TASK=TEXT, got 'PE-STS12'"),
        (["--tasks", "PE-STS12", "--instruction", "PE-XQuAD=Find"], "no task 'PE-XQuAD' here"),
        (["--output", "."], "--output: expected a file, got the folder ."),
    ],
)
def test_bad_options(
    options: list[str], message: str, loaded: Trigrams, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(["model", "--data", str(tiny), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not loaded.calls


def test_an_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["model", "--taks", "PE-STS12"]) == 2
    assert "--taks" in capsys.readouterr().err


def test_a_model_that_is_not_there(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of([str(tmp_path / "none"), "--data", str(tiny)]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
