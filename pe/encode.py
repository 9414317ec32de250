"""`python -m pe.encode MODEL INPUT OUTPUT [--instruction TEXT] [--store DIR]`

Several instructions are a JSON list: `--instruction '["TEXT", ...]'`.

INPUT: `.txt` (a text a line, in UTF-8; only `\\n` or `\\r\\n` ends a line) or `.jsonl`, `.jsonl.xz`, `.jsonl.gz` (the
field named by --field; lines that hold nothing are passed over). OUTPUT: `.npy` holds float32 `[N, D]`, or `[I, N, D]`
for I instructions; `.jsonl` and `.parquet` hold a row a text with its embedding (one for each instruction).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jsonargparse import ArgumentParser, Namespace

from pe.config import Dtype
from pe.data.records import (
    DataError,
    Record,
    RecordError,
    braced,
    check_string,
    check_unicode,
    jsonl_records,
    read_lines,
)
from pe.method.loading import quiet
from pe.method.text_store import DEFAULT_GIB, TextStore
from pe.model import PromptEmbedder
from pe.runs.cli import user_errors

Embeddings = npt.NDArray[np.float32]


def read_texts(path: Path, field: str) -> list[str]:
    """The texts of a file, in order.

    Raises:
        DataError: unreadable or empty file, or a row without the field, with file and line.
    """
    if path.suffix.lower() == ".txt":
        return read_lines(path)
    texts = []
    for number, row in jsonl_records(path):
        try:
            texts.append(text_under(field, row))
        except RecordError as bad:
            raise DataError(f"{path}:{number}: {bad}") from bad
    return texts


def text_under(field: str, row: Record) -> str:
    """The text of a row; RecordError where the field is not there, or holds something else."""
    if field not in row:
        detail = f"expected the key {field!r}, got {braced(row)}; name the key of the texts with --field"
        raise RecordError("missing key", detail)
    check_string(field, row[field])
    return row[field]


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


def check_folder(store: str) -> str:
    """The folder of `--store`.

    Raises:
        ValueError: it names none: what is kept in memory would be gone with the command.
    """
    if store.strip() in ("", "none", "memory"):
        raise ValueError(f"--store: expected a folder, got {store!r}; give ./{store.strip()} for one of that name")
    return store


def columns(embeddings: Embeddings, instructions: Sequence[str]) -> dict[str, Embeddings]:
    """Column name -> `[N, D]`: `embedding`, or `embedding_0`, `embedding_1`, ... for several instructions."""
    if len(instructions) == 1:
        return {"embedding": embeddings[0]}
    return {f"embedding_{place}": rows for place, rows in enumerate(embeddings)}


def write_npy(path: Path, texts: Sequence[str], embeddings: Embeddings, instructions: Sequence[str]) -> None:
    with path.open("wb") as file:
        np.save(file, embeddings[0] if len(instructions) == 1 else embeddings)


def write_jsonl(path: Path, texts: Sequence[str], embeddings: Embeddings, instructions: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for place, text in enumerate(texts):
            row = {name: rows[place].tolist() for name, rows in columns(embeddings, instructions).items()}
            file.write(json.dumps({"text": text, **row}, ensure_ascii=False) + "\n")


def write_parquet(path: Path, texts: Sequence[str], embeddings: Embeddings, instructions: Sequence[str]) -> None:
    size = embeddings.shape[-1]
    arrays = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), size)
        for name, rows in columns(embeddings, instructions).items()
    }
    pq.write_table(pa.table({"text": pa.array(texts, pa.string()), **arrays}), path)


WRITERS: dict[str, Callable[[Path, Sequence[str], Embeddings, Sequence[str]], None]] = {
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
    batch_tokens: int = 16_384,
    backbone: str | None = None,
    prompter: str | None = None,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    store: str | None = None,
    store_gib: float = DEFAULT_GIB,
) -> None:
    """Embed the texts of a file.

    Args:
        model: folder of a saved PromptEmbedder, or its name on the hub.
        input: `.txt` or `.jsonl[.xz|.gz]`.
        output: `.npy`, `.jsonl` or `.parquet`; its folder is made where there is none.
        instruction: a sentence as it is typed, or a JSON list of sentences, which share the text pass; where none is
            given, the side's default, the one that training weighted most.
        side: whose templates are used.
        field: the text's key in a `.jsonl` input.
        batch_tokens: tokens of a packed batch.
        backbone: where the backbone is now, if not where it was.
        prompter: where the base of a prompting LLM with adapters is now, if not where it was.
        dtype: type of the backbone's weights; as in training where it is not given.
        overwrite: replace an existing output.
        store: folder where the text pass is kept and looked for first (see `docs/text-store.md`).
        store_gib: its size in GiB.
    """
    target = Path(output)
    suffix = target.suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"output: expected a name ending in {', '.join(WRITERS)}, got {output}")
    if target.is_dir():
        raise ValueError(f"output: expected a file, got the folder {output}")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{output}: exists already; give --overwrite=true, or another name")
    instructions = None if instruction is None else sentences(instruction)
    texts = read_texts(Path(input), field)
    target.parent.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    embedder = PromptEmbedder.from_pretrained(model, backbone=backbone, prompter=prompter, dtype=dtype, device=device)
    if instructions is None:
        instructions = [embedder.default_instruction(side)]
        print(f"no --instruction, so {side} texts go under {instructions[0]!r}", file=sys.stderr)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent))
        kept = None if store is None else stack.enter_context(TextStore.open(check_folder(store), store_gib))
        embeddings = embedder.encode_many(
            texts, instructions=instructions, side=side, batch_tokens=batch_tokens, progress=True, store=kept
        )
        whole = Path(folder) / target.name
        WRITERS[suffix](whole, texts, embeddings, instructions)
        os.replace(whole, target)
        if kept is not None:
            print(kept, file=sys.stderr)
    shape = list(embeddings.shape)[len(instructions) == 1 :]  # as it stands in an .npy file
    print(f"{output}: {shape} float32; {embedder.truncation}", file=sys.stderr)


def parse(argv: Sequence[str] | None) -> Namespace:
    """The arguments of `encode_file`; strings are as they are typed."""
    parser = ArgumentParser(prog="python -m pe.encode", description="Embed the texts of a file.")
    typed: set[str | int] = {"instruction", "backbone", "prompter", "dtype", "store"}
    parser.add_function_arguments(encode_file, as_positional=True, skip=typed)
    # With None in a type the parser would read `null`, and what YAML takes for a comment, as None.
    parser.add_argument(
        "--instruction", type=str, default=None, help="a sentence, or a JSON list of them (default: that of training)"
    )
    parser.add_argument("--backbone", type=str, default=None, help="where the backbone is now, if not where it was")
    parser.add_argument("--prompter", type=str, default=None, help="where the base of its adapters is, if moved")
    parser.add_argument("--dtype", type=Dtype, default=None, help="of the backbone's weights (default: as in training)")
    parser.add_argument("--store", type=str, default=None, help="folder that keeps the text pass (default: none)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Encode as the command line says; bad input ends with one message and exit code 2."""
    quiet()
    arguments = parse(argv)
    with user_errors("pe.encode"):
        encode_file(**vars(arguments))


if __name__ == "__main__":
    main()
