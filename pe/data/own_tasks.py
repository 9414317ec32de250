"""Tasks of a user's own files: pairs, scored pairs, or a folder with corpus, queries and relevance judgements.

A file has one of the layouts of training data (`pe/data/layouts.py`) and comes through the same doors. Pairs become
retrieval of the positives among all positives and negatives of the file; scored pairs become STS, or, where all scores
are 0 or 1, classification of pairs. A folder is as BEIR has it: `corpus` (`_id` or `id`, `title` if there is one,
`text`) and `queries` (`_id` or `id`, `text`), files of any kind that is read, and `qrels.tsv`, or one file in `qrels/`;
a column `metadata` is not read.

A task goes by its path, and has no instruction of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pe.data.layouts import Layout, detect
from pe.data.records import DataError, Record, RecordError, check_string, read_qrels
from pe.data.tables import HUB, files, named, records
from pe.data.tasks import Kind, TaskEntry, build_task, by_id, retrieval_part

Task = tuple[Kind, Callable[[], dict[str, Any]]]
"""What kind of task it is, and what gives its data in mteb's form."""
SPLIT = "test"
CORPUS, QUERIES = "corpus", "queries"


def is_own(name: str) -> bool:
    """Whether a task's name is a file, a folder or a set of the hub."""
    return name.startswith(HUB) or bool(named(name)[1]) or "/" in name


def own_task(name: str) -> Any:
    """The task of a file or a folder.

    Raises:
        DataError: nothing is there, or it cannot be used.
    """
    kind, read = _folder_task(Path(name)) if _is_retrieval(Path(name)) else _file_task(name)
    content = [Path(file) for file in files(name)]
    return build_task(name, TaskEntry(kind=kind, files=(name,), instruction=""), content, read)


def _is_retrieval(folder: Path) -> bool:
    return folder.is_dir() and any(file.name.startswith(CORPUS) for file in folder.iterdir())


def _read_rows(path: str) -> tuple[Layout, list[Record]]:
    """The layout of a file and its records.

    Raises:
        DataError: a bad row, or one with an instruction: a task has one for all.
    """
    layout: Layout | None = None
    found = []
    for number, row in records(path):
        try:
            layout = layout or detect(row)
            record = layout.record(row)
            if "instruction" in record:
                cure = "; give evaluate.instructions, which holds for all rows"
                raise RecordError("instruction", f"expected a row without an instruction of its own, got one{cure}")
        except RecordError as bad:
            raise DataError(f"{path}:{number}: {bad}") from bad
        found.append(record)
    assert layout is not None
    return layout, found


def _file_task(path: str) -> Task:
    """Retrieval, STS or classification of pairs, as the rows are.

    Raises:
        DataError: see `_read_rows`; or labelled texts, or scores that are all the same.
    """
    layout, rows = _read_rows(path)
    if layout.kind == "labelled":
        raise DataError(f"{path}: expected pairs, scored pairs or a folder with corpus, queries and qrels, got labels")
    if layout.kind == "pairs":
        return "Retrieval", lambda: _retrieval(rows)
    scores = {record["score"] for record in rows}
    is_binary = scores <= {0, 1}
    if len(scores) < 2:
        raise DataError(f"{path}: expected scores that differ, got {scores.pop()} throughout")
    sides = {side: [record[side] for record in rows] for side in ("sentence1", "sentence2")}
    judged = [int(record["score"]) if is_binary else float(record["score"]) for record in rows]
    column = {"label" if is_binary else "score": judged}

    def table() -> dict[str, Any]:
        from datasets import Dataset

        return {SPLIT: Dataset.from_dict(sides | column)}

    return "PairClassification" if is_binary else "STS", table


def _retrieval(rows: list[Record]) -> dict[str, Any]:
    """Every text once; rows of one query are one query with the positives of all."""
    texts = dict.fromkeys(text for row in rows for text in [*row["positives"], *row.get("negatives", ())])
    documents = {text: f"d{place}" for place, text in enumerate(texts)}
    queries = {text: f"q{place}" for place, text in enumerate(dict.fromkeys(row["query"] for row in rows))}
    relevant: dict[str, dict[str, int]] = {}
    for row in rows:
        relevant.setdefault(queries[row["query"]], {}).update({documents[text]: 1 for text in row["positives"]})
    corpus, asked = (by_id({name: text for text, name in names.items()}) for names in (documents, queries))
    return retrieval_part(SPLIT, corpus, asked, relevant)


def _folder_task(folder: Path) -> Task:
    """Retrieval of a folder's corpus.

    Raises:
        DataError: a part is missing or damaged, or judgements are of ids that are not there.
    """
    places = [_one(folder.glob(f"{name}.*"), folder, f"{name}.jsonl") for name in (CORPUS, QUERIES)]
    corpus, queries = (dict(_identified(place)) for place in places)
    judged = _one([*folder.glob("qrels.tsv*"), *folder.glob("qrels/*.tsv*")], folder, "qrels.tsv")
    relevant = read_qrels(judged)
    documents = {document for of_query in relevant.values() for document in of_query}
    for what, wanted, known in (("query", set(relevant), queries), ("document", documents, corpus)):
        if missing := wanted - known.keys():
            raise DataError(f"{judged}: expected judgements of what is there, got the {what} {min(missing)!r}")
    asked = {name: text for name, text in queries.items() if name in relevant}
    return "Retrieval", lambda: retrieval_part(SPLIT, by_id(corpus), by_id(asked), relevant)


def _one(found: Iterable[Path], folder: Path, name: str) -> Path:
    several = sorted(found)
    if len(several) != 1:
        got = ", ".join(path.name for path in several) or "none"
        raise DataError(f"{folder}: expected one file such as {name}, got {got}")
    return several[0]


def _identified(path: Path) -> Iterator[tuple[str, str]]:
    """Ids and texts of a file, each text behind its title."""
    seen: set[str] = set()
    for number, row in records(str(path)):
        try:
            names = [name for name in ("_id", "id") if name in row]
            if len(names) != 1 or "text" not in row or row.keys() - {*names, "text", "title", "metadata"}:
                raise RecordError("columns", f"expected the columns _id, title?, text, got {', '.join(row)}")
            for column in (names[0], "text", *(["title"] if row.get("title") else [])):
                check_string(column, row[column])
            if row[names[0]] in seen:
                raise RecordError("repeated id", f"expected each id once, got {row[names[0]]!r} again")
        except RecordError as bad:
            raise DataError(f"{path}:{number}: {bad}") from bad
        seen.add(row[names[0]])
        yield row[names[0]], f"{row.get('title') or ''} {row['text']}".strip()
