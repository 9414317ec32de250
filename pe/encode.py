"""`python -m pe.encode MODEL INPUT OUTPUT [--instruction TEXT] [--store DIR] [--engine ray]`

Several instructions are a JSON list: `--instruction '["TEXT", ...]'`.

INPUT: `.txt`, or `-` for standard input (a text a line, in UTF-8; only `\\n` or `\\r\\n` ends a line), or rows with the
column named by --field: JSON Lines, JSON, csv, tsv (each also .xz, .gz), parquet, a folder of `save_to_disk`,
`hf://owner/name[:config][@split]`. OUTPUT: `.npy` holds `[N, D]`, or `[I, N, D]` for I instructions; `.jsonl` and
`.parquet` hold a row a text with its embedding (one for each instruction) behind the text, or, with --keep, behind all
columns of the input.

An OUTPUT without a suffix is a folder of parquet shards, for more rows than memory holds: INPUT is then a file, folder
or pattern of parquet, JSON Lines, csv, tsv or text at any address of fsspec; what is finished is not repeated
(`docs/encode-at-scale.md`).
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from jsonargparse import Namespace

from pe.bulk.columns import Embeddings, column_names, shortened, table_of, vectors
from pe.bulk.command import encode_folder
from pe.bulk.engines import EngineName
from pe.bulk.job import SHARD_ROWS
from pe.config import Dtype, StoreDtype
from pe.data.records import DataError, Record, RecordError, braced, check_unicode, read_lines
from pe.data.tables import records, text_under
from pe.method.loading import quiet, usable_device
from pe.method.text_store import DEFAULT_GIB, TextStore
from pe.model import PromptEmbedder
from pe.runs.cli import check_alone, user_errors
from pe.runs.extras import extra
from pe.runs.parsers import MODEL_OPTIONS, TypedParser

Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
STANDARD_INPUT = "-"
FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*")
"""A suffix that says what a file holds: `.csv`, not the `.5` of `embedder-1.5`."""


def read_rows(path: str, field: str, id_column: str | None = None) -> list[Record]:
    """The rows of an input, in order, each with a text under `field`; lines are rows of that field alone.

    Raises:
        DataError: unreadable or empty file, or a row without the field or the ids, with file and line.
    """
    if path == STANDARD_INPUT or Path(path).suffix.lower() == ".txt":
        if id_column is not None:
            raise DataError(f"{path}: --id-column: expected none, lines have no ids, got {id_column!r}")
        return [{field: line} for line in read_lines(path)]
    found = []
    for number, row in records(path):
        try:
            text_under(field, row)
            if id_column is not None and row.get(id_column) is None:
                raise RecordError("missing id", f"expected an id under {id_column!r}, got none in {braced(row)}")
        except RecordError as bad:
            raise DataError(f"{path}:{number}: {bad}") from bad
        found.append(row)
    return found


def written_beside(rows: Sequence[Record], field: str, id_column: str | None, keep: bool) -> list[Record]:
    """What stands before an embedding in a row of the output: all columns, or the text behind its id."""
    if keep:
        return list(rows)
    ids = [{id_column: row[id_column]} if id_column is not None else {} for row in rows]
    return [{**own, "text": row[field]} for own, row in zip(ids, rows, strict=True)]


def check_written(rows: Sequence[Record], suffix: str, names: Sequence[str]) -> None:
    """Refuse, before anything is encoded, rows that the output cannot hold.

    Raises:
        ValueError: a column has the name of an embedding's, or a value that JSON or parquet does not know.
    """
    if taken := next((name for name in names if any(name in row for row in rows)), None):
        raise ValueError(f"--keep: expected an input without the column {taken!r}, which the output has, got one")
    try:
        if suffix == ".jsonl":
            json.dumps(rows)
        elif suffix == ".parquet":
            table_of(rows, "input")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--keep: a column cannot be written as {suffix} ({error}); write the other, or leave it out"
        ) from error


def sentences(given: str) -> list[str]:
    """The instructions of `--instruction`: the sentence as it is typed, or those of a JSON list of strings.

    Raises:
        ValueError: none, or one that is empty or no Unicode.
    """
    try:
        parsed = json.loads(given) if given.startswith("[") else None
    except (ValueError, RecursionError):
        parsed = None
    several = parsed if isinstance(parsed, list) and all(isinstance(item, str) for item in parsed) else [given]
    if not several or not all(sentence.strip() for sentence in several):
        raise ValueError(f"--instruction: expected a sentence, or a JSON list of sentences, got {given!r}")
    for sentence in several:
        try:
            check_unicode("--instruction", sentence)
        except RecordError as bad:
            raise ValueError(str(bad)) from bad
    return several


def check_store(store: str | None, gib: float | None, dtype: StoreDtype | None) -> None:
    """Raise ValueError for options without a store, and for one in memory, which would be gone with the command."""
    for name, value in (("store_gib", gib), ("store_dtype", dtype)):
        if store is None and value is not None:
            raise ValueError(f"--{name}: expected --store beside it, got {value} alone")
    if store is not None and store.strip() in ("", "none", "memory"):
        raise ValueError(f"--store: expected a folder, got {store!r}; give ./{store.strip()} for one of that name")


def check_compression(width: int, texts: int, dimensions: int | None, precision: Precision) -> None:
    """Raise ValueError for what embeddings of `width` numbers cannot be cut to, or too few texts for a range."""
    if dimensions is not None and not 1 <= dimensions <= width:
        raise ValueError(f"--dimensions: expected 1 to {width}, the model's, got {dimensions}")
    kept = width if dimensions is None else dimensions
    if precision in ("binary", "ubinary") and kept % 8:
        raise ValueError(
            f"--precision: {precision} packs 8 dimensions into a byte, expected a multiple of 8, got {kept}"
        )
    if precision in ("int8", "uint8") and texts < 2:
        raise ValueError(f"--precision: {precision} takes its ranges from the texts, expected at least 2, got {texts}")


def compressed(embeddings: Embeddings, dimensions: int | None, precision: Precision) -> Embeddings:
    """`[I, N, D]` float32 cut to their first numbers, of length one again, and quantised by sentence-transformers.

    int8 and uint8 take each dimension's range from these embeddings; binary packs 8 dimensions into a byte.
    """
    embeddings = shortened(embeddings, dimensions)
    if precision == "float32" or precision == "float16":
        return embeddings.astype(precision)
    from sentence_transformers.util import quantize_embeddings

    return np.stack([np.asarray(quantize_embeddings(rows, precision=precision)) for rows in embeddings])


def columns(embeddings: Embeddings, instructions: Sequence[str]) -> dict[str, Embeddings]:
    """Column name -> `[N, D]`."""
    return dict(zip(column_names(instructions), embeddings, strict=True))


def write_npy(path: Path, beside: Sequence[Record], embeddings: Embeddings, instructions: Sequence[str]) -> None:
    with path.open("wb") as file:
        np.save(file, embeddings[0] if len(instructions) == 1 else embeddings)


def write_jsonl(path: Path, beside: Sequence[Record], embeddings: Embeddings, instructions: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for place, row in enumerate(beside):
            found = {name: rows[place].tolist() for name, rows in columns(embeddings, instructions).items()}
            file.write(json.dumps({**row, **found}, ensure_ascii=False) + "\n")


def write_parquet(path: Path, beside: Sequence[Record], embeddings: Embeddings, instructions: Sequence[str]) -> None:
    table = table_of(beside, "input")
    for name, rows in columns(embeddings, instructions).items():
        table = table.append_column(name, vectors(rows))
    pq.write_table(table, path)


WRITERS: dict[str, Callable[[Path, Sequence[Record], Embeddings, Sequence[str]], None]] = {
    ".npy": write_npy,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


def encode_file(
    model: str,
    input: str,
    output: str,
    *,
    instruction: str | None = None,
    side: Literal["query", "document"] = "query",
    field: str = "text",
    id_column: str | None = None,
    keep: bool = False,
    dimensions: int | None = None,
    precision: Precision = "float32",
    batch_tokens: int = 16_384,
    backbone: str | None = None,
    prompter: str | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    overwrite: bool = False,
    store: str | None = None,
    store_gib: float | None = None,
    store_dtype: StoreDtype | None = None,
) -> None:
    """Embed the texts of a file.

    Args:
        model: folder of a saved PromptEmbedder, or its name on the hub.
        input: `.txt` or `-`, a text a line; or rows, see the top of this module.
        output: `.npy`, `.jsonl` or `.parquet`, whose folder is made where there is none; or a folder of shards.
        instruction: a sentence as it is typed, or a JSON list of sentences, which share the text pass; where none is
            given, the side's default, the one that training weighted most.
        side: whose templates are used.
        field: the text's column in an input of rows.
        id_column: a column of the input that stands before the text in the output's rows.
        keep: write all columns of the input before the embeddings, in place of the text alone.
        dimensions: the first numbers of an embedding that stay, of length one again; for a model trained with
            `loss.matryoshka`.
        precision: float16; or int8, uint8, a bit a dimension (binary, ubinary), as sentence-transformers quantises. Of
            a folder float16, or int8 with a scale a row.
        batch_tokens: tokens of a packed batch.
        backbone: where the backbone is now, if not where it was.
        prompter: where the base of a prompting LLM with adapters is now, if not where it was.
        dtype: type of the backbone's weights; as in training where it is not given.
        device: cpu, cuda, cuda:1; a GPU where there is one.
        overwrite: replace an existing output; a folder that goes on is not begun again.
        store: folder where the text pass is kept and looked for first (see `docs/text-store.md`).
        store_gib: its size in GiB; None: `DEFAULT_GIB`.
        store_dtype: int8 keeps keys and values rounded, in about half of the bytes; None: as they are.
    """
    target = Path(output)
    suffix = target.suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"output: expected a name ending in {', '.join(WRITERS)}, or a folder, got {output}")
    if target.is_dir():
        raise ValueError(f"output: expected a file, got the folder {output}")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{output}: exists already; give --overwrite=true, or another name")
    instructions = None if instruction is None else sentences(instruction)
    if keep and id_column is not None:
        raise ValueError(f"--id-column: expected none beside --keep, which keeps every column, got {id_column!r}")
    if id_column in ("text", field):
        raise ValueError(f"--id-column: expected another column than that of the texts, got {id_column!r}")
    if suffix == ".npy" and (keep or id_column is not None):
        raise ValueError(f"output: expected .jsonl or .parquet, which hold further columns, got {output}")
    check_store(store, store_gib, store_dtype)
    rows = read_rows(input, field, id_column)
    beside = written_beside(rows, field, id_column, keep)
    check_written(beside, suffix, column_names(instructions or [""]))
    texts = [row[field] for row in rows]
    if precision not in ("float32", "float16"):
        extra("sentence_transformers", "export")
    target.parent.mkdir(parents=True, exist_ok=True)
    place = usable_device(device)
    embedder = PromptEmbedder.from_pretrained(model, backbone=backbone, prompter=prompter, dtype=dtype, device=place)
    check_compression(embedder.dimensions, len(texts), dimensions, precision)
    if instructions is None:
        instructions = [embedder.default_instruction(side)]
        print(f"no --instruction, so {side} texts go under {instructions[0]!r}", file=sys.stderr)
    gib = DEFAULT_GIB if store_gib is None else store_gib
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent))
        kept = None
        if store is not None:
            kept = stack.enter_context(TextStore.open(store, gib, store_dtype or "same"))
        embeddings = embedder.encode_many(
            texts, instructions=instructions, side=side, batch_tokens=batch_tokens, progress=True, store=kept
        )
        found = compressed(embeddings, dimensions, precision)
        whole = Path(folder) / target.name
        WRITERS[suffix](whole, beside, found, instructions)
        os.replace(whole, target)
        if kept is not None:
            print(kept, file=sys.stderr)
    print(f"{output}: {shape_of(found, suffix, instructions)} {found.dtype}; {embedder.truncation}", file=sys.stderr)


def shape_of(embeddings: Embeddings, suffix: str, instructions: Sequence[str]) -> str:
    """The shape as it stands in the file: that of the array, or rows and the columns of embeddings."""
    if suffix == ".npy":
        return str(list(embeddings.shape)[len(instructions) == 1 :])
    names = ", ".join(f"{name} [{embeddings.shape[-1]}]" for name in column_names(instructions))
    return f"{embeddings.shape[1]} rows with {names}"


def parse(argv: Sequence[str] | None) -> Namespace:
    """The arguments of `encode_file`; strings are as they are typed."""
    parser = TypedParser(prog="python -m pe.encode", description="Embed the texts of a file.")
    typed: set[str | int] = {"instruction", "id_column", "keep", "store", "store_gib", "store_dtype", *MODEL_OPTIONS}
    parser.add_function_arguments(encode_file, as_positional=True, skip=typed)
    parser.add_typed("instruction", str, "a sentence, or a JSON list of them (default: that of training)")
    parser.add_model_options(*MODEL_OPTIONS)
    parser.add_argument(
        "--id-column", "--id_column", type=str, default=None, help="column that stands before the text in the output"
    )
    parser.add_argument("--keep", action="store_true", help="write all columns of the input before the embeddings")
    parser.add_typed("store", str, "folder that keeps the text pass (default: none)")
    parser.add_typed("store_gib", float, f"its size in GiB (default: {DEFAULT_GIB:g})")
    parser.add_typed("store_dtype", StoreDtype, "same, or int8 for about half of the bytes (default: same)")
    parser.add_typed("engine", EngineName, "of a folder: local, one process, or ray (default: local)")
    parser.add_typed("shard_rows", int, f"of a folder: rows of a shard (default: {SHARD_ROWS})")
    parser.add_typed("workers", int, "of ray (default: as many as its nodes hold)")
    parser.add_typed("worker_cores", int, "of each worker (default: 1)")
    parser.add_typed("worker_gpus", float, "of each worker, up to 1 (default: 1 if ray has any)")
    return parser.parse_args(argv)


OF_FOLDERS = ("engine", "shard_rows", "workers", "worker_cores", "worker_gpus")
OF_FILES = ("id_column", "store", "store_gib", "store_dtype")


def is_folder(output: str) -> bool:
    """Whether an output is the folder of shards: a folder that is there, or a name without the suffix of a file."""
    suffix = PurePosixPath(output).suffix
    return suffix.lower() not in WRITERS and (Path(output).is_dir() or not FILE_SUFFIX.fullmatch(suffix))


def encode(**given: Any) -> None:
    """Embed the texts of a file into a file, or of any number of files into a folder of shards.

    Raises:
        OSError, ValueError: what is given cannot be used; see `encode_file` and `encode_folder`.
    """
    check_alone("encode everything", "share the work by --engine ray and a folder as OUTPUT")
    folder = is_folder(given["output"])
    for name in OF_FILES if folder else OF_FOLDERS:
        if (value := given.pop(name)) is not None:
            expected = "none for a folder, whose rows have all columns" if folder else "a folder as OUTPUT"
            raise ValueError(f"--{name.replace('id_', 'id-')}: expected {expected}, got {value!r}")
    if not folder:
        if "://" in given["output"]:
            raise ValueError(f"output: expected a path, or a folder of shards at an address, got {given['output']}")
        encode_file(**given)
        return
    del given["keep"]  # every column is kept
    instruction = given.pop("instruction")
    chosen = {name: given.pop(name) for name in OF_FOLDERS}
    encode_folder(
        **given,
        instructions=None if instruction is None else sentences(instruction),
        **{name: value for name, value in chosen.items() if value is not None},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Encode as the command line says; bad input ends with one message and exit code 2."""
    quiet()
    arguments = parse(argv)
    with user_errors("pe.encode"):
        encode(**vars(arguments))


if __name__ == "__main__":
    main()
