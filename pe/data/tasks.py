"""Tasks of mteb that read local files: no hub is needed.

A data folder holds `eval/` and `train/` with one JSON object a line, in files that end in `.jsonl` or `.jsonl.xz`, and
relevance judgements as `qrels.tsv`. `TASKS` says which files and instructions make a task, `available` those whose
files are there.

Settings are chosen so that a score is cheap enough for a training run. Classification fits mteb's logistic regression
on `samples_per_label` texts of each label, in `n_experiments` draws from a fixed seed (mteb's own default is 10 draws),
and reports their mean accuracy on the whole test part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pe.config import nearest
from pe.data.records import DataError, read_jsonl, read_qrels

if TYPE_CHECKING:  # mteb takes seconds to import and is optional: what builds tasks imports it
    from mteb.abstasks.abstask import AbsTask
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

Floats = npt.NDArray[np.float32]
Kind = Literal["STS", "Retrieval", "Reranking", "Classification", "PairClassification", "Clustering"]

PASSAGE = "Represent the passage for retrieval"
SIMILAR = "Retrieve semantically similar text"


class EvaluationError(ValueError):
    """An evaluation that cannot be run; the message says what was asked for, what was expected, what is known."""


def check_embeddings(name: str, rows: Floats, count: int) -> Floats:
    """Rows of the encoder `name`, as they came.

    Raises:
        ValueError: they are not `[count, D]`, or not finite.
    """
    if rows.ndim != 2 or len(rows) != count:
        raise ValueError(f"{name}: encode: expected [{count}, D], got {list(rows.shape)}")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        raise ValueError(f"{name}: encode: {bad} of {count} embeddings are not finite")
    return rows


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """A task: its files below the data folder, and the sentences its texts are encoded under."""

    kind: Kind
    files: tuple[str, ...]
    instruction: str
    """Of queries, and of all texts where a task has no sides."""
    document_instruction: str | None = None
    license: str = "not specified"
    split: str = "test"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the mteb task that differ from those of its kind."""


def _sts(file: str, license: str, **others: Any) -> TaskEntry:
    return TaskEntry(kind="STS", files=(f"eval/{file}.jsonl",), instruction=SIMILAR, license=license, **others)


def _labelled(name: str, instruction: str, license: str, **others: Any) -> TaskEntry:
    files = (f"train/{name}.jsonl", f"eval/{name}_test.jsonl")
    return TaskEntry(kind="Classification", files=files, instruction=instruction, license=license, **others)


def _retrieval(folder: str, instruction: str, license: str = "not specified") -> TaskEntry:
    files = tuple(f"eval/{folder}/{name}" for name in ("corpus.jsonl", "queries.jsonl", "qrels.tsv"))
    return TaskEntry(
        kind="Retrieval", files=files, instruction=instruction, document_instruction=PASSAGE, license=license
    )


def _pairs(file: str, instruction: str, license: str) -> TaskEntry:
    return TaskEntry(kind="PairClassification", files=(f"eval/{file}.jsonl",), instruction=instruction, license=license)


TASKS: dict[str, TaskEntry] = {
    "PE-STSb-dev": _sts("stsb_dev", "cc-by-sa-4.0", split="validation"),
    "PE-STSb-test": _sts("stsb_test", "cc-by-sa-4.0"),
    "PE-STS12": _sts("sts12", "not specified"),
    "PE-STS14": _sts("sts14", "not specified"),
    "PE-SICK": _sts("sick_test", "cc-by-nc-sa-3.0", settings={"min_score": 1}),
    "PE-MedQuAD": _retrieval("medquad", "Given a medical question, retrieve passages that answer it", "cc-by-4.0"),
    "PE-XQuAD": _retrieval("xquad", "Given a question, retrieve Wikipedia passages that answer it", "cc-by-sa-4.0"),
    "PE-Cranfield": _retrieval(
        "cranfield", "Given a question on aerodynamics, retrieve abstracts of papers that answer it"
    ),
    "PE-Med": _retrieval("med", "Given a medical question, retrieve abstracts of papers that answer it"),
    "PE-ArguAna": _retrieval("arguana", "Given an argument, retrieve the argument that refutes it"),
    "PE-WikiQA": TaskEntry(
        kind="Reranking",
        files=("eval/wikiqa_test.jsonl",),
        instruction="Given a question, retrieve Wikipedia sentences that answer it",
        document_instruction=PASSAGE,
    ),
    "PE-Banking77": _labelled("banking77", "Given an online banking query, find its intent", "cc-by-4.0"),
    "PE-CLINC150": _labelled("clinc150", "Given a request to an assistant, find its intent", "cc-by-3.0"),
    "PE-TREC": _labelled(
        "trec", "Given a question, find the type of its answer", "not specified", settings={"samples_per_label": 64}
    ),
    "PE-QQP": _pairs("qqp_test", "Retrieve questions that ask the same as the given question", "not specified"),
    "PE-MRPC": _pairs("mrpc_test", "Retrieve sentences that say the same as the given sentence", "msr-la-nc"),
    "PE-TwentyNewsgroups": TaskEntry(
        kind="Clustering",
        files=("eval/twentynewsgroups_subjects.jsonl",),
        instruction="Identify the topic of the given news group subject",
    ),
}

MAIN_SCORES: dict[Kind, str] = {
    "STS": "cosine_spearman",
    "Retrieval": "ndcg_at_10",
    "Reranking": "map_at_1000",
    "Classification": "accuracy",
    "PairClassification": "max_ap",
    "Clustering": "v_measure",
}

SETTINGS: dict[Kind, dict[str, Any]] = {
    "STS": {},
    "Retrieval": {"k_values": (1, 3, 5, 10, 20, 100)},
    "Reranking": {},
    "Classification": {"n_experiments": 3, "samples_per_label": 8},
    "PairClassification": {"label_column_name": "label"},
    "Clustering": {
        "input_column_name": "text",
        "label_column_name": "label",
        "max_fraction_of_documents_to_embed": None,
        "max_documents_per_cluster": 2048,
        "n_clusters": 5,  # draws, in mteb's words
    },
}


def locate(data: Path, file: str) -> Path | None:
    """A file of the data folder, plain or compressed; its suffixes may be in capitals."""
    wanted = data / file
    beside = sorted(wanted.parent.glob(f"{wanted.stem}.*"))  # of two names, the one in small letters comes last
    found = {path.name.lower(): path for path in beside if path.is_file()}
    return found.get(wanted.name) or found.get(f"{wanted.name}.xz")


def available(data: Path) -> list[str]:
    """Names of the tasks whose files are all in a data folder."""
    return [name for name, entry in TASKS.items() if all(locate(data, file) for file in entry.files)]


def offline_task(name: str, data: Path) -> AbsTask:
    """The task of this name, over the files in `data`, which are read when it is run.

    Creating a task of mteb seeds the random generators of Python, NumPy and torch.

    Raises:
        EvaluationError: the name is unknown, or one of its files is missing.
    """
    if name not in TASKS:
        raise EvaluationError(f"unknown task {name!r}{nearest(name, list(TASKS))}; known tasks: {', '.join(TASKS)}")
    entry = TASKS[name]
    paths = [locate(data, file) for file in entry.files]
    for path, file in zip(paths, entry.files, strict=True):
        if path is None:
            known = ", ".join(available(data)) or "none"
            raise EvaluationError(f"{name}: expected {data / file} or {file}.xz, found none; tasks in {data}: {known}")
    found = [path for path in paths if path]
    return build_task(name, entry, found, lambda: READERS[entry.kind](found, entry.split))


def build_task(name: str, entry: TaskEntry, paths: Sequence[Path], read: Callable[[], dict[str, Any]]) -> AbsTask:
    """A task of mteb, of a class of its own: mteb looks for a task's metadata on its class.

    Args:
        name: what it goes by.
        entry: its kind and instructions; an empty instruction is none.
        paths: its files, whose content is its revision.
        read: gives its data in mteb's form, when it is run.
    """
    from mteb.abstasks.classification import AbsTaskClassification
    from mteb.abstasks.clustering import AbsTaskClustering
    from mteb.abstasks.pair_classification import AbsTaskPairClassification
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    class Classification(AbsTaskClassification):
        def _calculate_scores(self, y_test: Any, y_pred: Any) -> Any:
            return super()._calculate_scores(list(y_test), y_pred)  # a column of `datasets` is ten times slower

    bases: dict[Kind, type[AbsTask]] = {
        "STS": AbsTaskSTS,
        "Retrieval": AbsTaskRetrieval,
        "Reranking": AbsTaskRetrieval,
        "Classification": Classification,
        "PairClassification": AbsTaskPairClassification,
        "Clustering": AbsTaskClustering,
    }
    prompt: Any = entry.instruction or None
    if entry.document_instruction:
        prompt = {"query": entry.instruction, "document": entry.document_instruction}
    metadata = TaskMetadata(
        name=name,
        description=f"{name.removeprefix('PE-')} from local files: {', '.join(entry.files)}",
        type=entry.kind,
        category="t2c" if entry.kind in ("Classification", "Clustering") else "t2t",
        main_score=MAIN_SCORES[entry.kind],
        eval_splits=[entry.split],
        eval_langs=["eng-Latn"],
        dataset={"path": f"local/{name}", "revision": _content_hash(paths)},
        prompt=prompt,
        license=entry.license,
        bibtex_citation="",
    )

    def load_data(self: Any, *_: Any, **__: Any) -> None:
        if not self.data_loaded:
            self.dataset = read()
            self.data_loaded = True

    attributes = {"metadata": metadata, "load_data": load_data, **SETTINGS[entry.kind], **entry.settings}
    task: AbsTask = type(f"Offline{entry.kind}", (bases[entry.kind],), attributes)()
    return task


def _content_hash(paths: Sequence[Path]) -> str:
    content = hashlib.sha256()
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def _columns(path: Path, *keys: str) -> Any:
    """A `datasets.Dataset` of these keys of a file's records.

    Raises:
        DataError: the file cannot be used, or has labels of both types.
    """
    from datasets import Dataset

    records = read_jsonl(path, keys, checked=True)
    columns = {key: [record[key] for record in records] for key in keys}
    if "score" in columns:
        columns["score"] = [float(score) for score in columns["score"]]
    of_type = {type(label): label for label in columns.get("label", ())}
    if len(of_type) > 1:
        got = " and ".join(map(repr, of_type.values()))
        raise DataError(f"{path}: label: expected strings or integers throughout, got {got:.80}")
    return Dataset.from_dict(columns)


def _reader(*keys: str) -> Callable[[Sequence[Path], str], dict[str, Any]]:
    """Reads a task of one file with these keys."""
    return lambda paths, split: {split: _columns(paths[0], *keys)}


def _read_classification(paths: Sequence[Path], split: str) -> dict[str, Any]:
    from datasets import DatasetDict

    return DatasetDict({"train": _columns(paths[0], "text", "label"), split: _columns(paths[1], "text", "label")})


def _read_retrieval(paths: Sequence[Path], split: str) -> dict[str, dict[str, RetrievalSplitData]]:
    corpus, queries, qrels = paths
    documents = _columns(corpus, "_id", "title", "text").rename_column("_id", "id")
    return retrieval_part(
        split, documents, _columns(queries, "_id", "text").rename_column("_id", "id"), read_qrels(qrels)
    )


def by_id(texts: Mapping[str, str]) -> Any:
    """A table of `id` and `text`."""
    from datasets import Dataset

    return Dataset.from_dict({"id": list(texts), "text": list(texts.values())})


def retrieval_part(
    split: str,
    corpus: Any,
    queries: Any,
    relevant: dict[str, dict[str, int]],
    candidates: dict[str, list[str]] | None = None,
) -> dict[str, dict[str, RetrievalSplitData]]:
    """The data of a retrieval task: tables (see `by_id`), judgements, and what is ranked where that is not all."""
    part: RetrievalSplitData = {
        "corpus": corpus,
        "queries": queries,
        "relevant_docs": relevant,
        "top_ranked": candidates,
    }
    return {"default": {split: part}}


def _read_reranking(paths: Sequence[Path], split: str) -> dict[str, dict[str, RetrievalSplitData]]:
    """Candidates of query i are documents `q{i}-0`, `q{i}-1`, ...; the relevant ones come last, so ties cost."""
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    relevant: dict[str, dict[str, int]] = {}
    candidates: dict[str, list[str]] = {}
    for i, record in enumerate(read_jsonl(paths[0], ("query", "positive", "negative"), checked=True)):
        query, texts = f"q{i}", [*record["negative"], *record["positive"]]
        queries[query] = record["query"]
        candidates[query] = [f"{query}-{n}" for n in range(len(texts))]
        documents.update(zip(candidates[query], texts, strict=True))
        relevant[query] = dict.fromkeys(candidates[query][len(record["negative"]) :], 1)
    return retrieval_part(split, by_id(documents), by_id(queries), relevant, candidates)


READERS: dict[Kind, Callable[[Sequence[Path], str], dict[str, Any]]] = {
    "STS": _reader("sentence1", "sentence2", "score"),
    "Retrieval": _read_retrieval,
    "Reranking": _read_reranking,
    "Classification": _read_classification,
    "PairClassification": _reader("sentence1", "sentence2", "label"),
    "Clustering": _reader("text", "label"),
}
